"""What is told of layers in other tools' conventions: precision, kernels, errors, and why they are float."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from quantized_graphs import (
    Graph,
    chain_of_convolutions,
    convolution,
    dynamic_product,
    integer_convolution,
    product,
)

from edgekd.explain import Explanation, explain_file, explanation_text
from edgekd.explain.constants import Graph as Read
from edgekd.explain.kernels import Kernel
from edgekd.explain.reasons import BY_CHOICE, SIGNED, reasons
from edgekd.explain.stored import stored_layers
from edgekd.profile import load_profile

PROFILE = load_profile("cpu-x86")
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def explained(path: Path, against: Path | None = None) -> Explanation:
    return explain_file(path, PROFILE, against)


def db(reference: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """SQNR as a mean of squares over a mean of squares."""
    return float(20 * np.log10(np.linalg.norm(reference) / np.linalg.norm(reference - found)))


CONVOLUTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "int8", ""),
    ({"per_channel": False}, "int8", ""),
    ({"weight": "u8"}, "int8", ""),
    ({"bias": "int32"}, "int8", ""),
    ({"between": "Relu", "zero_point": 0}, "int8", ""),
    ({"quantized_input": False}, "float", "its input has no Q/DQ"),
    ({"quantized_output": False}, "float", "its output has no Q/DQ: Sigmoid reads it in float"),
    ({"quantized_weight": False, "quantized_output": False}, "float", "its weight has no Q/DQ"),
    ({"quantized_input": False, "quantized_weight": False}, "float", "not quantized: neither its input nor its weight"),
    ({"tapped": True}, "float", "its output has no Q/DQ: it is an output of the network"),
    ({"between": "Relu"}, "float", "the Relu behind it needs a Q with zero point 0, not 128"),
    ({"between": "HardSwish"}, "float", "HardSwish stands between its output and the Q"),
    ({"between": "BatchNormalization"}, "float", "BatchNormalization stands between its output and the Q"),
    ({"bias": "float", "quantized_output": False}, "float", "its bias is not int32 behind a DQ"),
    ({"op": "ConvTranspose"}, "float", "ONNX Runtime has no integer ConvTranspose on CPUs"),
]


@pytest.mark.parametrize(("variant", "runs", "reason"), CONVOLUTIONS)
def test_a_convolution_is_integer_or_it_is_said_why_not(
    variant: dict[str, Any], runs: str, reason: str, tmp_path: Path
) -> None:
    (row,) = explained(convolution(tmp_path / "a.onnx", **variant)).layers
    assert (row.node, row.runs) == ("the_layer", runs)
    assert (row.why_float == []) == (runs == "int8")
    assert any(text.startswith(reason) for text in row.why_float) or not reason
    assert row.macs == 8 * 8 * 8 * 8 * 3 * 3
    assert row.ms is not None
    assert row.kernel in (("QLinearConv",) if runs == "int8" else ("Conv", "FusedConv", "ConvTranspose"))


PRODUCTS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "QLinearMatMul", ""),
    ({"quantized_output": False}, "MatMulIntegerToFloat", ""),
    ({"quantized_weight": False}, "MatMul", "its weight has no Q/DQ"),
    ({"computed_weight": True}, "FusedMatMul", "its weight is computed, not a constant"),
    ({"op": "Gemm", "bias": "int32", "quantized_output": False}, "QGemm", ""),
    ({"op": "Gemm", "bias": "float"}, "QGemm", ""),
    ({"op": "Gemm", "bias": "float", "quantized_output": False}, "FusedGemm", "its bias is not int32 behind a DQ"),
    ({"op": "Gemm", "bias": "int32", "beta": 0.5}, "Gemm", "its factors alpha and beta are not 1"),
]


@pytest.mark.parametrize(("variant", "kernel", "reason"), PRODUCTS)
def test_a_product_is_integer_or_it_is_said_why_not(
    variant: dict[str, Any], kernel: str, reason: str, tmp_path: Path
) -> None:
    (row,) = explained(product(tmp_path / "a.onnx", **variant)).layers
    assert row.kernel == kernel
    assert [text[: len(reason)] for text in row.why_float] == ([reason] if reason else [])
    assert row.input == [4, 16]
    if not variant.get("computed_weight"):
        assert (row.weight, row.parameters, row.macs) == ([16, 8], 128, 4 * 16 * 8)


@pytest.mark.skipif(not ON_X86, reason="signed activations are what ARM wants")
def test_signed_activations_are_fused_on_x86_only_where_one_layer_reads_them(tmp_path: Path) -> None:
    (alone,) = explained(convolution(tmp_path / "a.onnx", activation="s8")).layers
    assert (alone.runs, alone.why_float) == ("int8", [])
    found = explained(convolution(tmp_path / "b.onnx", activation="s8", twice=True))
    assert (found.layers[0].runs, found.layers[0].why_float) == ("float", [SIGNED])
    assert found.summary.hint == 'quantize with unsigned activations: scheme = "x86-u8s8"'
    (unsigned,) = explained(convolution(tmp_path / "c.onnx", twice=True)).layers
    assert unsigned.runs == "int8"


def test_signed_activations_are_no_reason_elsewhere(tmp_path: Path) -> None:
    model = onnx.load(convolution(tmp_path / "a.onnx", activation="s8", twice=True))
    graph = Read(model)
    (layer,) = stored_layers(model, graph)
    assert reasons(layer, graph, Kernel("Conv", "float"), "x86_64") == [SIGNED]
    assert SIGNED not in reasons(layer, graph, Kernel("Conv", "float"), "aarch64")


def test_scales_per_channel_of_an_activation_are_told_with_the_runtimes_words(tmp_path: Path) -> None:
    found = explained(convolution(tmp_path / "a.onnx", scale=[0.01 * (i + 1) for i in range(8)]))
    assert found.layers[0].stored_input is not None
    assert found.layers[0].stored_input.per_channel
    assert "scale per channel" in " ".join(found.notes)
    assert found.measured["origin"] == "not measured"
    assert found.layers[0].ms is None
    assert "QLinearConv" in found.measured["why"]
    assert "edgekd0" not in found.measured["why"]  # the file's own names, not those it was run under
    assert "not measured: ONNX Runtime failed" in explanation_text(found)


def test_a_layer_that_edgekd_kept_float_is_told_as_a_choice(tmp_path: Path) -> None:
    """Equal scales per channel keep ONNX Runtime from quantizing a float weight, which it does behind a single one."""
    (row,) = explained(convolution(tmp_path / "a.onnx", scale=[0.02] * 8, quantized_weight=False)).layers
    assert (row.runs, row.why_float) == ("float", [BY_CHOICE])
    (row,) = explained(convolution(tmp_path / "b.onnx", quantized_weight=False)).layers
    assert (row.runs, row.why_float, row.stored_weight) == ("int8", [], None)


def test_a_range_is_what_the_integers_can_stand_for(tmp_path: Path) -> None:
    (row,) = explained(convolution(tmp_path / "a.onnx", between="Relu", zero_point=0)).layers
    assert row.stored_input is not None
    assert row.stored_weight is not None
    assert row.stored_output is not None
    # u8 with scale 0.02 and zero point 128, and with scale 0.05 and zero point 0
    assert (row.stored_input.dtype, row.stored_input.zero_point) == ("u8", 128)
    assert row.stored_input.low == pytest.approx(-2.56)
    assert row.stored_input.high == pytest.approx(2.54)
    assert (row.stored_output.low, row.stored_output.high) == (0, pytest.approx(12.75))
    assert (row.stored_weight.dtype, row.stored_weight.per_channel, row.stored_weight.zero_point) == ("s8", True, 0)


def test_qoperator_files_are_read_as_those_with_pairs(tmp_path: Path) -> None:
    path, weight = integer_convolution(tmp_path / "a.onnx")
    float_file = Graph()
    y = float_file.add("Conv", ["x", float_file.constant("w", weight)], "the_layer", pads=[1, 1, 1, 1])
    against = float_file.save(tmp_path / "float.onnx", y)
    (row,) = explained(path, against).layers
    assert (row.op, row.runs, row.kernel, row.why_float, row.bias) == (
        "QLinearConv",
        "int8",
        "QLinearConv",
        [],
        "int32",
    )
    assert row.stored_input is not None
    assert (row.stored_input.low, row.stored_input.high) == (pytest.approx(-2.0), pytest.approx(3.1))
    scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    assert row.weight_sqnr_db == pytest.approx(db(weight, np.round(weight / scale) * scale), abs=0.01)
    assert row.float_ms is not None


def test_dynamic_quantization_is_read_with_the_scale_of_its_weight(tmp_path: Path) -> None:
    path, weight = dynamic_product(tmp_path / "a.onnx")
    float_file = Graph((4, 16))
    against = float_file.save(
        tmp_path / "float.onnx", float_file.add("MatMul", ["x", float_file.constant("w", weight)], "the_layer")
    )
    (row,) = explained(path, against).layers
    assert (row.runs, row.why_float) == ("int8", [])
    assert row.kernel in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger")
    assert row.stored_input is not None
    assert (row.stored_input.dtype, row.stored_input.scale) == ("u8", None)  # found anew in each call
    scale = np.float32(np.abs(weight).max() / 127)
    assert row.weight_sqnr_db == pytest.approx(db(weight, np.round(weight / scale) * scale), abs=0.01)


def test_a_float_weight_that_is_quantized_when_loaded_has_its_error_told(tmp_path: Path) -> None:
    g = Graph((4, 16))
    weight = g.random_weight(16, 8)
    g.constant("w", weight)
    w = g.pair("w", "s8", np.abs(weight).max() / 127)
    path = g.save(tmp_path / "a.onnx", g.add("MatMul", [g.pair("x"), w], "the_layer"))
    (row,) = explained(path).layers
    assert row.runs == "int8"
    scale = np.float32(np.abs(weight).max() / 127)
    assert row.weight_sqnr_db == pytest.approx(db(weight, np.round(weight / scale) * scale), abs=0.01)


@pytest.mark.parametrize("names", [True, False])
def test_layers_are_found_again_whatever_the_runtime_calls_them(names: bool, tmp_path: Path) -> None:
    """ONNX Runtime renames blocked and integer convolutions; nodes without a name give it nothing to start from."""
    for quantized in (True, False):
        found = explained(chain_of_convolutions(tmp_path / "a.onnx", quantized=quantized, names=names))
        assert [row.runs for row in found.layers] == ["int8" if quantized else "float"] * 4
        assert [row.weight for row in found.layers] == [[16, 8, 1, 1], [8, 16, 1, 1]] * 2
        assert all(row.ms is not None and row.macs == 6 * 6 * 16 * 8 for row in found.layers)
        assert (found.summary.macs, found.summary.parameters) == (4 * 6 * 6 * 16 * 8, 4 * 16 * 8)


def test_shares_of_the_time_add_up(tmp_path: Path) -> None:
    found = explained(chain_of_convolutions(tmp_path / "a.onnx", quantized=True))
    s = found.summary
    assert sum(s.shares.values()) == pytest.approx(1.0)
    assert s.shares["int8"] == pytest.approx(sum(row.share or 0.0 for row in found.layers))
    assert s.shares["float"] == 0
    assert s.shares["conversion"] > 0
    assert (s.int8_layers, s.float_layers, s.other_layers, s.hint) == (4, 0, 0, None)


def test_a_float_file_of_the_same_network_gives_errors_and_times(tmp_path: Path) -> None:
    against = chain_of_convolutions(tmp_path / "float.onnx", quantized=False, names=False)
    found = explained(chain_of_convolutions(tmp_path / "int8.onnx", quantized=True), against)
    weights = [numpy_helper.to_array(t) for t in onnx.load(against).graph.initializer if len(t.dims) == 4]
    for row, weight in zip(found.layers, weights, strict=True):
        scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
        assert row.weight_sqnr_db == pytest.approx(db(weight, np.round(weight / scale) * scale), abs=0.01)
        assert row.float_ms is not None
    assert found.summary.float_parent_ms is not None
    other = convolution(tmp_path / "other.onnx", quantized_input=False, quantized_weight=False)
    strange = explained(tmp_path / "int8.onnx", other)
    assert all(row.weight_sqnr_db is None for row in strange.layers)
    assert "4 quantized layers have no counterpart" in strange.notes[0]


@pytest.mark.skipif(not ON_X86, reason="signed activations are what ARM wants")
def test_a_file_that_is_placed_for_tensorrt_is_recognised(tmp_path: Path) -> None:
    g = Graph()
    value = "x"
    for i in range(3):
        w = g.weight(f"w{i}", g.random_weight(8, 8, 3, 3))
        value = g.add("Relu", [g.add("Conv", [g.pair(value, "s8"), w], f"conv{i}", pads=[1, 1, 1, 1])])
    found = explained(g.save(tmp_path / "a.onnx", value))
    assert [row.runs for row in found.layers] == ["float"] * 3
    assert found.layers[0].why_float == ["the Relu behind it needs a Q with zero point -128, not 0"]
    assert found.summary.hint is not None
    assert found.summary.hint.startswith("this file is placed for TensorRT")


def test_a_float_file_is_told_as_one(tmp_path: Path) -> None:
    found = explained(chain_of_convolutions(tmp_path / "a.onnx", quantized=False))
    assert {text for row in found.layers for text in row.why_float} == {
        "not quantized: neither its input nor its weight has Q/DQ"
    }
    assert found.summary.hint is not None
    assert found.summary.hint.startswith("this is a float file")


def test_layers_inside_functions_are_listed_and_those_inside_branches_counted(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    function = helper.make_function(
        "local", "Layer", ["a", "b"], ["c"], [helper.make_node("MatMul", ["a", "b"], ["c"], name="inner")],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    tensor = onnx.TensorProto.FLOAT
    branch = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], [f"o{i}"])],
            f"branch{i}",
            [],
            [helper.make_tensor_value_info(f"o{i}", tensor, [4, 8])],
        )
        for i in range(2)
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Layer", ["x", "w"], ["y"], domain="local"),
            helper.make_node("If", ["flag"], ["z"], then_branch=branch[0], else_branch=branch[1]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", tensor, [4, 16])],
        [helper.make_tensor_value_info(name, tensor, [4, 8]) for name in ("y", "z")],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(True), "flag")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9), path)
    found = explained(path)
    assert [(row.op, row.runs, row.weight) for row in found.layers] == [("MatMul", "float", [16, 8])]
    assert found.notes == ["2 matrix layers inside If, Loop or Scan are not listed"]
