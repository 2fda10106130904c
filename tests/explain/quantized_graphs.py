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
