"""Small edits of ONNX graphs (onnx.ModelProto)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

__all__ = [
    "DEFAULT_DOMAIN",
    "attribute",
    "constant_value",
    "copied",
    "drop_attribute",
    "drop_unread",
    "keep",
    "lift_constants",
    "nodes",
    "opset_of",
]

#: How ONNX's own operators are marked.
DEFAULT_DOMAIN = ("", "ai.onnx")


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a file is written in; 0 if it names none."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in DEFAULT_DOMAIN), 0)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that may be edited."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def nodes(graph: onnx.GraphProto) -> Iterator[tuple[onnx.GraphProto, NodeProto]]:
    """Every node with the graph that holds it, those of branches and loops included."""
    for node in graph.node:
        yield graph, node
        for entry in node.attribute:
            for inner in [entry.g] if entry.HasField("g") else entry.graphs:
                yield from nodes(inner)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, or `default` where the node does not have it."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def drop_attribute(node: NodeProto, name: str) -> None:
    """Take an attribute away if it is there."""
    keep(node.attribute, lambda entry: entry.name != name)


def constant_value(node: NodeProto) -> NDArray[Any] | None:
    """What a node Constant holds; None for texts and sparse tensors."""
    entry = node.attribute[0]
    value = helper.get_attribute_value(entry)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    types = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    return np.asarray(value, types[entry.name]) if entry.name in types else None


def lift_constants(graph: onnx.GraphProto) -> None:
    """Turn the nodes Constant of a graph into initializers of the same names."""
    for node in graph.node:
        if node.op_type == "Constant" and (value := constant_value(node)) is not None:
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    stored = {tensor.name for tensor in graph.initializer}
    keep(graph.node, lambda node: node.op_type != "Constant" or node.output[0] not in stored)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Take away constants, and nodes one after the other, that nobody reads any more."""
    while True:
        read = {name for _, node in nodes(graph) for name in node.input} | {o.name for o in graph.output}
        before = len(graph.node)
        keep(graph.node, lambda node: any(name in read for name in node.output))  # noqa: B023
        if len(graph.node) == before:
            break
    keep(graph.initializer, lambda tensor: tensor.name in read)


def keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Filter a repeated field of a protobuf message in place."""
    for index in reversed(range(len(items))):
        if not wanted(items[index]):
            del items[index]
