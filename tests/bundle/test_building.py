"""What the child that builds an engine says, and the timings that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekd.bundle.runner import building
from edgekd.bundle.runner.errors import Failed

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


class Refusing:
    """A TensorRT that takes no timings: the part of its API that a build calls (TensorRT Python API reference)."""

    __version__ = "11.0.0"
    NetworkDefinitionCreationFlag = object

    def __init__(self, added: int) -> None:
        self.offered: list[bytes] = []
        self.config = SimpleNamespace(
            create_timing_cache=lambda content: self.offered.append(content),
            get_timing_cache=lambda: None,
            add_optimization_profile=lambda profile: added,
        )

    def Builder(self, log: object) -> SimpleNamespace:
        return SimpleNamespace(
            create_network=lambda bits: None,
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *shapes: None),
            build_serialized_network=lambda definition, config: b"engine",
        )

    def OnnxParser(self, definition: object, log: object) -> SimpleNamespace:
        return SimpleNamespace(parse_from_file=lambda path: True)


NETWORK = {**MANIFEST["networks"][0], "inputs": [{"name": "image", "axes": ["batch", 4]}]}
LOG = SimpleNamespace(last=lambda: "no reason given")


def test_a_builder_that_takes_no_timings_builds_all_the_same(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"old")
    settings = building.engine_settings(NETWORK, {}, "11.0.0")
    trt = Refusing(0)
    assert building.build_engine(trt, "int8.onnx", NETWORK, settings, LOG, str(cache)) == b"engine"
    assert trt.offered == [b"old", b""]
    assert cache.read_bytes() == b"old"


def test_a_batch_that_the_builder_refuses_is_told() -> None:
    settings = building.engine_settings(NETWORK, {}, "11.0.0")
    with pytest.raises(Failed, match=r"TensorRT 11\.0\.0 refuses the batch of 1: no reason given"):
        building.build_engine(Refusing(-1), "int8.onnx", NETWORK, settings, LOG)
