"""The matrix layers of an ONNX file as they are stored: shapes, precision, ranges, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ..runtimes.onnx_model import module_path
from .constants import DEQUANTIZE, QUANTIZE, Array, Graph, Integers, attribute

__all__ = ["StoredLayer", "stored_layers"]

#: op -> positions of input, input scale, input zero point, weight, its scale, its zero point, output scale, its zero
#: point, bias. None: not there, or known at run time only.
INTEGER_OPERATORS: dict[str, tuple[int | None, ...]] = {
    "QLinearConv": (0, 1, 2, 3, 4, 5, 6, 7, 8),
    "QLinearMatMul": (0, 1, 2, 3, 4, 5, 6, 7, None),
    "QGemm": (0, 1, 2, 3, 4, 5, 7, 8, 6),
    "ConvInteger": (0, None, 2, 1, None, 3, None, None, None),
    "MatMulInteger": (0, None, 2, 1, None, 3, None, None, None),
    "MatMulIntegerToFloat": (0, 2, 4, 1, 3, 5, None, None, 6),
    "DynamicQuantizeMatMul": (0, None, None, 1, 2, 3, None, None, 4),
}
#: op -> position of the weight.
OPERATORS = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"), 1),
    **dict.fromkeys(("MatMulNBits", "Attention", "MultiHeadAttention", "QAttention"), 1),
    **{name: 3 if name.startswith(("QLinear", "QGemm")) else 1 for name in INTEGER_OPERATORS},
}
#: Behind these a constant is still the same weight.
STILL = {QUANTIZE, DEQUANTIZE, "Transpose", "Reshape", "Identity", "Cast", "Mul"}
CONVOLUTIONS = {"Conv", "FusedConv", "QLinearConv", "ConvInteger"}
ATTENTION = {"Attention", "MultiHeadAttention", "QAttention"}


@dataclass(frozen=True)
class StoredLayer:
    """One matrix layer. Integers are None for what is float in the file."""

    index: int
    node: Any
    path: str | None
    x: Integers | None
    w: Integers | None
    y: Integers | None
    weight_shape: list[int] | None
    #: As it is calculated with, [out, in, ...] or [in, out] as stored; None where it is not constant.
    weight: Array | None
    #: The float weight, where the file holds it beside its quantization.
    original: Array | None
    bias: str

    @property
    def name(self) -> str:
        return self.path or self.node.name or self.node.output[0]

    @property
    def op(self) -> str:
        return str(self.node.op_type)


def stored_layers(model: onnx.ModelProto, graph: Graph) -> list[StoredLayer]:
    """Every matrix layer in graph order, those inside If and Loop bodies left out."""
    ours = any(p.key == "edgekd.version" for p in model.metadata_props)
    return [_layer(i, node, graph, ours) for i, node in enumerate(graph.nodes) if node.op_type in OPERATORS]


def _layer(index: int, node: Any, graph: Graph, ours: bool) -> StoredLayer:
    weight = _input(node, OPERATORS[node.op_type])
    places = INTEGER_OPERATORS.get(node.op_type)
    if places is not None:
        x, w, y = _of_operator(node, graph, places)
        value, original, bias = _integer_weight(graph, weight, w), None, "int32" if _input(node, places[8]) else "none"
    elif node.op_type in ATTENTION or node.op_type == "MatMulNBits":
        bits = attribute(node, "bits", 4)
        x, y, value, original, bias = None, None, None, None, "none"
        w = Integers(f"u{bits}") if node.op_type == "MatMulNBits" else None
    else:
        x, w = graph.quantized(node.input[0]), graph.quantized(weight)
        y = _output(graph, node)
        value, original = graph.value(weight), graph.original(weight)
        bias = _bias(graph, _input(node, 2)) if node.op_type != "FusedMatMul" else "none"
    if node.op_type in {"Gemm", "FusedGemm"} and attribute(node, "transB", 0):
        value, original = (None if v is None else v.T for v in (value, original))
    elif node.op_type == "QGemm" and attribute(node, "transB", 0) and value is not None:
        value = value.T
    shape = None if value is None else list(value.shape)
    if shape is None and weight in graph.tensors:
        shape = list(graph.tensors[weight].dims)
    return StoredLayer(index, node, _path(node, graph, weight, ours), x, w, y, shape, value, original, bias)


def _input(node: Any, place: int | None) -> str:
    return node.input[place] if place is not None and place < len(node.input) else ""


def _of_operator(
    node: Any, graph: Graph, places: tuple[int | None, ...]
) -> tuple[Integers | None, Integers | None, Integers | None]:
    def integers(tensor: int | None, scale: int | None, zero: int | None, axis: int | None) -> Integers | None:
        zero_name, scale_name = _input(node, zero), _input(node, scale)
        dtype = graph.dtype(zero_name) or (graph.dtype(_input(node, tensor)) if tensor is not None else "") or "u8"
        scales = graph.value(scale_name) if scale_name else None
        zeros = graph.value(zero_name) if zero_name else None
        return Integers(dtype, scales, zeros, axis if scales is not None and scales.size > 1 else None)

    x = integers(places[0], places[1], places[2], None)
    w = integers(places[3], places[4], places[5], 0 if node.op_type in CONVOLUTIONS else 1)
    if w is not None and w.scale is None and node.op_type in {"MatMulInteger", "ConvInteger"}:
        w = Integers(w.dtype, _dynamic_scale(graph, node), w.zero_point, 0 if node.op_type == "ConvInteger" else 1)
    y = integers(None, places[6], places[7], None) if _input(node, places[6]) else None
    return x, w, y


def _dynamic_scale(graph: Graph, node: Any) -> Array | None:
    """The weight's scale of dynamic quantization: MatMulInteger -> Cast -> Mul(input's scale * weight's scale)."""
    name = node.output[0]
    for _ in range(2):
        readers = graph.readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type not in {"Cast", "Mul"}:
            return None
        reader = readers[0]
        if reader.op_type == "Mul":
            other = next((i for i in reader.input if i != name), "")
            product = graph.producer.get(other)
            values = [graph.value(i) for i in product.input] if product is not None and product.op_type == "Mul" else []
            return next((v for v in values if v is not None), None)
        name = reader.output[0]
    return None


def _integer_weight(graph: Graph, name: str, integers: Integers | None) -> Array | None:
    value = graph.value(name)
    if value is None or integers is None or integers.scale is None:
        return None
    shape = [1] * value.ndim
    if integers.scale.size > 1 and integers.axis is not None:
        shape[integers.axis % value.ndim] = -1
    zero = (
        0
        if integers.zero_point is None
        else integers.zero_point.astype(np.float32).reshape(shape if integers.zero_point.size > 1 else [1] * value.ndim)
    )
    result: Array = (value.astype(np.float32) - zero) * integers.scale.reshape(shape)
    return result


def _output(graph: Graph, node: Any) -> Integers | None:
    """Those of the first Q behind the layer, whatever elementwise operators stand between."""
    name = node.output[0]
    for _ in range(4):
        readers = graph.readers.get(name, [])
        quantizer = next((r for r in readers if r.op_type == QUANTIZE), None)
        if quantizer is not None:
            return graph.integers_of(quantizer)
        if len(readers) != 1 or readers[0].op_type in OPERATORS or readers[0].op_type in {"Add", "Concat"}:
            return None
        name = readers[0].output[0]
    return None


def _bias(graph: Graph, name: str) -> str:
    """none, float, int32 (behind a DQ) or computed."""
    if not name:
        return "none"
    node = graph.producer.get(name)
    if node is not None and node.op_type == DEQUANTIZE:
        return "int32" if graph.dtype(node.input[0]) == "s32" else "quantized to other integers"
    return "float" if graph.value(name) is not None else "computed"


def _path(node: Any, graph: Graph, weight: str, ours: bool) -> str | None:
    """The module path, as far as the file has one: in the node's name, the weight's name, or the exporter's notes."""
    name = weight
    while name not in graph.tensors and (producer := graph.producer.get(name)) is not None:
        if producer.op_type not in STILL:
            break
        name = producer.input[0]
    return module_path(node, name, ours)
