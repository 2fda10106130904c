"""Small ONNX files that are wrong for TensorRT on purpose, each with the rule that must say so and what happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

__all__ = ["RIGHT_FILES", "WRONG_FILES", "Net", "WrongFile"]

Array = np.ndarray[Any, Any]
F = np.float32
I8 = np.int8
SCALE, ZERO = F(0.02), I8(0)
PADS = {"pads": [1] * 4}
IMAGE = (1, 8, 8, 8)


class Net:
    """Collects nodes and constants; every method that adds one returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.random = np.random.default_rng(0)

    def input(self, name: str = "x", shape: tuple[int | str, ...] = IMAGE, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        given = [f"{name}_out{i}" if i else f"{name}_out" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), given, name=name, **attributes))
        return given[0]

    def quantize(self, x: str, scale: Any = SCALE, zero: Any = ZERO, **attributes: Any) -> str:
        given = [x, scale if isinstance(scale, str) else self.constant(scale)]
        return self.add("QuantizeLinear", *given, *([] if zero is None else [self.constant(zero)]), **attributes)

    def dequantize(self, x: str, scale: Any = SCALE, zero: Any = ZERO, **attributes: Any) -> str:
        given = [x, scale if isinstance(scale, str) else self.constant(scale)]
        return self.add("DequantizeLinear", *given, *([] if zero is None else [self.constant(zero)]), **attributes)

    def pair(self, x: str, scale: Any = SCALE, zero: Any = ZERO, **attributes: Any) -> str:
        return self.dequantize(self.quantize(x, scale, zero, **attributes), scale, zero, **attributes)

    def weight(
        self, *shape: int, axis: int = 0, scale: Any = None, zero: int = 0, dtype: Any = I8, name: str = ""
    ) -> str:
        """A stored integer weight with one scale per index of `axis`, dequantized."""
        scale = np.full(shape[axis], 0.01, F) if scale is None else np.asarray(scale)
        integers = self.random.integers(0, 100, shape).astype(dtype)
        return self.dequantize(self.constant(integers, name), scale, np.full(scale.shape, zero, dtype), axis=axis)

    def float_weight(self, *shape: int) -> str:
        return self.constant(self.random.normal(size=shape).astype(F))

    def conv(self, x: str, channels: int = 16, inputs: int = 8, name: str = "conv") -> str:
        """Pair, weight and a float bias: as it should be."""
        bias = self.constant(np.ones(channels, F))
        return self.add("Conv", self.pair(x), self.weight(channels, inputs, 3, 3), bias, name=name, **PADS)

    def model(self, *outputs: str, opset: int = 17, dtype: int = TensorProto.FLOAT) -> ModelProto:
        given = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, given, self.constants)
        domains = {node.domain for node in self.nodes if node.domain}
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        model = helper.make_model(graph, opset_imports=imports, functions=self.functions)
        model.ir_version = 8
        return model


class WrongFile(NamedTuple):
    """`does`: what TensorRT-RTX does. "misread": it builds, and calculates other values than the file says.

    "builds": only the TensorRT `version` is known to refuse it. `layer`: the node that is not int8.
    """

    name: str
    build: Callable[[], ModelProto]
    rule: str
    does: Literal["refused", "float", "misread", "builds"]
    layer: str
    version: str | None


WRONG_FILES: list[WrongFile] = []
RIGHT_FILES: dict[str, Callable[[], ModelProto]] = {}
Build = Callable[[Net], Any]


def wrong(
    rule: str,
    does: Literal["refused", "float", "misread", "builds"],
    layer: str = "conv",
    version: str | None = None,
    **options: Any,
) -> Callable[[Build], Build]:
    """Register a function that adds nodes to a net and returns its output, or outputs."""

    def register(build: Build) -> Build:
        WRONG_FILES.append(WrongFile(build.__name__, lambda: _built(build, options), rule, does, layer, version))
        return build

    return register


def right(**options: Any) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        RIGHT_FILES[build.__name__] = lambda: _built(build, options)
        return build

    return register


def _built(build: Build, options: dict[str, Any]) -> ModelProto:
    net = Net()
    outputs = build(net)
    return net.model(*([outputs] if isinstance(outputs, str) else outputs), **options)


def _conv(net: Net, x: str, weight: str = "", *bias: str, **attributes: Any) -> str:
    return net.add("Conv", x, weight or net.weight(16, 8, 3, 3), *bias, name="conv", **{**PADS, **attributes})


# Quantizing nodes that TensorRT does not take.


@wrong("zero-point", "refused")
def asymmetric_activations(net: Net) -> str:
    return _conv(net, net.pair(net.input(), zero=I8(5)))


@wrong("zero-point", "refused")
def unsigned_activations(net: Net) -> str:
    return _conv(net, net.pair(net.input(), zero=np.uint8(128)))


@wrong("zero-point", "refused")
def asymmetric_weight(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, zero=3))


@wrong("uint8", "refused")
def unsigned_weight(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, dtype=np.uint8))


@wrong("uint8", "refused")
def unsigned_input(net: Net) -> str:
    return _conv(net, net.dequantize(net.input(dtype=TensorProto.UINT8), zero=np.uint8(0)))


@wrong("uint8", "misread")
def unsigned_activations_from_zero(net: Net) -> str:
    return _conv(net, net.pair(net.input(), zero=np.uint8(0)))


@wrong("uint8", "misread")
def activations_without_zero_point(net: Net) -> str:
    return _conv(net, net.pair(net.input(), zero=None))


@wrong("no-zero-point", "builds", version="8.6")
def weight_without_zero_point(net: Net) -> str:
    integers = net.constant(np.ones((16, 8, 3, 3), I8))
    return _conv(net, net.pair(net.input()), net.dequantize(integers, np.full(16, 0.01, F), None, axis=0))


@wrong("int32-bias", "refused")
def bias_as_onnx_runtime_makes_it(net: Net) -> str:
    bias = net.dequantize(net.constant(np.ones(16, np.int32)), np.full(16, 2e-4, F), np.zeros(16, np.int32), axis=0)
    return _conv(net, net.pair(net.input()), "", bias)


@wrong("data-type", "refused", opset=21)
def sixteen_bits(net: Net) -> str:
    return _conv(net, net.pair(net.input(), zero=np.int16(0)))


@wrong("data-type", "refused", opset=21)
def sixteen_bits_by_attribute(net: Net) -> str:
    quantized = net.add("QuantizeLinear", net.input(), net.constant(F(0.02)), output_dtype=TensorProto.INT16)
    return net.dequantize(quantized, zero=None)


@wrong("data-type", "refused", opset=21)
def unsigned_four_bits(net: Net) -> str:
    net.constants.append(helper.make_tensor("w", TensorProto.UINT4, [32, 16], [0] * 512))
    net.constants.append(helper.make_tensor("z", TensorProto.UINT4, [16], [0] * 16))
    weight = net.add("DequantizeLinear", "w", net.constant(np.full(16, 0.1, F)), "z", axis=1)
    return net.add("MatMul", net.input(shape=(4, 32)), weight, name="fc")


@wrong("scale", "refused")
def dead_channel(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, scale=np.array([0] + [0.01] * 15, F)))


@wrong("scale", "refused")
def negative_scale(net: Net) -> str:
    return _conv(net, net.pair(net.input(), F(-0.02)))


@wrong("scale", "refused")
def scale_not_a_number(net: Net) -> str:
    return _conv(net, net.pair(net.input(), F(np.nan)))


@wrong("scale", "misread")
def infinite_scale(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, scale=np.array([np.inf] + [0.01] * 15, F)))


@wrong("dynamic-scale", "refused")
def dynamic_quantization_by_hand(net: Net) -> str:
    largest = net.add("ReduceMax", net.add("Abs", net.input()), keepdims=0)
    return _conv(net, net.pair("x", net.add("Div", largest, net.constant(F(127)))))


@wrong("dynamic-scale", "refused")
def dynamic_zero_point(net: Net) -> str:
    given = [net.constant(F(0.02)), net.input("z", (), TensorProto.INT8)]
    return _conv(net, net.add("DequantizeLinear", net.add("QuantizeLinear", net.input(), *given), *given))


@wrong("scale-size", "refused")
def fewer_scales_than_channels(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, scale=np.full(15, 0.01, F)))


@wrong("scale-size", "refused")
def one_zero_point_for_all_channels(net: Net) -> str:
    integers = net.constant(np.ones((16, 8, 3, 3), I8))
    weight = net.dequantize(integers, np.full(16, 0.01, F), np.zeros(1, I8), axis=0)
    return _conv(net, net.pair(net.input()), weight)


@wrong("quantized-constant", "refused")
def weight_by_cast_and_multiplication(net: Net) -> str:
    integers = net.add("Cast", net.constant(np.ones((16, 8, 3, 3), I8)), to=TensorProto.FLOAT)
    return _conv(net, net.pair(net.input()), net.add("Mul", integers, net.constant(np.full((16, 1, 1, 1), 0.01, F))))


@wrong("quantized-constant", "refused")
def weight_transposed_before_it_is_dequantized(net: Net) -> str:
    integers = net.add("Transpose", net.constant(np.ones((8, 16, 3, 3), I8)), perm=[1, 0, 2, 3])
    return _conv(net, net.pair(net.input()), net.dequantize(integers, np.full(16, 0.01, F), np.zeros(16, I8), axis=0))


@wrong("mixed-types", "refused", opset=19)
def half_weight_beside_float_input(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, scale=np.full(16, 0.01, np.float16)))


@wrong("half-scale", "builds", version="8.6", dtype=TensorProto.FLOAT16)
def half_scales(net: Net) -> str:
    weight = net.weight(16, 8, 3, 3, scale=np.full(16, 0.01, np.float16))
    return _conv(net, net.pair(net.input(dtype=TensorProto.FLOAT16), np.float16(0.02)), weight)


# Operators, opsets, types.


@wrong("operator", "refused")
def integer_operators(net: Net) -> str:
    scale, zero = net.constant(F(0.02)), net.constant(I8(0))
    quantized = net.add("QuantizeLinear", net.input(), scale, zero)
    weight = [
        net.constant(np.ones((16, 8, 3, 3), I8)),
        net.constant(np.full(16, 0.01, F)),
        net.constant(np.zeros(16, I8)),
    ]
    y = net.add("QLinearConv", quantized, scale, zero, *weight, scale, zero, name="conv", **PADS)
    return net.add("DequantizeLinear", y, scale, zero)


@wrong("operator", "refused")
def dynamic_quantization(net: Net) -> str:
    quantized = net.add("DynamicQuantizeLinear", net.input(), outputs=3, name="dynamic")
    return net.add("DequantizeLinear", quantized, "dynamic_out1", "dynamic_out2")


@wrong("operator", "refused")
def contributed_operator(net: Net) -> str:
    return net.add("FusedConv", net.input(), net.float_weight(16, 8, 3, 3), domain="com.microsoft", **PADS)


@wrong("operator", "refused")
def custom_operator(net: Net) -> str:
    return net.add("Mine", net.conv(net.input()), domain="my.operators")


@wrong("operator", "builds", version="8.6")
def operator_of_later_versions(net: Net) -> str:
    return net.add("Hardmax", net.input())


@wrong("operator-form", "refused")
def dropout_that_trains(net: Net) -> str:
    return net.add("Dropout", net.conv(net.input()), net.constant(F(0.5)), net.constant(np.bool_(True)))


@wrong("operator-form", "refused")
def batch_norm_that_trains(net: Net) -> str:
    ones = [net.constant(np.ones(16, F)) for _ in range(4)]
    return net.add("BatchNormalization", net.conv(net.input()), *ones, training_mode=1, outputs=3)


@wrong("operator-form", "refused")
def pooling_with_indices(net: Net) -> str:
    return net.add("MaxPool", net.conv(net.input()), kernel_shape=[2, 2], outputs=2)


@wrong("operator-form", "refused")
def dilated_pooling(net: Net) -> str:
    return net.add("MaxPool", net.conv(net.input()), kernel_shape=[2, 2], dilations=[2, 2])


@wrong("operator-form", "refused")
def pooling_with_a_cubic_norm(net: Net) -> str:
    return net.add("LpPool", net.conv(net.input()), kernel_shape=[2, 2], p=3)


@wrong("operator-form", "refused", opset=18)
def antialiased_resizing(net: Net) -> str:
    scales = [net.constant(np.array([], F)), net.constant(np.array([1, 1, 0.5, 0.5], F))]
    return net.add("Resize", net.input(), *scales, mode="linear", antialias=1)


@wrong("operator-form", "refused")
def axes_from_an_input(net: Net) -> str:
    return net.add("ReduceSum", net.input(), net.input("axes", (1,), TensorProto.INT64))


@wrong("opset", "builds", version="8.6", opset=18)
def opset_too_new_for_eight(net: Net) -> str:
    return net.conv(net.input())


@wrong("opset", "builds", version="10.3", opset=21)
def opset_too_new_for_ten(net: Net) -> str:
    return net.conv(net.input())


@wrong("input-type", "refused", dtype=TensorProto.STRING)
def text(net: Net) -> list[str]:
    net.conv(net.input())
    return [net.add("Identity", net.input("text", (1,), TensorProto.STRING))]


@wrong("input-type", "refused")
def short_input(net: Net) -> str:
    return net.conv(net.add("Cast", net.input(dtype=TensorProto.INT16), to=TensorProto.FLOAT))


@wrong("input-type", "refused")
def bytes_moved_before_they_are_cast(net: Net) -> str:
    moved = net.add("Transpose", net.input(dtype=TensorProto.UINT8), perm=[0, 3, 1, 2])
    return net.conv(net.add("Cast", moved, to=TensorProto.FLOAT))


@wrong("input-type", "refused")
def bytes_within_the_network(net: Net) -> str:
    return net.add("Cast", net.add("Cast", net.input(), to=TensorProto.UINT8), to=TensorProto.FLOAT)


@wrong("duplicate-names", "refused")
def nodes_of_one_name(net: Net) -> str:
    y = net.conv(net.input())
    for node in net.nodes:
        node.name = node.op_type
    return y


# Placement: it builds, and the layer is float.


@wrong("per-channel-activations", "float")
def activations_by_channel(net: Net) -> str:
    return _conv(net, net.pair(net.input(), np.full(8, 0.02, F), np.zeros(8, I8), axis=1))


@wrong("per-channel-activations", "float", layer="fc")
def activations_by_feature(net: Net) -> str:
    x = net.pair(net.input(shape=(4, 8)), np.full(8, 0.02, F), np.zeros(8, I8), axis=1)
    return net.add("MatMul", x, net.weight(8, 16, axis=1), name="fc")


@wrong("one-element-scale", "float")
def scale_in_a_list(net: Net) -> str:
    return _conv(net, net.pair(net.input(), np.array([0.02], F), np.array([0], I8)))


@wrong("one-side", "float")
def only_the_weight(net: Net) -> str:
    return _conv(net, net.input())


@wrong("one-side", "float")
def only_the_input(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.float_weight(16, 8, 3, 3))


@wrong("one-side", "float", layer="mm")
def only_one_of_two_activations(net: Net) -> str:
    return net.add("MatMul", net.pair(net.input(shape=(2, 4, 8))), net.input("z", (2, 8, 4)), name="mm")


@wrong("weight-axis", "float")
def convolution_by_input_channel(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, axis=1))


@wrong("weight-axis", "float", layer="fc")
def product_by_input_feature(net: Net) -> str:
    return net.add("MatMul", net.pair(net.input(shape=(4, 8))), net.weight(8, 16, axis=0), name="fc")


@wrong("weight-axis", "float", layer="fc")
def transposed_product_by_input_feature(net: Net) -> str:
    weight = net.weight(16, 8, axis=1)
    return net.add("Gemm", net.pair(net.input(shape=(4, 8))), weight, net.constant(np.ones(16, F)), transB=1, name="fc")


@wrong("transposed-convolution", "float", layer="up")
def transposed_convolution(net: Net) -> str:
    return net.add("ConvTranspose", net.pair(net.input()), net.weight(8, 16, 2, 2, axis=1), strides=[2, 2], name="up")


@wrong("operator-between", "float")
def relu_behind_the_pair(net: Net) -> str:
    return _conv(net, net.add("Relu", net.pair(net.conv(net.input(), 8, name="before"))))


@wrong("operator-between", "float")
def average_pooling_behind_the_pair(net: Net) -> str:
    return _conv(net, net.add("AveragePool", net.pair(net.input()), kernel_shape=[2, 2]))


@wrong("operator-between", "float")
def resizing_behind_the_pair(net: Net) -> str:
    scales = [net.constant(np.array([], F)), net.constant(np.array([1, 1, 2, 2], F))]
    return _conv(net, net.add("Resize", net.pair(net.input()), *scales, mode="nearest"))


@wrong("operator-between", "float")
def padding_with_ones(net: Net) -> str:
    widths = net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    return _conv(net, net.add("Pad", net.pair(net.input()), widths, net.constant(F(1))))


@wrong("operator-between", "float")
def padding_of_channels(net: Net) -> str:
    widths = net.constant(np.array([0, 4, 0, 0, 0, 4, 0, 0]))
    return _conv(net, net.add("Pad", net.pair(net.input()), widths), net.weight(16, 16, 3, 3))


@wrong("operator-between", "float")
def factor_by_channel(net: Net) -> str:
    factors = net.constant(np.linspace(0.5, 1, 8, dtype=F).reshape(1, 8, 1, 1))
    return _conv(net, net.add("Mul", net.pair(net.input()), factors))


@wrong("operator-between", "float")
def sum_of_two_pairs(net: Net) -> str:
    return _conv(net, net.add("Add", net.pair(net.input()), net.pair("x", F(0.03))))


@wrong("concat-scales", "float")
def concatenation_of_two_scales(net: Net) -> str:
    parts = [net.pair(net.input()), net.pair(net.add("Abs", "x"), F(0.03))]
    return _conv(net, net.add("Concat", *parts, axis=1), net.weight(16, 16, 3, 3))


@wrong("concat-scales", "float")
def concatenation_with_a_float_part(net: Net) -> str:
    parts = [net.pair(net.input()), net.add("Relu", "x")]
    return _conv(net, net.add("Concat", *parts, axis=1), net.weight(16, 16, 3, 3))


@wrong("residual-add", "float", layer="add")
def float_skip(net: Net) -> str:
    x = net.add("Relu", net.conv(net.input(), 8, name="before"))
    y = net.add("Relu", net.add("Add", net.conv(x, 8, name="within"), x, name="add"))
    return net.conv(y, name="after")


@wrong("residual-add", "float", layer="add")
def float_skip_beside_a_batch_norm(net: Net) -> str:
    x = net.add("Relu", net.conv(net.input(), 8, name="before"))
    norm = [net.constant(np.linspace(0.5, 1, 8, dtype=F)) for _ in range(4)]
    y = net.add("BatchNormalization", net.conv(x, 8, name="within"), *norm)
    return net.conv(net.add("Relu", net.add("Add", x, y, name="add")), name="after")


# Right: every matrix layer is int8, and no rule may speak of one.


@right()
def plain(net: Net) -> str:
    return net.conv(net.input())


@right()
def dynamic_batch_and_relu_before_the_pair(net: Net) -> str:
    x = net.add("Relu", net.conv(net.input(shape=("batch", 8, 8, 8)), 8, name="before"))
    return net.conv(net.add("MaxPool", x, kernel_shape=[2, 2]))


@right()
def pair_on_both_sides_of_relu(net: Net) -> str:
    return net.conv(net.add("Relu", net.pair(net.conv(net.input(), 8, name="before"))))


@right()
def one_pair_for_two_layers_and_a_float_reader(net: Net) -> list[str]:
    x = net.pair(net.input())
    other = net.add("Conv", x, net.weight(4, 8, 1, 1), name="other")
    return [_conv(net, x), other, net.add("Sigmoid", x)]


@right()
def float_layer_that_reads_what_another_reads_as_integers(net: Net) -> list[str]:
    x = net.pair(net.input())
    return [_conv(net, x), net.add("Conv", x, net.float_weight(4, 8, 1, 1), name="head")]


@right()
def values_that_only_move(net: Net) -> str:
    x = net.pair(net.input(), F(0.03))
    x = net.add("MaxPool", net.add("Mul", x, net.constant(F(2))), kernel_shape=[2, 2], strides=[2, 2])
    x = net.add("Transpose", x, perm=[0, 1, 3, 2])
    x = net.add("Concat", x, net.add("Neg", x), axis=1)
    x = net.add("Slice", x, net.constant(np.array([0])), net.constant(np.array([8])), net.constant(np.array([1])))
    x = net.add("Pad", x, net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    return net.add("MatMul", net.add("Flatten", _conv(net, x)), net.float_weight(16 * 36, 4), name="head")


@right(opset=18)
def padding_of_named_axes(net: Net) -> str:
    widths = [net.constant(np.array(v)) for v in ([1, 1, 1, 1], [2, -1])]
    return _conv(net, net.add("Pad", net.pair(net.input()), widths[0], "", widths[1]))


@right()
def weights_quantized_in_the_file(net: Net) -> str:
    weight = net.pair(net.float_weight(16, 8, 3, 3), np.full(16, 0.01, F), np.zeros(16, I8), axis=0)
    return _conv(net, net.pair(net.input()), weight)


@right()
def one_scale_for_the_weight(net: Net) -> str:
    weight = net.dequantize(net.constant(np.ones((16, 8, 3, 3), I8)), np.array([0.01], F), np.array([0], I8))
    return _conv(net, net.pair(net.input()), weight)


@right()
def axis_counted_from_the_end(net: Net) -> str:
    return _conv(net, net.pair(net.input()), net.weight(16, 8, 3, 3, axis=-4))


@right()
def scale_in_a_list_for_a_product(net: Net) -> str:
    x = net.pair(net.input(shape=(4, 8)), np.array([0.02], F), np.array([0], I8))
    return net.add("MatMul", x, net.weight(8, 16, axis=1), name="fc")


@right()
def transposed_weight_of_a_product(net: Net) -> str:
    weight = net.add("Transpose", net.weight(16, 8, axis=0), perm=[1, 0])
    return net.add("MatMul", net.pair(net.input(shape=(2, 4, 8))), weight, name="fc")


@right()
def gemm_both_ways(net: Net) -> str:
    bias = net.constant(np.ones(16, F))
    x = net.add("Gemm", net.pair(net.input(shape=(4, 8))), net.weight(8, 16, axis=1), bias, name="first")
    return net.add("Gemm", net.pair(x), net.weight(4, 16, axis=0), net.constant(np.ones(4, F)), transB=1, name="second")


@right()
def product_of_two_activations(net: Net) -> str:
    x = net.pair(net.input(shape=(2, 4, 8)))
    return net.add("MatMul", x, net.add("Transpose", net.pair("x", F(0.03)), perm=[0, 2, 1]), name="mm")


@right()
def grouped_dilated_and_unevenly_padded(net: Net) -> str:
    x = net.conv(net.input(), 8, name="before")
    x = net.add("Conv", net.pair(x), net.weight(8, 1, 3, 3), group=8, pads=[0, 0, 1, 1], name="depthwise")
    return net.add("Conv", net.pair(x), net.weight(8, 2, 3, 3), group=4, dilations=[2, 2], pads=[2] * 4, name="grouped")


@right()
def quantized_skip(net: Net) -> str:
    x = net.add("Relu", net.conv(net.input(), 8, name="before"))
    y = net.add("Relu", net.add("Add", net.conv(x, 8, name="within"), net.pair(x), name="add"))
    return net.conv(y, name="after")


@right()
def both_sides_of_a_sum_quantized_with_their_own_scales(net: Net) -> str:
    x = net.add("Relu", net.conv(net.input(), 8, name="before"))
    y = net.add("Add", net.pair(net.conv(x, 8, name="within"), F(0.05)), net.pair(x), name="add")
    return net.conv(net.add("Relu", y), name="after")


@right()
def parameters_as_constant_nodes_and_identities(net: Net) -> str:
    scale = net.add("Identity", net.add("Constant", value=numpy_helper.from_array(F(0.02))))
    zero = net.add("Identity", net.add("Constant", value=numpy_helper.from_array(I8(0))))
    return _conv(net, net.add("DequantizeLinear", net.add("QuantizeLinear", net.input(), scale, zero), scale, zero))


@right()
def raw_bytes_normalised_in_the_file(net: Net) -> str:
    x = net.add("Cast", net.input(dtype=TensorProto.UINT8), to=TensorProto.FLOAT)
    return net.conv(net.add("Div", net.add("Sub", x, net.constant(F(127))), net.constant(F(50))))


@right()
def integers_as_input(net: Net) -> str:
    return _conv(net, net.dequantize(net.input(dtype=TensorProto.INT8)))


@right(opset=19, dtype=TensorProto.FLOAT16)
def typed_half(net: Net) -> str:
    weight = net.weight(16, 8, 3, 3, scale=np.full(16, 0.01, np.float16))
    bias = net.constant(np.ones(16, np.float16))
    return _conv(net, net.pair(net.input(dtype=TensorProto.FLOAT16), np.float16(0.02)), weight, bias)


@right()
def local_function(net: Net) -> str:
    twice = helper.make_node("Add", ["a", "a"], ["b"])
    imports = [helper.make_opsetid("", 17)]
    net.functions.append(helper.make_function("my.functions", "Twice", ["a"], ["b"], [twice], imports))
    return net.add("Twice", net.conv(net.input()), domain="my.functions")


@right()
def branches(net: Net) -> str:
    y = net.conv(net.input(), 8)
    total = net.add("Greater", net.add("ReduceSum", "x", keepdims=0), net.constant(F(0)))
    graphs = []
    for op in ("Relu", "Sigmoid"):
        given = [helper.make_tensor_value_info(op, TensorProto.FLOAT, IMAGE)]
        graphs.append(helper.make_graph([helper.make_node(op, [y], [op], name=f"{op}_node")], f"{op}_graph", [], given))
    return net.add("If", total, then_branch=graphs[0], else_branch=graphs[1])
