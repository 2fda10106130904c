"""Which files of an export a profile measures, and in what precision a file says that it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifact import Artifact, Manifest, ModelSpec, Preprocessing, finish, writing
from edgekd.candidates import Candidate, arranged
from edgekd.onnx_file import stored_precision
from edgekd.profile import load_profile
from edgekd.trt import in_half

ORIN, L4, CPU = (load_profile(name) for name in ("jetson-orin-nano-8gb", "gpu-l4", "cpu-x86"))


def written(directory: Path, forms: list[str]) -> Candidate:
    """An export with files for TensorRT; what is in them does not matter here."""
    with writing(directory) as made:
        for name in ("model.onnx", *(f"model.{form}.onnx" for form in forms)):
            (made / name).write_bytes(name.encode())
        rows = {form: {"file": f"model.{form}.onnx", "opset": 17, "strongly_typed": False} for form in forms}
        plain = Preprocessing(size=[1, 8, 8], mean=[0.0], std=[1.0])
        model, metrics = ModelSpec(use="cifar-resnet"), {"tensorrt": rows}
        finish(made, Manifest(kind="export", key="0", model=model, preprocessing=plain, classes=["a"], metrics=metrics))
    artifact = Artifact.open(directory)
    return Candidate("quantize", artifact.file("model.onnx"), artifact, "trt-s8s8", takes="all")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    return written(tmp_path_factory.mktemp("quantized") / "export", ["int8", "int8-fp16", "fp16", "fp32"])


def test_where_tensorrt_runs_every_form_is_measured_and_its_own_int8_is_judged(quantized: Candidate) -> None:
    teacher = Candidate("teacher", Path("teacher.onnx"), None)
    found = arranged([teacher, quantized], ORIN)
    assert [(c.name, c.file.name) for c in found] == [
        ("teacher", "teacher.onnx"),
        ("quantize.fp32", "model.fp32.onnx"),
        ("quantize.fp16", "model.fp16.onnx"),
        ("quantize.int8", "model.int8.onnx"),
    ]
    assert [c.scheme for c in found] == [None, None, None, "trt-s8s8"]
    assert [c.key for c in found] == ["", "0", "0", "0"]
    typed = arranged([teacher, quantized], L4)
    assert [c.name for c in typed[1:]] == ["quantize.fp32", "quantize.fp16", "quantize.int8-fp16"]


def test_elsewhere_and_where_one_file_was_named_it_is_that_file(quantized: Candidate) -> None:
    assert arranged([quantized], CPU) == [quantized]
    named = replace(quantized, takes="this")
    assert arranged([named], ORIN) == [named]


@pytest.mark.parametrize(("profile", "file"), [(ORIN, "model.int8.onnx"), (L4, "model.int8-fp16.onnx")])
def test_a_baseline_is_the_file_that_is_judged_under_its_own_name(quantized: Candidate, profile, file) -> None:
    (found,) = arranged([replace(quantized, name="baseline", takes="own")], profile)
    assert (found.name, found.file.name) == ("baseline", file)


def test_a_dla_takes_fp16_alone(quantized: Candidate) -> None:
    assert ORIN.tensorrt is not None
    dla = ORIN.model_copy(update={"tensorrt": ORIN.tensorrt.model_copy(update={"dla": 0, "dla_cores": 1})})
    assert [c.name for c in arranged([quantized], dla)] == ["quantize.fp16"]


def test_of_a_float_export_fp16_is_judged(tmp_path: Path) -> None:
    found = arranged([replace(written(tmp_path / "export", ["fp16", "fp32"]), branch="")], ORIN)
    assert [c.name for c in found] == ["quantize.fp32", "quantize.fp16"]


def test_an_export_without_files_for_tensorrt_is_measured_as_it_is(tmp_path: Path) -> None:
    plain = written(tmp_path / "export", [])
    assert arranged([plain], ORIN) == [plain]


def product(quantized: bool) -> onnx.ModelProto:
    """x [1, 4] times a weight [4, 4], both through Q/DQ or not."""
    constants = {"w": np.eye(4, dtype=np.float32), "s": np.float32(0.1), "z": np.int8(0)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "m")]
    if quantized:
        constants["w"] = np.eye(4, dtype=np.int8)
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], "dq"),
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wdq"], "wdq"),
            helper.make_node("MatMul", ["dq", "wdq"], ["y"], "m"),
        ]
    kept = constants if quantized else {"w": constants["w"]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in kept.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize(
    ("quantized", "half", "expected"),
    [(False, False, "fp32"), (False, True, "fp16"), (True, False, "int8"), (True, True, "int8+fp16")],
)
def test_a_file_says_its_precision(tmp_path: Path, quantized: bool, half: bool, expected: str) -> None:
    model = product(quantized)
    onnx.save(in_half(model) if half else model, tmp_path / "m.onnx")
    assert stored_precision(tmp_path / "m.onnx") == expected
