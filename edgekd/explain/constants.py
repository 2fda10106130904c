"""Constants of an ONNX graph, and the integers that stand for a tensor."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["Array", "Graph", "Integers", "attribute"]

Array = np.ndarray[Any, Any]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
#: Operators that only move values: what comes out is quantized as what goes in.
MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool", "Slice"}
SHORT = {
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), "f8"),
    **{f"{sign}INT{bits}": f"{'u' if sign else 's'}{bits}" for sign in ("", "U") for bits in (4, 8, 16, 32)},
}


@dataclass(frozen=True)
class Integers:
    """Real = scale * (integer - zero_point). Scales are None where they are calculated at run time."""

    dtype: str
    scale: Array | None = None
    zero_point: Array | None = None
    axis: int | None = None

    @property
    def per_channel(self) -> bool:
        return self.scale is not None and self.scale.size > 1

    @property
    def same_scales(self) -> bool:
        return self.scale is not None and bool((self.scale == self.scale.flat[0]).all())

    @property
    def symmetric(self) -> bool:
        return self.scale is not None and (self.zero_point is None or not self.zero_point.any())

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and largest integer."""
        bits = int(self.dtype.lstrip("usf"))
        return (0, 2**bits - 1) if self.dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def bounds(self) -> tuple[float, float] | None:
        """The smallest and largest value that the integers can stand for."""
        if self.scale is None or self.dtype == "f8":
            return None
        zero = 0 if self.zero_point is None else self.zero_point.astype(np.int64)
        low, high = (self.scale.astype(np.float64) * (limit - zero) for limit in self.limits)
        return float(low.min()), float(high.max())


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


class Graph:
    """A graph with its constants, producers and readers by the name of a tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                if name:
                    self.readers[name].append(node)
        for node in self.nodes:
            if node.op_type == "Constant" and (value := attribute(node, "value")) is not None:
                self.tensors[node.output[0]] = value

    def value(self, name: str) -> Array | None:
        """A constant's value, evaluated through Q/DQ, casts and whatever moves values; None if it is none."""
        if name in self.tensors:
            return numpy_helper.to_array(self.tensors[name])
        node = self.producer.get(name)
        if node is None:
            return None
        if node.op_type == DEQUANTIZE:
            x, integers = self.value(node.input[0]), self.integers_of(node)
            return None if x is None or integers is None else _dequantized(x, integers)
        if node.op_type == QUANTIZE:
            x, integers = self.value(node.input[0]), self.integers_of(node)
            return None if x is None or integers is None else _quantized(x, integers)
        if node.op_type == "Mul" and node.input[1] in self.tensors:
            x, factor = self.value(node.input[0]), self.value(node.input[1])
            return None if x is None or factor is None else x.astype(factor.dtype) * factor
        if node.op_type not in {"Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze"}:
            return None
        x = self.value(node.input[0])
        if x is None or node.op_type in {"Identity", "Cast", "Squeeze", "Unsqueeze"}:
            return x if node.op_type in {"Identity", "Cast"} else None
        if node.op_type == "Transpose":
            return x.transpose(attribute(node, "perm"))
        shape = self.value(node.input[1])
        return None if shape is None or 0 in shape else x.reshape(shape)

    def integers_of(self, node: Any) -> Integers | None:
        """How a QuantizeLinear or DequantizeLinear node maps reals to integers; None where that is not constant."""
        scale = self.value(node.input[1])
        zero = self.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        stored = node.input[0] if node.op_type == DEQUANTIZE else ""
        dtype = self.dtype(node.input[2]) if zero is not None else self.dtype(stored) or "u8"
        if scale is None:
            return None
        axis = attribute(node, "axis", 1) if scale.ndim else None
        return Integers(dtype or "u8", scale, None if zero is None else np.asarray(zero), axis)

    def dtype(self, name: str) -> str:
        """u8, s8, ... of an integer constant or of what a QuantizeLinear gives; empty for anything else."""
        if name in self.tensors:
            return SHORT.get(onnx.TensorProto.DataType.Name(self.tensors[name].data_type), "")
        node = self.producer.get(name)
        if node is None:
            return ""
        if node.op_type == QUANTIZE:
            return (self.dtype(node.input[2]) if len(node.input) > 2 and node.input[2] else "") or "u8"
        if node.op_type == "DynamicQuantizeLinear":
            return "u8"
        return self.dtype(node.input[0]) if node.op_type in MOVES else ""

    def quantized(self, name: str) -> Integers | None:
        """The integers that a real tensor comes from, through operators that only move values."""
        node = self.producer.get(name)
        if node is None:
            return None
        if node.op_type == DEQUANTIZE:
            return self.integers_of(node)
        if node.op_type == "Mul" and node.input[1] in self.tensors:
            return self._scaled(node)
        return self.quantized(node.input[0]) if node.op_type in MOVES else None

    def _scaled(self, product: Any) -> Integers | None:
        """Weights stored as integers alone: Mul(Cast(integers), scales) is calculated when the file is loaded."""
        cast = self.producer.get(product.input[0])
        dtype = self.dtype(cast.input[0]) if cast is not None and cast.op_type == "Cast" else ""
        scale = numpy_helper.to_array(self.tensors[product.input[1]])
        axis = next((d for d, n in enumerate(scale.shape) if n > 1), None)
        return Integers(dtype, scale.ravel(), None, axis) if dtype else None

    def original(self, name: str) -> Array | None:
        """The float weight where the file holds one and quantizes it when it is loaded; None otherwise."""
        node = self.producer.get(name)
        while node is not None and node.op_type in {DEQUANTIZE, "Identity"}:
            node = self.producer.get(node.input[0])
        return self.value(node.input[0]) if node is not None and node.op_type == QUANTIZE else None


def _shaped(values: Array, x: Array, axis: int | None) -> Array:
    if values.ndim == 0 or values.size == 1:
        return values.reshape([1] * x.ndim)
    if values.ndim == x.ndim:  # blocks along the axis
        assert axis is not None
        return np.repeat(values, -(-x.shape[axis] // values.shape[axis]), axis=axis)[tuple(slice(n) for n in x.shape)]
    assert axis is not None
    return values.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def _dequantized(x: Array, integers: Integers) -> Array:
    assert integers.scale is not None
    zero = 0 if integers.zero_point is None else _shaped(integers.zero_point.astype(np.float32), x, integers.axis)
    result: Array = (x.astype(np.float32) - zero) * _shaped(integers.scale.astype(np.float32), x, integers.axis)
    return result


def _quantized(x: Array, integers: Integers) -> Array:
    assert integers.scale is not None
    zero = 0 if integers.zero_point is None else _shaped(integers.zero_point.astype(np.float32), x, integers.axis)
    result: Array = np.clip(np.rint(x / _shaped(integers.scale, x, integers.axis)) + zero, *integers.limits)
    return result
