"""What of the backend torch-tensorrt needs no GPU: the program it is given, its settings, and what is missing here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.errors import MissingExtra, StageError, UsageError
from edgekd.profile import Profile, TensorRT
from edgekd.trt.torch_tensorrt import (
    build_program,
    build_with_torch_tensorrt,
    exported,
    load_torch_tensorrt,
    settings_of,
)

INPUTS = {"image": np.zeros((2, 1, 8, 8), np.float32)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


def profile(**tensorrt):
    table = {"name": "l4", "description": "", "device": "gpu", "runtime": "tensorrt"}
    return Profile.model_validate({**table, "tensorrt": {"version": "11.1", **tensorrt}})


def test_the_program_takes_and_gives_float32_and_computes_in_half_precision():
    images = torch.randn(5, 1, 8, 8)
    expected = network()(images)
    program = exported(network(), torch.zeros(2, 1, 8, 8), "bf16")
    found = program.module()(images)  # another batch than that of the example
    assert found.dtype == torch.float32
    assert 1e-5 < (found - expected).abs().max() / expected.abs().max() < 3e-2
    convolutions = [n for n in program.graph.nodes if n.op == "call_function" and "conv2d" in str(n.target)]
    assert [n.meta["val"].dtype for n in convolutions] == [torch.bfloat16]


def test_a_network_that_branches_on_its_values_is_told():
    class Branching(nn.Module):
        def forward(self, image):
            return image.flatten(1) if image.sum() > 0 else -image.flatten(1)

    with pytest.raises(StageError, match="cannot be exported") as error:
        exported(Branching(), torch.zeros(2, 1, 8, 8), "fp32")
    assert error.value.problem.where == "Branching"


def of_2_14(program, *, optimization_level=None, workspace_size=0, hardware_compatible=False, version_compatible=False,
            timing_cache_path="", require_full_compilation=False, **kwargs):  # fmt: skip
    """The arguments of torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine that matter here."""


def test_the_profile_becomes_arguments_that_this_release_has():
    wanted = TensorRT(version="11.1", workspace_mb=512, optimization_level=4, hardware_compatibility="ampere-plus")
    assert settings_of(wanted, Path("/caches/timing"), of_2_14) == {
        "optimization_level": 4,
        "workspace_size": 512_000_000,
        "hardware_compatible": True,
        "version_compatible": False,
        "timing_cache_path": "/caches/timing",
        "require_full_compilation": True,
    }


@pytest.mark.parametrize("build", [build_with_torch_tensorrt, build_program])
@pytest.mark.parametrize(
    ("tensorrt", "words"),
    [
        ({"hardware_compatibility": "same-compute-capability"}, "one GPU model, or for ampere-plus"),
        ({"dla": 0, "dla_cores": 2}, "from ONNX files only"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(tmp_path, build, tensorrt, words):
    with pytest.raises(UsageError, match=words):
        build(network(), tmp_path / "model.fp32.onnx", profile(**tensorrt), tmp_path, INPUTS)


@pytest.mark.skipif(importlib.util.find_spec("torch_tensorrt") is not None, reason="Torch-TensorRT is here")
@pytest.mark.parametrize("build", [build_with_torch_tensorrt, build_program])
def test_without_it_how_to_get_it_is_told(tmp_path, build):
    with pytest.raises(MissingExtra, match="Torch-TensorRT does not run here: not installed") as error:
        build(network(), tmp_path / "model.fp32.onnx", profile(), tmp_path, INPUTS)
    assert "edgekd[trt]" in str(error.value)


@pytest.mark.parametrize("raised", ["Exception('no CUDA')", "AssertionError('no CUDA')", "OSError('no CUDA')"])
def test_an_import_that_fails_in_its_own_way_is_a_message(tmp_path, monkeypatch, raised):
    (tmp_path / "torch_tensorrt.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StageError, match=r"installed, but does not work: .*no CUDA"):
        load_torch_tensorrt()
