"""ONNX files in an older or newer opset: what TensorRT 8.6 reads stops at 17, and PyTorch's exporter starts at 18.

onnx's own converter (1.23) goes up, but back from 18 it has nothing for Pad and Split, so networks that pad fail there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from .errors import StageError
from .onnx_edit import DEFAULT_DOMAIN, attribute, constant_value, copied, drop_attribute, drop_unread, nodes, opset_of

__all__ = ["downgraded", "upgraded"]

OLDEST = 17

#: Their axes were an attribute until 17 and are an input since 18.
REDUCTIONS = {
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSumSquare"),
}
#: New in 18, but defined by older operators: written out as those.
WRITTEN_OUT = ["CenterCropPad", "GroupNormalization", "Mish"]
#: New in 18, with nothing in 17 that would do.
NEW = {"BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Col2Im"}
#: What 18 added to operators that 17 has: (operator, attribute) -> the only value that means what 17 does.
ADDED: dict[tuple[str, str], Any] = {
    ("LpPool", "ceil_mode"): 0,
    ("Resize", "antialias"): 0,
    ("Resize", "keep_aspect_ratio_policy"): b"stretch",
}


def upgraded(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A copy in `opset` or what it is written in, whichever is higher. Raises StageError where onnx has no way."""
    if opset_of(model) >= opset:
        return copied(model)
    try:
        found = onnx.version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError) as error:
        raise StageError(f"the file cannot be written in ONNX opset {opset}: {error}", where="opset") from error
    del found.graph.value_info[:]  # its types may be those of the operators that were replaced
    return onnx.shape_inference.infer_shapes(found)


def downgraded(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A copy of a file of opset 18 that computes the same in opset 17; older ones come back as they are.

    What changed with 18: axes of reductions are an input, Split may count its outputs, Pad and Resize may name axes,
    and there are new operators and attributes. The version of the file format goes down with the opset, too.
    Source: ONNX's Changelog.md, "Version 18". Raises StageError, naming the node, for what 17 cannot express, and
    for files of a newer opset than 18.
    """
    written = opset_of(model)
    if written <= opset:
        return copied(model)
    if written > OLDEST + 1 or opset < OLDEST:
        raise StageError(
            f"a file of ONNX opset {written} cannot be written in opset {opset}",
            where="opset",
            hint=f"edgekd goes from {OLDEST + 1} to {OLDEST}",
        )
    model = copied(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if any(n.op_type in WRITTEN_OUT and n.domain in DEFAULT_DOMAIN for _, n in nodes(model.graph)):
        names = [("", name) for name in WRITTEN_OUT]
        model = onnx.inliner.inline_selected_functions(model, names, inline_schema_functions=True)
    shapes = _Shapes(model)
    for graph, node in nodes(model.graph):
        if node.domain in DEFAULT_DOMAIN:
            _downgrade(graph, node, shapes)
    drop_unread(model.graph)
    for entry in model.opset_import:
        if entry.domain in DEFAULT_DOMAIN:
            entry.version = opset
    # Old runtimes refuse newer file formats; opset 17 came with version 8.
    model.ir_version = min(model.ir_version, helper.find_min_ir_version_for(list(model.opset_import)))
    return model


class _Shapes:
    """What is known of a file's tensors before it is changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        types = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
        self.dims = {
            name: [int(d.dim_value) if d.HasField("dim_value") else None for d in kind.shape.dim]
            for name, kind in types.items()
            if kind.HasField("shape")
        }
        self.dims |= {t.name: list(t.dims) for t in graph.initializer}
        self.constants: dict[str, NDArray[Any]] = {}
        for inner, node in nodes(model.graph):
            self.constants |= {t.name: numpy_helper.to_array(t) for t in inner.initializer}
            if node.op_type == "Constant" and (value := constant_value(node)) is not None:
                self.constants[node.output[0]] = value


def _downgrade(graph: onnx.GraphProto, node: NodeProto, shapes: _Shapes) -> None:
    kind = node.op_type
    if kind in NEW:
        raise _impossible(node, f"{kind} is new in opset 18")
    if kind == "LpPool" and any(d != 1 for d in attribute(node, "dilations", [])):
        raise _impossible(node, "LpPool without dilations is all that 17 has")
    if kind in ("ScatterElements", "ScatterND") and attribute(node, "reduction", b"none") in (b"max", b"min"):
        raise _impossible(node, f"{kind} with the reduction max or min is new in opset 18")
    if kind == "Resize" and attribute(node, "axes", []):
        raise _impossible(node, "Resize of chosen axes is new in opset 18")
    for (operator, name), value in ADDED.items():
        if operator == kind and attribute(node, name, value) != value:
            raise _impossible(node, f"{operator} with {name} is new in opset 18")
        if operator == kind:
            drop_attribute(node, name)
    if kind in REDUCTIONS:
        _reduction(node, shapes)
    elif kind == "Split":
        _split(graph, node, shapes)
    elif kind == "Pad" and len(node.input) > 3 and node.input[3]:
        _pad(graph, node, shapes)


def _reduction(node: NodeProto, shapes: _Shapes) -> None:
    axes = _constant(node, 1, shapes)
    nothing = bool(attribute(node, "noop_with_empty_axes", 0)) and (axes is None or not axes.size)
    drop_attribute(node, "noop_with_empty_axes")
    del node.input[1:]
    if nothing:
        del node.attribute[:]
        node.op_type = "Identity"
    elif axes is not None and axes.size:
        node.attribute.append(helper.make_attribute("axes", [int(a) for a in axes]))


def _split(graph: onnx.GraphProto, node: NodeProto, shapes: _Shapes) -> None:
    parts = attribute(node, "num_outputs", 0)
    drop_attribute(node, "num_outputs")
    if not parts:
        return
    dims, axis = shapes.dims.get(node.input[0], []), attribute(node, "axis", 0)
    length = dims[axis] if dims else None
    if length is None:
        raise _impossible(node, "Split into equal parts needs a known length there")
    if length % parts:  # the last part is the smaller one, which 17 wants to be told
        size = -(-length // parts)
        sizes = np.asarray([size] * (parts - 1) + [length - size * (parts - 1)], np.int64)
        node.input[1:] = [_stored(graph, f"{node.output[0]}_lengths", sizes)]


def _pad(graph: onnx.GraphProto, node: NodeProto, shapes: _Shapes) -> None:
    pads, axes = _constant(node, 1, shapes), _constant(node, 3, shapes)
    dims = shapes.dims.get(node.input[0])
    if pads is None or axes is None or dims is None:
        raise _impossible(node, "Pad of chosen axes needs constant pads and a known number of axes there")
    whole = np.zeros((2, len(dims)), np.int64)
    whole[:, axes] = pads.reshape(2, -1)
    del node.input[3:]
    node.input[1] = _stored(graph, f"{node.output[0]}_pads", whole.reshape(-1))


def _constant(node: NodeProto, position: int, shapes: _Shapes) -> NDArray[Any] | None:
    """A constant input; None where the node has none there. Raises StageError for one that is calculated."""
    if len(node.input) <= position or not node.input[position]:
        return None
    if node.input[position] not in shapes.constants:
        raise _impossible(node, f"{node.op_type} needs constant axes and lengths there")
    return shapes.constants[node.input[position]]


def _stored(graph: onnx.GraphProto, name: str, value: NDArray[Any]) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _impossible(node: NodeProto, why: str) -> StageError:
    name = node.name or node.op_type
    return StageError(
        f"{name} cannot be written in ONNX opset {OLDEST}: {why}",
        where=name,
        hint="choose a profile with a newer TensorRT, or opset 18",
    )
