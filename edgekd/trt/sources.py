"""Where what a layer reads comes from: a DequantizeLinear, through operators that only move values, or not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnx import NodeProto

from ..onnx_edit import attribute
from .graph import DEQUANTIZE, Graph

__all__ = ["FAR", "RESHAPES", "Source", "source_of"]

#: TensorRT calculates these on integers: what they give is quantized as what they read.
MOVES = {
    *("Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather"),
    *("Expand", "Tile", "DepthToSpace", "SpaceToDepth", "MaxPool", "GlobalMaxPool", "ReduceMax", "Neg", "Cast", "Pad"),
}
SCALES = {"Mul", "Div"}
#: Whether these move a scale's axis elsewhere is not looked into.
RESHAPES = MOVES - {"Identity", "Dropout", "Slice", "Pad", "MaxPool", "Neg", "Cast"}
#: As far as one looks behind an operator that calculates.
FAR = 4


class Source(NamedTuple):
    """Where a factor of a product comes from: `dequantize` is None where it is float, `last` what gives it then."""

    dequantize: NodeProto | None
    between: list[NodeProto]
    last: NodeProto | None
    concat: NodeProto | None = None


def source_of(graph: Graph, name: str, reader: NodeProto, depth: int = 0) -> Source:
    """Follow what `reader` reads back to a DequantizeLinear, through all that TensorRT calculates on integers."""
    between: list[NodeProto] = []
    while (node := graph.producer.get(name)) is not None:
        if node.op_type == DEQUANTIZE:
            return Source(node, between, node)
        if node.op_type == "Concat" and depth < FAR:
            sources = [source_of(graph, part, node, depth + 1) for part in node.input]
            first = sources[0].dequantize
            same = first is not None and all(_equal_scale(graph, s.dequantize, first) for s in sources)
            return Source(first if same else None, between, node, node)
        if node.op_type not in MOVES | SCALES or not _moves(graph, node, between[-1] if between else reader):
            break
        between.append(node)
        name = node.input[0] if node.op_type in MOVES else _scaled(graph, node)
    return Source(None, between, node)


def _scaled(graph: Graph, node: NodeProto) -> str:
    """The factor of a product that is not the plain constant."""
    computed = [n for n in node.input if n in graph.at_run_time] or [n for n in node.input if n not in graph.tensors]
    return computed[0] if computed else node.input[0]


def _moves(graph: Graph, node: NodeProto, reader: NodeProto) -> bool:
    if node.op_type in SCALES:  # a constant factor goes into the scale: any of a weight, one of an activation
        constant = [name for name in node.input if name not in graph.at_run_time]
        value = graph.value(constant[0]) if constant else None
        return len(constant) == 2 or (value is not None and value.size == 1)
    if node.op_type == "Pad" and attribute(node, "mode", b"constant") == b"constant":
        # Zeros around an image become padding of the convolution; of channels they do not.
        return _pads_zeros(graph, node) and (
            reader.op_type == "Add" or (reader.op_type == "Conv" and _spatial(graph, node))
        )
    return True


def _pads_zeros(graph: Graph, node: NodeProto) -> bool:
    value = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    given = len(node.input) > 2 and bool(node.input[2])
    return not attribute(node, "value", 0.0) and (not given or (value is not None and not value.any()))


def _spatial(graph: Graph, node: NodeProto) -> bool:
    """Whether neither the batch nor the channels are padded."""
    widths = graph.value(node.input[1]) if len(node.input) > 1 else np.asarray(attribute(node, "pads", [0]))
    axes = graph.value(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    if widths is None or widths.size % 2:
        return False
    padded = widths.reshape(2, -1).any(0)
    return not any(axis in (0, 1) for axis in (np.arange(padded.size) if axes is None else axes)[padded])


def _equal_scale(graph: Graph, one: NodeProto | None, other: NodeProto) -> bool:
    if one is None:
        return False
    first, second = graph.value(one.input[1]), graph.value(other.input[1])
    return first is not None and second is not None and first.shape == second.shape and bool((first == second).all())
