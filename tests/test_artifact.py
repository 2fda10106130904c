"""Artifacts: written whole or not at all, checked when read; and the lock on a run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgekd.artifact import (
    FORMAT,
    Artifact,
    Manifest,
    ModelSpec,
    Preprocessing,
    digest,
    finish,
    locked,
    write_atomically,
    writing,
)
from edgekd.errors import ArtifactError, StageError, UsageError

MANIFEST = Manifest(
    kind="distill",
    key="k",
    model=ModelSpec(use="cifar-resnet", args={"depth": 8}),
    preprocessing=Preprocessing(size=[3, 8, 8], mean=[0.0], std=[1.0]),
    classes=["a", "b"],
)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    with writing(tmp_path / "run" / "01-distill") as directory:
        (directory / "model.safetensors").write_bytes(b"weights")
        (directory / "metrics.jsonl").write_text("{}\n")
        finish(directory, MANIFEST)
    return Artifact.open(tmp_path / "run" / "01-distill")


def test_files_are_recorded_by_digest_and_size(artifact: Artifact) -> None:
    recorded = artifact.manifest.files
    assert recorded["model.safetensors"] == (hashlib.sha256(b"weights").hexdigest(), 7)
    assert set(recorded) == {"model.safetensors", "metrics.jsonl"}
    assert artifact.manifest.model_copy(update={"files": {}}) == MANIFEST
    assert artifact.key == "k"
    assert artifact.file("metrics.jsonl").read_text() == "{}\n"
    with pytest.raises(ArtifactError, match=r"distill artifacts have no model\.onnx"):
        artifact.file("model.onnx")
    assert [p.name for p in artifact.path.parent.iterdir()] == ["01-distill"]  # nothing temporary is left


def test_nothing_appears_before_it_is_complete(tmp_path: Path) -> None:
    destination = tmp_path / "01-distill"

    def work() -> None:
        with writing(destination) as directory:
            (directory / "model.safetensors").write_bytes(b"half")
            assert not destination.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_new_artifact_takes_the_place_of_an_old_one(artifact: Artifact) -> None:
    with writing(artifact.path) as directory:
        (directory / "model.safetensors").write_bytes(b"others")
        assert artifact.file("model.safetensors").read_bytes() == b"weights"  # until the new one is complete
        finish(directory, MANIFEST)
    assert set(Artifact.open(artifact.path).manifest.files) == {"model.safetensors"}


def test_a_link_is_replaced_and_what_it_leads_to_stays(artifact: Artifact, tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    trial.mkdir()
    for target in (artifact.path, tmp_path / "gone"):
        link = trial / target.name
        link.symlink_to(target)
        with writing(link) as directory:
            (directory / "model.safetensors").write_bytes(b"others")
            finish(directory, MANIFEST)
        assert not link.is_symlink()
        assert Artifact.open(link).file("model.safetensors").read_bytes() == b"others"
    assert Artifact.open(artifact.path).file("model.safetensors").read_bytes() == b"weights"


def test_what_killed_processes_left_is_removed(artifact: Artifact) -> None:
    rubbish = artifact.path.with_name(".01-distill.4711.tmp")
    rubbish.mkdir()
    (rubbish / "model.safetensors").write_bytes(b"half")
    with writing(artifact.path) as directory:
        finish(directory, MANIFEST)
    assert not rubbish.exists()


def test_a_disk_that_refuses_is_a_stage_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StageError, match="cannot write") as caught, writing(file / "01-distill"):
        pass
    assert "disk full" in str(caught.value.problem.hint)

    def full() -> None:
        with writing(tmp_path / "01-distill"):
            raise OSError(28, "No space left on device")

    with pytest.raises(StageError, match="No space left on device"):
        full()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: (p / "model.safetensors").write_bytes(b"weightz"), "model.safetensors is corrupted"),
        (lambda p: (p / "model.safetensors").write_bytes(b"weight"), "model.safetensors is corrupted"),
        (lambda p: (p / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda p: truncate(p / "manifest.json", 100), "the manifest is damaged"),
        (lambda p: (p / "manifest.json").write_text(""), "the manifest is damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "the manifest is damaged"),
        (lambda p: (p / "manifest.json").write_text(f'{{"format": {FORMAT}}}'), "the manifest is damaged"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "the manifest is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"format": 99}'), f"artifact format 99, expected {FORMAT}"),
    ],
)
def test_damage_is_found_and_named(artifact: Artifact, damage: Any, what: str) -> None:
    damage(artifact.path)
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(artifact.path)
    assert caught.value.exit_code == 3
    assert what in caught.value.problem.what
    assert caught.value.problem.where == str(artifact.path)
    assert "run the same command again" in str(caught.value.problem.hint) or "make it again" in str(caught.value)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def test_files_are_read_only_when_asked_for(artifact: Artifact) -> None:
    (artifact.path / "model.safetensors").unlink()
    assert Artifact.open(artifact.path, verify=False).key == "k"


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no artifact at") as caught:
        Artifact.open(tmp_path)
    assert caught.value.exit_code == 2
    assert "manifest.json" in str(caught.value.problem.hint)


def test_a_manifest_of_a_newer_edgekd_with_unknown_keys_is_refused(artifact: Artifact) -> None:
    file = artifact.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "flavour": 1}))
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.open(artifact.path)


def test_writing_a_file_leaves_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_atomically(file, "old")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(file, "newer")
    assert caught.value.filename == str(file)
    assert file.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    canonical = hashlib.sha256(b'{"a": 1, "b": [1.5, null]}').hexdigest()
    assert digest({"b": [1.5, None], "a": 1}) == canonical


HOLDER = """
import sys, time
from pathlib import Path
from edgekd.artifact import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_run_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StageError, match=f"in use by another edgekd .process {holder.pid}.") as caught, locked(run):
            pass
        assert caught.value.exit_code == 3
        assert "-o DIR" in str(caught.value.problem.hint)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(run):
        assert (run / ".lock").read_text() == str(os.getpid())
    with locked(run):
        pass


def test_a_directory_that_cannot_be_made_is_a_stage_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    started = time.monotonic()
    for place in (file, file / "below"):
        with pytest.raises(StageError, match="cannot write to") as caught, locked(place):
            pass
        assert "-o DIR" in str(caught.value.problem.hint)
    assert time.monotonic() - started < 5
