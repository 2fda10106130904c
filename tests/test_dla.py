"""What a Jetson's DLA takes: fp16, static shapes, and not with every TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.errors import UsageError
from edgekd.profile import Profile, load_profile
from edgekd.trt import TrtFile, dla_problems
from edgekd.trt.build import _suited, _wanted

AGX, NX = "jetson-agx-orin-64gb", "jetson-orin-nx-16gb"


def board(tmp_path: Path, base: str, *lines: str) -> Profile:
    file = tmp_path / "board.toml"
    file.write_text("\n".join([f'extends = "{base}"', "[tensorrt]", "dla = 1", *lines]))
    return load_profile(str(file))


def told(profile: Profile, precision: str = "fp16", dynamic: bool = False) -> list[str]:
    found = dla_problems(profile, precision=precision, dynamic_batch=dynamic)
    assert all(p.hint for p in found)
    return [f"{p.where.partition(': ')[2]}: {p.what}" for p in found]


@pytest.mark.parametrize("base", [AGX, NX])
def test_fp16_with_static_shapes_is_built_for_it(base: str, tmp_path: Path) -> None:
    assert told(board(tmp_path, base)) == []


def test_everything_that_keeps_a_file_from_it_is_told_at_once(tmp_path: Path) -> None:
    assert told(board(tmp_path, AGX), "int8", True) == [
        "tensorrt.dla: the DLA takes fp16 only: its int8 wants a calibrator, not the Q/DQ of our files, got int8",
        "tensorrt.dla: the DLA takes static shapes only, got a dynamic batch",
    ]
    assert told(board(tmp_path, AGX), "fp32") == ["tensorrt.dla: the DLA takes fp16 only, got fp32"]


def test_devices_without_any() -> None:
    assert told(load_profile("cpu-x86")) == ["tensorrt: no DLA without TensorRT"]
    for name in ("jetson-orin-nano-8gb", "jetson-thor", "gpu-h100"):
        assert told(load_profile(name)) == ["tensorrt.dla: the device has no DLA: tensorrt.dla_cores is 0"]


@pytest.mark.parametrize(
    ("base", "version", "jetpack", "why"),
    [
        (AGX, "8.5", "5.1.2", None),
        (AGX, "8.6", "6.0", None),
        (AGX, "10.7", "6.2", None),
        (AGX, "10.16", "7.2", "TensorRT 10.16 has no DLA: 10.7 was the last before 11.4"),
        (AGX, "11.4", "7.2.2", None),
        (NX, "11.4", "7.2.2", "TensorRT 11.4 has the DLA of Jetson AGX Orin only, got Jetson Orin NX"),
        # JetPacks that are newer than the table: TensorRT decides.
        (AGX, "11.0", "7.9", "TensorRT 11.0 has no DLA: 10.7 was the last before 11.4"),
        (AGX, "11.3", "7.9", "TensorRT 11.3 has no DLA: 10.7 was the last before 11.4"),
        (AGX, "11.4", "7.9", None),
    ],
)
def test_tensorrt_and_jetpack_decide(base: str, version: str, jetpack: str, why: str | None, tmp_path: Path) -> None:
    profile = board(tmp_path, base, f'version = "{version}"', f'jetpack = "{jetpack}"')
    assert told(profile) == ([f"tensorrt.version: {why}"] if why else [])


def test_a_jetpack_without_it_is_said_although_its_tensorrt_would_have_it(tmp_path: Path) -> None:
    profile = board(tmp_path, AGX)
    assert profile.tensorrt is not None
    moved = profile.model_copy(update={"tensorrt": profile.tensorrt.model_copy(update={"jetpack": "7.2"})})
    assert told(moved) == ["tensorrt.version: JetPack 7.2 has no DLA with TensorRT 10.3"]


def test_of_the_files_of_an_export_a_dla_gets_fp16_alone(tmp_path: Path) -> None:
    files = [TrtFile(name, tmp_path / f"model.{name}.onnx", 17, True, {}) for name in ("int8", "fp16", "fp32")]
    accelerator = board(tmp_path, NX)
    assert [file.name for file in _suited(files, accelerator)] == ["fp16"]
    assert _wanted(accelerator, _suited(files, accelerator)) == accelerator.tensorrt
    with pytest.raises(UsageError, match="the DLA takes fp16 only"):
        _wanted(accelerator, _suited(files[::2], accelerator))
    assert _suited(files, load_profile(NX)) == files
