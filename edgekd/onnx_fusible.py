"""What PyTorch's exporter writes, as runtimes fuse it; no value changes by a bit.

Runtimes find GELU and attention by the form of the graph. The exporter's forms are not those: a GELU stays five
kernels, and keys are transposed by nine nodes, most of which compute shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from .onnx_edit import attribute, constant_value, drop_unread, keep

__all__ = ["fusible"]

#: A length that is known, or the number of an axis whose length is not.
Length = int | tuple[str, int]


def fusible(model: onnx.ModelProto) -> None:
    """Rewrite a graph in place. Its shapes must be noted in it, as the exporter does."""
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "Mul":
            _halve_last(graph, node)
        elif node.op_type == "Reshape":
            _transpose_at_once(graph, node)
    drop_unread(model.graph)
    made = {name for node in model.graph.node for name in node.output}
    keep(model.graph.value_info, lambda value: value.name in made)


class _Graph:
    """Who makes, reads and stores what."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.reads = [name for node in graph.node for name in node.input] + [o.name for o in graph.output]
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        values = [*graph.value_info, *graph.input, *graph.output]
        self.types = {v.name: v.type.tensor_type for v in values if v.type.tensor_type.HasField("shape")}

    def source(self, name: str, op_type: str) -> NodeProto | None:
        """The node that makes a tensor, where it is of this kind."""
        node = self.made_by.get(name)
        return node if node is not None and node.op_type == op_type else None

    def constant(self, name: str) -> NDArray[Any] | None:
        if name in self.stored:
            return numpy_helper.to_array(self.stored[name])
        node = self.source(name, "Constant")
        return None if node is None else constant_value(node)

    def is_number(self, name: str, value: float) -> bool:
        found = self.constant(name)
        return found is not None and found.size == 1 and bool(np.isclose(found.item(), value, rtol=1e-6))

    def shape(self, name: str) -> list[Length] | None:
        if name not in self.types:
            return None
        dims = self.types[name].shape.dim
        return [d.dim_value if d.HasField("dim_value") else ("axis", i) for i, d in enumerate(dims)]


def _halve_last(graph: _Graph, last: NodeProto) -> None:
    """x * (0.5 * (1 + erf(x / sqrt 2))) as (x * (1 + erf(...))) * 0.5: halving is exact wherever it is done."""
    for x, inner in (last.input, reversed(last.input)):
        half = graph.source(inner, "Mul")
        if half is None or graph.reads.count(inner) != 1:
            continue
        for factor, sum_ in (half.input, reversed(half.input)):
            if graph.is_number(factor, 0.5) and _one_and_erf(graph, sum_, x):
                half.input[:], last.input[:] = [x, sum_], [inner, factor]
                return


def _one_and_erf(graph: _Graph, name: str, x: str) -> bool:
    """Whether a tensor is 1 + erf(x / sqrt 2)."""
    add = graph.source(name, "Add")
    if add is None or not any(graph.is_number(one, 1.0) for one in add.input):
        return False
    for term in add.input:
        erf = graph.source(term, "Erf")
        scaled = None if erf is None else graph.made_by.get(erf.input[0])
        if scaled is not None and scaled.op_type in ("Div", "Mul") and scaled.input[0] == x:
            return graph.is_number(scaled.input[1], 2**0.5 if scaled.op_type == "Div" else 0.5**0.5)
    return False


def _transpose_at_once(graph: _Graph, last: NodeProto) -> None:
    """[..., n, d] flattened to three axes, transposed and unflattened, as one transposition to [..., d, n]."""
    transposed = graph.source(last.input[0], "Transpose")
    if transposed is None or attribute(transposed, "perm") != [0, 2, 1]:
        return
    first = graph.source(transposed.input[0], "Reshape")
    shape = None if first is None else graph.shape(first.input[0])
    if first is None or shape is None or len(shape) < 3:
        return
    x, leading, (n, d) = first.input[0], shape[:-2], shape[-2:]
    flattened, unflattened = (_lengths(graph, node.input[1], x, shape) for node in (first, last))
    # One length may be left to be inferred.
    inferred = [[-1 if i == j else length for j, length in enumerate(leading)] for i in range(len(leading))]
    if flattened == [-1, n, d] and unflattened in [[*one, d, n] for one in [leading, *inferred]]:
        rank = len(shape)
        perm = [*range(rank - 2), rank - 1, rank - 2]
        last.CopyFrom(helper.make_node("Transpose", [x], list(last.output), name=last.name, perm=perm))


def _lengths(graph: _Graph, name: str, x: str, shape: Sequence[Length]) -> list[Length] | None:
    """What a shape that is computed from that of `x` comes to; None where it is computed otherwise."""
    joined = graph.source(name, "Concat")
    parts = [name] if joined is None else joined.input
    found: list[Length] = []
    for part in parts:
        lengths = _part(graph, part, x, shape)
        if lengths is None:
            return None
        found += lengths
    return found


def _part(graph: _Graph, name: str, x: str, shape: Sequence[Length]) -> list[Length] | None:
    value = graph.constant(name)
    if value is not None:
        return [int(v) for v in value.ravel()]
    cut = graph.source(name, "Slice")
    whole = None if cut is None else graph.source(cut.input[0], "Shape")
    if cut is None or whole is None or whole.input[0] != x or attribute(whole, "start", 0) or len(cut.input) > 4:
        return None
    ends = [graph.constant(i) for i in cut.input[1:3]]
    along = [graph.constant(i) for i in cut.input[3:]]
    if any(end is None or end.size != 1 for end in ends) or any(axis is None or axis.any() for axis in along):
        return None
    start, stop = (int(end.item()) for end in ends if end is not None)
    return list(shape[start:stop])
