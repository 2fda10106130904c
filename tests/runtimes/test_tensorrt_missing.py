"""What is said where TensorRT, a GPU or CUDA is missing: this is so on most machines that run these tests."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnxruntime
import pytest
import tiny_onnx

from edgekd.errors import MissingExtra, StageError
from edgekd.profile import Profile
from edgekd.runtimes import open_session
from edgekd.runtimes.engine_file import BatchRange, write_engine
from edgekd.trt.build import build_engines
from edgekd.trt.files import TrtFile

without_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
KNOWN = {
    "gpu": "NVIDIA L4",
    "compute_capability": "8.9",
    "tensorrt": "10.3.0.30",
    "precision": "int8",
    "strongly_typed": False,
    "optimization_level": 3,
    "inputs": {"image": BatchRange(smallest=[1, 1, 4, 4], tuned=[1, 1, 4, 4], largest=[8, 1, 4, 4])},
}


@pytest.fixture
def files(tmp_path):
    paths = {name: tiny_onnx.linear_classifier(tmp_path / f"model.{name}.onnx")[0] for name in ("int8", "fp16")}
    return [TrtFile(name, path, 18, False, {}) for name, path in paths.items()]


@pytest.fixture
def l4():
    table = {"name": "l4", "description": "", "device": "gpu", "runtime": "tensorrt", "tensorrt": {"version": "10.3"}}
    return Profile.model_validate(table)


INPUTS = {"image": np.ones((2, 1, 4, 4), np.float32)}


@without_tensorrt
def test_building_without_tensorrt_says_how_to_get_it_and_what_is_kept(files, l4, tmp_path):
    with pytest.raises(MissingExtra) as error:
        build_engines(files, l4, tmp_path, INPUTS)
    text = str(error.value)
    assert "TensorRT does not run here: not installed" in text
    assert "edgekd[trt]" in text
    assert "kept: model.int8.onnx, model.fp16.onnx" in text
    assert error.value.exit_code == 3
    assert not list(tmp_path.glob("*.engine*"))


@without_tensorrt
@pytest.mark.parametrize("suffix", [".engine", ".onnx"])
def test_opening_an_engine_without_tensorrt_says_how_to_get_it(files, tmp_path, suffix):
    write_engine(tmp_path / "model.int8.engine", b"machine code", files[0].path, **KNOWN)
    with pytest.raises(MissingExtra, match="not installed"):
        open_session(tmp_path / f"model.int8{suffix}", runtime="tensorrt")


def test_a_broken_tensorrt_is_told_and_does_not_end_the_process(files, l4, tmp_path, monkeypatch):
    """What a wheel without its libraries does: its import raises something of its own."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/tensorrt.py").write_text("raise Exception('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    with pytest.raises(StageError, match=r"libnvinfer\.so\.10") as error:
        build_engines(files, l4, tmp_path, INPUTS)
    assert "kept: model.int8.onnx" in str(error.value)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime was built with CUDA"
)
def test_onnx_runtime_without_cuda_says_which_package_has_it(files):
    with pytest.raises(MissingExtra, match="built without CUDAExecutionProvider") as error:
        open_session(files[0].path, runtime="onnxruntime-cuda")
    assert "onnxruntime-gpu" in str(error.value)
    assert error.value.exit_code == 3
