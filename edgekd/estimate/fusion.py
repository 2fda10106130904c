"""Nodes put together as runtimes fuse them: what comes out stands in memory, what lies between does not.

Source: NVIDIA, "TensorRT: Layer Fusion Catalog" (convolution or matrix product with bias, batch norm, activation and
the sum of a residual; pointwise chains; Q/DQ; attention). A runtime may fuse less, never more by much: with this, bytes
are few rather than many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onnx import TensorProto

from .graph import QUANTIZE, Graph

__all__ = ["MATRIX", "Group", "groups"]

INT64 = TensorProto.INT64
#: op -> positions of its activations, its weight and its bias.
MATRIX: dict[str, tuple[int, int, int | None]] = {
    "Conv": (0, 1, 2),
    "ConvTranspose": (0, 1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1, None),
    "QLinearConv": (0, 3, 8),
    "QLinearMatMul": (0, 3, None),
    "ConvInteger": (0, 1, None),
    "MatMulInteger": (0, 1, None),
}
#: Calculated element by element on what a kernel has in its registers.
ABSORBED = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Pow", "Sqrt", "Exp", "Log", "Erf", "Reciprocal", "Min", "Max"),
    *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Tanh", "Elu", "Selu"),
    *("Celu", "Gelu", "Mish", "Softplus", "Softsign", "Where", "Equal", "Less", "Greater", "Not", "And", "Or"),
    *("Cast", "BatchNormalization", "Softmax", QUANTIZE),
}


@dataclass
class Group:
    """One kernel: the nodes in it, and tensors that it reads from and writes to memory, with how many elements."""

    nodes: list[Any] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    @property
    def matrices(self) -> list[Any]:
        return [node for node in self.nodes if node.op_type in MATRIX]


def groups(graph: Graph) -> list[Group]:
    """The kernels of a graph, in the order of their first nodes. Raises UsageError where a size is not known."""
    found: list[Group] = []
    owner: dict[str, int] = {}
    for node in graph.working():
        own = [owner[s] for i in activations(graph, node) for s in graph.stored(i) if s in owner]
        at = _absorbed(graph, node, own, found)
        if at is None:
            at = len(found)
            found.append(Group())
        found[at].nodes.append(node)
        owner.update(dict.fromkeys(node.output, at))
    _move(graph, found, owner)
    for group in found:
        for node in group.nodes:
            group.weights.update(_weights(graph, node))
    return found


def activations(graph: Graph, node: Any) -> list[str]:
    """What a node reads that is not constant."""
    places = MATRIX.get(node.op_type)
    read = [node.input[p] for p in places[:2]] if places is not None else node.input
    if node.op_type == QUANTIZE:
        read = node.input[:1]
    return [i for i in read if i and i not in graph.constants]


def _absorbed(graph: Graph, node: Any, own: list[int], found: list[Group]) -> int | None:
    """The group that a node's work is done in: that of the latest of its inputs."""
    if not own:
        return None
    if node.op_type in ABSORBED:
        return max(own)
    if node.op_type == "MatMul" and node.input[1] not in graph.constants:
        # Attention: the scores are multiplied with the values where they are.
        for at in own:
            if found[at].matrices and found[at].nodes[-1].op_type in ("Softmax", QUANTIZE) and _attends(found[at]):
                return at
    return None


def _attends(group: Group) -> bool:
    return any(node.op_type == "Softmax" for node in group.nodes) and group.matrices[0].op_type == "MatMul"


def _move(graph: Graph, found: list[Group], owner: dict[str, int]) -> None:
    """What stands in memory between the groups: read once by each, however many of its nodes do, and written once."""
    read: dict[tuple[int, str], dict[str, int]] = {}
    written: dict[str, dict[str, int]] = {}
    for index, group in enumerate(found):
        for name in dict.fromkeys(i for node in group.nodes for i in activations(graph, node)):
            behind = graph.stored(name)
            for s in behind:
                if s not in graph.constants and owner.get(s) != index:
                    part = graph.part(name) if len(behind) == 1 else graph.count(s)
                    read.setdefault((index, s), {})[name] = part
                    written.setdefault(s, {})[name] = part
    for name in graph.outputs:
        for s in graph.stored(name):
            written.setdefault(s, {})[name] = graph.count(s)
    for (index, s), parts in read.items():
        found[index].reads[s] = min(graph.count(s), sum(parts.values()))
    for s, parts in written.items():
        if s in owner:
            found[owner[s]].writes[s] = min(graph.count(s), sum(parts.values()))


def _weights(graph: Graph, node: Any) -> dict[str, int]:
    """Constants that a node reads, with their elements."""
    if node.op_type in (QUANTIZE, "BatchNormalization"):  # scales; and a norm is folded into weights
        return {}
    places = MATRIX.get(node.op_type)
    read = [node.input[p] for p in places[1:] if p is not None and p < len(node.input)] if places else node.input
    kept = [graph.weight(name) for name in read if name in graph.constants]
    return {name: graph.count(name) for name in kept if graph.element(name) != INT64}  # axes and sizes
