"""Small ONNX graphs in the conventions of several quantization tools, built node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
DTYPES = {"u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16}


class Graph:
    """Collects nodes and constants; every method that adds a node returns the name of its output."""

    def __init__(self, shape: tuple[int | str, ...] = (1, 8, 8, 8)) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: Array) -> str:
        if name not in {c.name for c in self.constants}:
            self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, inputs: list[str], name: str = "", **attributes: Any) -> str:
        output = f"{name or op}_out{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def pair(self, x: str, dtype: str = "u8", scale: Any = 0.02, zero_point: int | None = None, **axis: int) -> str:
        """x -> QuantizeLinear -> DequantizeLinear."""
        scales = np.asarray(scale, np.float32)
        zero = (128 if dtype == "u8" else 0) if zero_point is None else zero_point
        zeros = np.full(scales.shape, zero, DTYPES[dtype])
        names = [self.constant(f"{x}_scale", scales), self.constant(f"{x}_zero", zeros)]
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [x, *names], **axis), *names], **axis)

    def weight(self, name: str, value: Array, dtype: str = "s8", per_channel: bool = True, axis: int = 0) -> str:
        """A stored integer weight -> DequantizeLinear."""
        other = tuple(d for d in range(value.ndim) if d != axis)
        scales = np.abs(value).max(axis=other if per_channel else None).astype(np.float32) / 127
        shape = [-1 if d == axis else 1 for d in range(value.ndim)] if per_channel else [1] * value.ndim
        integers = np.round(value / scales.reshape(shape)) + (128 if dtype == "u8" else 0)
        zeros = np.full(scales.shape, 128 if dtype == "u8" else 0, DTYPES[dtype])
        return self.add(
            "DequantizeLinear",
            [
                self.constant(name, integers.astype(DTYPES[dtype])),
                self.constant(f"{name}_scale", scales),
                self.constant(f"{name}_zero", zeros),
            ],
            **({"axis": axis} if per_channel else {}),
        )

    def random_weight(self, *shape: int) -> Array:
        return self.random.normal(size=shape).astype(np.float32)

    def bias(self, name: str, channels: int, scale: Array) -> str:
        """A stored int32 bias -> DequantizeLinear, with the scale of input times weight."""
        integers = self.random.integers(-500, 500, channels).astype(np.int32)
        names = [self.constant(name, integers), self.constant(f"{name}_scale", scale.astype(np.float32))]
        return self.add("DequantizeLinear", names, axis=0)

    def save(self, path: Path, *outputs: str, opset: int = 18) -> Path:
        given = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, given, self.constants)
        domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=9)
        onnx.save(model, path)
        return path


def convolution(
    path: Path,
    *,
    activation: str = "u8",
    weight: str = "s8",
    per_channel: bool = True,
    quantized_input: bool = True,
    quantized_weight: bool = True,
    quantized_output: bool = True,
    between: str = "",
    zero_point: int | None = None,
    bias: str = "none",
    scale: Any = 0.02,
    tapped: bool = False,
    op: str = "Conv",
    twice: bool = False,
) -> Path:
    """x [1, 8, 8, 8] -> (Q/DQ) -> 3x3 convolution of 8 channels -> (`between`) -> (Q/DQ)."""
    g = Graph()
    axis = {"axis": 1} if np.ndim(scale) else {}
    x = g.pair("x", activation, scale, **axis) if quantized_input else "x"
    values = g.random_weight(8, 8, 3, 3)
    w = g.weight("w", values, weight, per_channel) if quantized_weight else g.constant("w", values)
    inputs = [x, w]
    if bias == "int32":
        largest = np.abs(values).max(axis=(1, 2, 3)) / 127
        inputs.append(g.bias("b", 8, 0.02 * largest))
    elif bias == "float":
        inputs.append(g.constant("b", g.random_weight(8)))
    y = g.add(op, inputs, "the_layer", pads=[1, 1, 1, 1])
    taps = [y] if tapped else []
    if between == "BatchNormalization":
        y = g.add(between, [y, *(g.constant(f"bn{i}", np.abs(g.random_weight(8)) + 0.5) for i in range(4))])
    elif between:
        y = g.add(between, [y])
    if quantized_output:
        y = g.pair(y, activation, 0.05, zero_point)
    if twice:
        return g.save(path, g.add("Sigmoid", [x]), g.add("Add", [y, x]))
    return g.save(path, g.add("Sigmoid", [y]), *taps)


def product(
    path: Path,
    op: str = "MatMul",
    *,
    activation: str = "u8",
    quantized_input: bool = True,
    quantized_weight: bool = True,
    quantized_output: bool = True,
    computed_weight: bool = False,
    bias: str = "none",
    **attributes: Any,
) -> Path:
    """x [4, 16] -> (Q/DQ) -> MatMul or Gemm with 8 columns -> (Q/DQ)."""
    g = Graph((4, 16))
    x = g.pair("x", activation) if quantized_input else "x"
    values = g.random_weight(16, 8)
    if computed_weight:
        w = g.add("Transpose", [g.add("Tanh", ["x"])])
    else:
        w = g.weight("w", values, axis=1) if quantized_weight else g.constant("w", values)
    inputs = [x, w]
    if bias == "int32":
        inputs.append(g.bias("b", 8, 0.02 * np.abs(values).max(axis=0) / 127))
    elif bias == "float":
        inputs.append(g.constant("b", g.random_weight(8)))
    y = g.add(op, inputs, "the_layer", **attributes)
    if quantized_output:
        y = g.pair(y, activation, 0.05)
    return g.save(path, g.add("Sigmoid", [y]))


def integer_convolution(path: Path) -> tuple[Path, Array]:
    """QuantizeLinear -> QLinearConv -> DequantizeLinear, as in ONNX Runtime's QOperator format; and the real weight."""
    g = Graph()
    values = g.random_weight(8, 8, 3, 3)
    scales = (np.abs(values).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    integers = np.round(values / scales.reshape(-1, 1, 1, 1)).astype(np.int8)
    x = [g.constant("x_scale", np.float32(0.02)), g.constant("x_zero", np.uint8(100))]
    w = [g.constant("w", integers), g.constant("w_scale", scales), g.constant("w_zero", np.zeros(8, np.int8))]
    y = [g.constant("y_scale", np.float32(0.05)), g.constant("y_zero", np.uint8(128))]
    quantized = g.add("QuantizeLinear", ["x", *x])
    g.constant("b", np.arange(8, dtype=np.int32))
    made = g.add("QLinearConv", [quantized, *x, *w, *y, "b"], "the_layer", pads=[1, 1, 1, 1])
    return g.save(path, g.add("DequantizeLinear", [made, *y])), values


def dynamic_product(path: Path) -> tuple[Path, Array]:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, as in ONNX Runtime's dynamic format; the real weight."""
    g = Graph((4, 16))
    values = g.random_weight(16, 8)
    scale = np.float32(np.abs(values).max() / 127)
    g.constant("w", np.round(values / scale).astype(np.int8))
    g.constant("w_scale", scale)
    g.constant("w_zero", np.int8(0))
    g.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], name="dynamic"))
    made = g.add("MatMulInteger", ["xq", "w", "xz", "w_zero"], "the_layer")
    real = g.add("Cast", [made], to=TensorProto.FLOAT)
    scales = g.add("Mul", ["xs", "w_scale"])
    return g.save(path, g.add("Mul", [real, scales])), values


def chain_of_convolutions(path: Path, *, quantized: bool, names: bool = True, signed: bool = False) -> Path:
    """x -> four 1x1 convolutions (8 -> 16 -> 8 -> 16 -> 8 channels) with ReLUs; the same weights in each form."""
    g = Graph(("batch", 8, 6, 6))
    dtype = "s8" if signed else "u8"
    value = g.pair("x", dtype) if quantized else "x"
    for i in range(4):
        weight = g.random_weight(*((16, 8) if i % 2 == 0 else (8, 16)), 1, 1)
        w = g.weight(f"w{i}", weight) if quantized else g.constant(f"w{i}", weight)
        value = g.add("Relu", [g.add("Conv", [value, w], f"conv{i}" if names else "")])
        if quantized:
            value = g.pair(value, dtype, 0.1, -128 if signed else 0)
    return g.save(path, g.add("ReduceMean", [value], keepdims=0))
