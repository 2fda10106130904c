"""The matrix layers of an ONNX file: which module each was, and in which precision the file wants it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto

from .graph import DEQUANTIZE, MATRIX, Graph, graphs, named

__all__ = ["MatrixNode", "distinct", "matrix_nodes"]

#: Operators behind which a tensor holds the same values.
MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
#: What TensorRT multiplies as it lies in the file when both factors are of it; uint8 is wanted, but refused.
PRODUCTS = {TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}
#: Of the queries and keys of an attention, for example.
CALCULATED = "both factors are calculated: the scheme quantizes products with a stored weight only"
FLOATS = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
}


@dataclass(frozen=True)
class MatrixNode:
    """One product. `node` is what TensorRT's parser calls it; `wanted` is "" where the file does not say types.

    why: it is not int8 in a file that has int8 products, where that is known.
    """

    node: str
    path: str | None
    op: str
    wanted: str
    why: str | None = None


def distinct(model: ModelProto) -> ModelProto | None:
    """A copy in which every node has a name of its own and no functions are left; None where that is so already."""
    names = [named(node) for node in model.graph.node]
    if len(set(names)) == len(names) and not model.functions:
        return None
    copy: ModelProto = onnx.inliner.inline_local_functions(model)
    taken: set[str] = set()
    for node in copy.graph.node:
        name, number = named(node), 1
        while (unique := name if number == 1 else f"{name}.{number}") in taken:
            number += 1
        taken.add(unique)
        node.name = unique
    return copy


def matrix_nodes(model: ModelProto) -> list[MatrixNode]:
    """Convolutions and matrix products of the graph, in its order; those in branches and loops are left out.

    A product whose factors both come from DequantizeLinear wants their integers; any other wants its tensors' type.
    """
    graph = graphs(model)[0]
    products = [node for node in graph.nodes if node.op_type in MATRIX and node.domain in ("", "ai.onnx")]
    wanted = [_wanted(node, graph) for node in products]
    found = []
    for node, precision in zip(products, wanted, strict=True):
        calculated = all(name in graph.at_run_time for name in node.input[:2])
        why = CALCULATED if calculated and precision != "int8" and "int8" in wanted else None
        found.append(MatrixNode(named(node), graph.path(node), node.op_type, precision, why))
    return found


def _wanted(node: NodeProto, graph: Graph) -> str:
    stored = {PRODUCTS.get(_stored(name, graph)) for name in node.input[:2]}
    if len(stored) == 1 and (integers := stored.pop()) is not None:
        return integers
    return FLOATS.get(graph.dtype(node.output[0]) or graph.dtype(node.input[0]), "")


def _stored(name: str, graph: Graph) -> int:
    """The type that a factor had before its DequantizeLinear; 0 where there is none."""
    while (node := graph.producer.get(name)) is not None and node.op_type in MOVES:
        name = node.input[0]
    return graph.dtype(node.input[0]) if node is not None and node.op_type == DEQUANTIZE else 0
