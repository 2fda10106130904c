"""Each tracker with its own package: what it stored is what metrics.jsonl says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import environ

from edgekd import tracking
from edgekd.pipeline import plan
from edgekd.recipe import load_recipe


@pytest.fixture(scope="module")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings in one process with all trackers, which must not meet the environment of other tests."""
    directory = tmp_path_factory.mktemp("tracked") / "run"
    trackers = 'trackers=["tensorboard","wandb","mlflow"]'
    command = [sys.executable, "-m", "edgekd", "run", "recipe.toml", "-o", str(directory), "--until", "distill"]
    command += ["--set", trackers, "--set", "teacher.epochs=2"]
    clean = {k: v for k, v in environ().items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    done = subprocess.run(command, cwd=project, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "a tracker failed" not in done.stderr
    return directory


def history(run: Path, stage: str) -> list[dict[str, float]]:
    (file,) = run.glob(f"*-{stage}-*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("stage", "epochs"), [("teacher", 2), ("distill", 1)])
def test_tensorboard_holds_every_epoch(run: Path, stage: str, epochs: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = {file.parent for file in (run / "trackers" / stage / "tiny").glob("events.out.*")}
    found = EventAccumulator(str(place))
    found.Reload()
    values = [event.value for event in found.Scalars("val.accuracy")]
    records = history(run, stage)
    assert len(values) == len(records) == epochs
    assert values == pytest.approx([r["val.accuracy"] for r in records], rel=1e-6)
    losses = [event.value for event in found.Scalars("loss")]
    assert losses[-1] == pytest.approx(records[-1]["loss"], rel=1e-6)


def test_mlflow_has_a_run_for_each_stage_in_a_local_store(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run / "trackers" / "mlruns").resolve().as_uri())
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    stored = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(stored) == {"teacher", "distill"}
    values = client.get_metric_history(stored["teacher"].info.run_id, "val.accuracy")
    assert [v.value for v in values] == pytest.approx([r["val.accuracy"] for r in history(run, "teacher")])
    assert stored["teacher"].data.params["epochs"] == "2"
    assert stored["teacher"].info.status == "FINISHED"


def log_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KiB of (checksum, length, kind, piece)."""
    position, whole = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield whole
            whole = b""


def test_wandb_wrote_its_offline_files(run: Path) -> None:
    """Its transaction log, read with its own record types: a record for each thing that was logged."""
    from wandb.proto import wandb_internal_pb2

    files = sorted((run / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    logged: dict[str, list[float]] = {}
    for file in files:
        name = ""
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            name = record.run.display_name or name
            for item in record.history.item:
                if (item.key or ".".join(item.nested_key)) == "val.accuracy":
                    logged.setdefault(name, []).append(float(item.value_json))
    assert set(logged) == {"teacher", "distill"}
    for stage, values in logged.items():
        assert values == pytest.approx([r["val.accuracy"] for r in history(run, stage)])


def test_trackers_change_no_stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    keys = [
        [s.key for s in plan(load_recipe("recipe.toml", overrides)).steps]
        for overrides in ([], ['trackers=["tensorboard"]'])
    ]
    assert keys[0] == keys[1]


def test_a_missing_package_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    (problem,) = tracking.missing_trackers(["tensorboard", "wandb"])
    assert (problem.where, problem.what) == ("trackers", "wandb is not installed")
    assert problem.hint == 'pip install "edgekd[track]"'


def test_a_tracker_that_fails_is_told_once_and_left(tmp_path: Path) -> None:
    class Broken:
        name = "broken"
        calls = 0

        def log(self, *_: Any, **__: Any) -> None:
            Broken.calls += 1
            raise ConnectionError("no route")

        def finish(self) -> None:
            raise OSError("gone")

    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [Broken()]
    with pytest.warns(RuntimeWarning, match="a tracker failed and is left: ConnectionError: no route"):
        tracking.log(accelerator, {"loss": 1.0}, 1)
    tracking.log(accelerator, {"loss": 1.0}, 2)
    assert Broken.calls == 1
    accelerator.trackers = [Broken()]
    with pytest.warns(RuntimeWarning, match="gone"):
        tracking.end(accelerator)
    (tmp_path / "file").write_text("")
    tracked = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="a tracker failed"):
        tracking.begin(tracked, "p", "teacher", tmp_path / "file", {"epochs": 1})
    assert tracked.trackers == []
    assert os.environ["WANDB_MODE"]
