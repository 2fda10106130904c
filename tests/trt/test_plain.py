"""The float sibling of a Q/DQ file is the network that the integers were made of."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_files import digits, outputs, small_file

from edgekd.errors import StageError
from edgekd.trt import without_integers


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("bias", ["float", "int32"])
def test_it_computes_what_a_float_file_of_the_same_weights_computes(dtype: type, bias: str) -> None:
    quantized = small_file(True, dtype=dtype, bias=bias)
    before = quantized.SerializeToString()
    plain, expected = without_integers(quantized), small_file(False)
    assert quantized.SerializeToString() == before
    assert [n.op_type for n in plain.graph.node] == [n.op_type for n in expected.graph.node]
    assert [n.name for n in plain.graph.node if n.op_type == "Conv"] == ["conv1", "conv2"]
    assert {t.data_type for t in plain.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}
    assert len(plain.graph.initializer) == len(expected.graph.initializer)
    np.testing.assert_array_equal(outputs(plain, digits()), outputs(expected, digits()))
    assert np.abs(outputs(quantized, digits()) - outputs(plain, digits())).max() > 0


def test_the_axis_of_the_channels_is_that_of_the_file() -> None:
    integers = np.arange(-3, 3, dtype=np.int8).reshape(2, 3)
    scales = np.asarray([0.5, 1.0, 2.0], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["f"], axis=1),
            helper.make_node("MatMul", ["x", "f"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(integers, "w"), numpy_helper.from_array(scales, "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = outputs(without_integers(model), np.eye(2, dtype=np.float32))
    np.testing.assert_array_equal(found, integers * scales)


def parsed(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[2, 3] x) => (float[N, M] y)'
        f" <float s = {{0.1}}, uint8 z = {{100}}> {{ q = QuantizeLinear(x, s, z) {body} }}"
    )


def test_integers_that_are_moved_are_moved_as_floats_and_padded_with_the_value_of_the_integer() -> None:
    plain = without_integers(
        parsed(
            "pads = Constant<value_ints = [0, 1, 0, 0]>() v = Constant<value = uint8 {105}>()"
            " p = Pad(q, pads, v) t = Transpose(p) y = DequantizeLinear(t, s, z)"
        )
    )
    assert [n.op_type for n in plain.graph.node] == ["Pad", "Transpose", "Identity"]
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    np.testing.assert_array_equal(outputs(plain, x), np.pad(x, ((0, 0), (1, 0)), constant_values=np.float32(0.5)).T)


def test_other_work_on_integers_is_refused_with_the_name_of_the_node() -> None:
    model = parsed("i = Cast<to = 6>(q) a = Add(i, i) y = Cast<to = 1>(a)")
    model.graph.node[1].name = "the cast"
    with pytest.raises(StageError, match=r"the cast \(Cast\) computes with integers"):
        without_integers(model)
    integers = "1, 2, 3, 4, 5, 6, 7, 8, 9"
    model = parsed(
        f"w = Constant<value = uint8[3, 3] {{{integers}}}>() m = QLinearMatMul(q, s, z, w, s, z, s, z)"
        " y = DequantizeLinear(m, s, z)"
    )
    with pytest.raises(StageError, match="QLinearMatMul"):
        without_integers(model)


def test_a_scale_that_is_calculated_is_refused() -> None:
    model = parsed("m = ReduceMax<keepdims = 0>(x) r = QuantizeLinear(x, m, z) y = DequantizeLinear(r, m, z)")
    with pytest.raises(StageError, match="a scale that is calculated"):
        without_integers(model)


def test_a_float_file_stays_as_it_is() -> None:
    model = small_file(False)
    np.testing.assert_array_equal(outputs(without_integers(model), digits()), outputs(model, digits()))
