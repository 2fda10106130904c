"""Typed float16 files: types of every tensor, values against true float16 arithmetic, and what float16 cannot hold."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from small_files import digits, outputs, small_file

from edgekd.errors import StageError
from edgekd.onnx_edit import opset_of
from edgekd.trt import in_half


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of each tensor by its name."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in inferred.initializer}


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def parsed(body: str, inputs: str = "float[2, 3] x", output: str = "float[2, 3] y", opset: int = 18):
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({output}) {body}')


@pytest.mark.parametrize("quantized", [False, True])
def test_layers_are_float16_sums_are_float32_and_so_are_both_ends(quantized: bool) -> None:
    model = small_file(quantized)
    before = model.SerializeToString()
    half = in_half(model)
    assert model.SerializeToString() == before
    found = types(half)
    assert (found["image"], found["logits"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    for node in [*nodes(half, "Conv"), *nodes(half, "Gemm"), *nodes(half, "Add"), *nodes(half, "Relu")]:
        assert {found[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}, node.name
    (mean,) = nodes(half, "ReduceMean")
    assert {found[mean.input[0]], found[mean.output[0]]} == {TensorProto.FLOAT}
    assert opset_of(half) == (19 if quantized else 18)
    assert len(nodes(half, "Cast")) == 4  # into the file, around the mean, out of the file
    if quantized:
        for node in [*nodes(half, "QuantizeLinear"), *nodes(half, "DequantizeLinear")]:
            assert found[node.input[1]] == TensorProto.FLOAT16
        weights = {name: value for name, value in stored(half).items() if name.endswith(".weight")}
        assert {value.dtype for value in weights.values()} == {np.dtype(np.int8)}
        for name, value in weights.items():
            np.testing.assert_array_equal(value, stored(model)[name])


def test_outputs_are_those_of_float32_to_eleven_bits_in_onnx_runtime_and_in_float16_arithmetic() -> None:
    model = small_file(False)
    half, expected = in_half(model), outputs(model, digits())
    (true,) = ReferenceEvaluator(half).run(None, {"image": digits()})  # NumPy, rounding after every operator
    for found in (outputs(half, digits()), true):
        assert found.dtype == np.float32
        difference = np.abs(found - expected).max()
        assert 0 < difference < 2**-8 * np.abs(expected).max()


def test_integers_of_a_typed_file_give_what_those_of_the_float_one_give() -> None:
    model = small_file(True)
    expected, found = outputs(model, digits()), outputs(in_half(model), digits())
    moved = np.abs(outputs(small_file(False), digits()) - expected).max()  # by quantization itself
    assert 0 < np.abs(found - expected).max() < 2 * moved
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9


def test_a_long_mean_would_be_wrong_in_float16() -> None:
    """Why sums stay float32: 4096 values of 30 add up to twice what float16 holds."""
    body = "{ axes = Constant<value_ints = [1]>() y = ReduceMean<keepdims = 0>(x, axes) }"
    half = in_half(parsed(body, "float[2, 4096] x", "float[2] y"))
    x = np.full((2, 4096), 30, np.float32)
    with np.errstate(over="ignore"):
        assert np.isinf(x.astype(np.float16).sum(1, dtype=np.float16)).all()
    np.testing.assert_array_equal(outputs(half, x), [30, 30])
    assert types(half)[nodes(half, "ReduceMean")[0].input[0]] == TensorProto.FLOAT


def test_an_epsilon_that_float16_would_make_zero_keeps_its_node_in_float32() -> None:
    half = in_half(parsed("{ e = Constant<value_float = 1e-9>() d = Add(x, e) y = Div(x, d) }"))
    found = types(half)
    assert {found[name] for name in nodes(half, "Add")[0].input} == {TensorProto.FLOAT}
    assert found[nodes(half, "Div")[0].input[0]] == TensorProto.FLOAT16
    np.testing.assert_array_equal(outputs(half, np.ones((2, 3), np.float32)), np.ones((2, 3)))


def test_bytes_go_in_as_they_are() -> None:
    body = "{ f = Cast<to = 1>(x) s = Constant<value_float = 255.0>() y = Div(f, s) }"
    half = in_half(parsed(body, "uint8[2, 3] x"))
    assert types(half)["x"] == TensorProto.UINT8
    assert [node.attribute[0].i for node in nodes(half, "Cast")] == [TensorProto.FLOAT16, TensorProto.FLOAT]
    x = np.asarray([[0, 51, 102], [153, 204, 255]], np.uint8)
    np.testing.assert_allclose(outputs(half, x), x / 255, atol=2**-12)


def test_layer_normalization_and_softmax_are_float16_where_statistics_are_float32_by_definition() -> None:
    body = "{ s = Constant<value_floats = [1.0, 2.0, 3.0]>() n = LayerNormalization(x, s) y = Softmax(n) }"
    half = in_half(parsed(body))
    found = types(half)
    for kind in ("LayerNormalization", "Softmax"):
        assert found[nodes(half, kind)[0].output[0]] == TensorProto.FLOAT16
    kept = in_half(parsed(body.replace("LayerNormalization(", "LayerNormalization<stash_type = 10>(")))
    assert types(kept)[nodes(kept, "LayerNormalization")[0].output[0]] == TensorProto.FLOAT


def test_a_weight_beyond_float16_is_named() -> None:
    model = small_file(False)
    weight = next(t for t in model.graph.initializer if t.name == "conv2.weight")
    value = numpy_helper.to_array(weight).copy()
    value[0, 0, 0, 0] = 70000
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    with pytest.raises(StageError, match=r"conv2.weight: conv2.weight holds 7e\+04, beyond float16's 65504"):
        in_half(model)


def test_control_flow_is_refused() -> None:
    body = (
        "{ yes = Constant<value = bool {1}>() y = If(yes) <then_branch = t () => (float[2, 3] p) { p = Relu(x) },"
        " else_branch = e () => (float[2, 3] q) { q = Identity(x) }> }"
    )
    with pytest.raises(StageError, match="branches"):
        in_half(parsed(body))


def rescaled(name: str, position: int | None, scale: float) -> onnx.ModelProto:
    """The Q/DQ file with one of its scales replaced."""
    model = small_file(True)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value = numpy_helper.to_array(tensor).copy()
    value[() if position is None else position] = scale
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return model


@pytest.mark.parametrize("scale", [1e-9, 3e-8, 1.3e-6, 2.9e-5])
def test_channels_of_tiny_weights_keep_a_scale_above_zero_and_their_values(scale: float) -> None:
    """float16 has nothing between 0 and 6e-8, and TensorRT refuses a scale of 0."""
    model = rescaled("conv2.scales", 3, scale)
    before, after = stored(model), stored(in_half(model))
    scales = after["conv2.scales"].astype(np.float64)
    assert (scales > 0).all()
    assert (scales >= before["conv2.scales"]).all()  # up, so that no value is clipped
    np.testing.assert_allclose(np.delete(scales, 3), np.delete(before["conv2.scales"], 3), rtol=2**-10)
    expected = before["conv2.weight"][3] * float(before["conv2.scales"][3])
    found = after["conv2.weight"][3] * scales[3]
    assert np.abs(found - expected).max() <= max(0.5 * scales[3], 2**-10 * np.abs(expected).max())


def test_an_activation_too_small_for_float16_is_named() -> None:
    model = small_file(True)
    quantizer = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "image")
    with pytest.raises(StageError, match=f"the scale 1e-06 of {quantizer.input[0]} is too small for float16"):
        in_half(rescaled(quantizer.input[1], None, 1e-6))


def test_int32_biases_become_float16() -> None:
    half = in_half(small_file(True, bias="int32"))
    assert {t.data_type for t in half.graph.initializer} == {TensorProto.INT8, TensorProto.FLOAT16, TensorProto.INT64}
    expected, found = outputs(small_file(True), digits()), outputs(half, digits())
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
