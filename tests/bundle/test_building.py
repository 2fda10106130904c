"""What the child that builds an engine says, and the timings that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekd.bundle.runner import building

MANIFEST = {
    "profile": {},
    "networks": [{"name": "int8", "file": "int8.onnx", "precision": "int8", "typed_half": False, "batch": 1}],
}


def test_whatever_ends_a_build_is_told_by_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A TensorRT without its functions, as a stub package is."""
    monkeypatch.setattr(building, "imported", lambda: SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(building, "described_gpu", lambda: {"gpu": "Orin"})
    monkeypatch.setattr(building, "logger_of", lambda trt: None)
    assert building.built_here(str(tmp_path), MANIFEST, "int8", str(tmp_path)) == 3
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert problem.startswith("building failed: AttributeError: ")
    assert "NetworkDefinitionCreationFlag" in problem


def test_timings_are_of_one_tensorrt_and_one_gpu() -> None:
    names = {building.timing_cache("out", v, g) for v in ("10.3.0", "10.7.0") for g in ("NVIDIA L4", "NVIDIA T4", None)}
    assert len(names) == 6
    assert building.timing_cache("out", "10.3.0", "NVIDIA L4") == "out/engines/timing.10.3.0.NVIDIA-L4.cache"


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timing.cache"
    building.write_bytes(str(path), b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        building.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["timing.cache"]


def test_the_builders_memory_is_whole_mebibytes_within_the_profiles() -> None:
    assert building.workspace_mib({"workspace_mb": 512}) == 488
    assert building.workspace_mib({"workspace_mb": 1}) == 1
