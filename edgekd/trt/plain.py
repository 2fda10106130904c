"""The float sibling of a Q/DQ file: the same network without its integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from ..errors import StageError
from ..onnx_edit import attribute, copied, drop_unread, lift_constants

__all__ = ["fold_constants", "without_integers"]

#: Operators that give out the values that went in, whatever type they have.
MOVES = {
    *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice"),
    *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
INTEGER_TYPES = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}


def without_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a Q/DQ file in float32: pairs on activations gone, stored integers dequantized to the same values.

    Its outputs differ from the file's by the rounding and clipping of activations alone. Operators between Q and DQ
    may only move values. Raises StageError, naming the node, for any other operator on integers.
    """
    model = copied(model)
    graph = model.graph
    lift_constants(graph)
    fold_constants(graph, integers=INTEGER_TYPES | {TensorProto.INT32})
    stored = {tensor.name: tensor for tensor in graph.initializer}
    #: The names of integer tensors, each with the scale and zero point it was quantized with.
    integers: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    #: What is to be read instead of a tensor that goes.
    instead: dict[str, str] = {}
    kept = []
    for node in graph.node:
        quantized = next((integers[name] for name in node.input if name in integers), None)
        for position, name in enumerate(node.input):
            node.input[position] = instead.get(name, name)
        if node.op_type == "QuantizeLinear" and quantized is None:
            integers[node.output[0]] = _parameters(node, stored)
            instead[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and quantized is not None:
            instead[node.output[0]] = node.input[0]
        elif quantized is None and node.op_type not in ("DequantizeLinear", "QLinearConv", "QLinearMatMul"):
            kept.append(node)
        elif quantized is not None and node.op_type in MOVES:
            integers |= dict.fromkeys(node.output, quantized)
            if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
                _pad_with_floats(graph, node, stored, quantized)
            kept.append(node)
        else:
            name = node.name or node.op_type
            raise StageError(f"{name} ({node.op_type}) computes with integers: it has no float form here", where=name)
    _rename_outputs(graph, kept, instead)
    del graph.node[:]
    graph.node.extend(kept)
    del graph.value_info[:]
    drop_unread(graph)
    _check(model)
    return model


def fold_constants(graph: onnx.GraphProto, integers: set[int]) -> None:
    """Dequantize stored tensors of these integer types to float32 initializers that take the place of their DQ."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if tensor is None or tensor.data_type not in integers:
            kept.append(node)
            continue
        scale, zero_point = _parameters(node, stored)
        values = numpy_helper.to_array(tensor)
        shape = [1] * values.ndim
        if scale.size > 1:
            shape[attribute(node, "axis", 1)] = -1
        scale, zero_point = (v.reshape(shape) if v.size > 1 else v.reshape(()) for v in (scale, zero_point))
        floats = ((values.astype(np.int64) - zero_point) * scale.astype(np.float32)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(floats, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def _parameters(node: NodeProto, stored: dict[str, TensorProto]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(scale, zero point) of a Q or DQ node."""
    names = list(node.input[1:])
    if any(name and name not in stored for name in names):
        name = node.name or node.op_type
        raise StageError(f"{name} takes a scale that is calculated, not stored", where=name)
    found = [numpy_helper.to_array(stored[name]) for name in names if name]
    return found[0].astype(np.float32), found[1].astype(np.int64) if len(found) > 1 else np.zeros((), np.int64)


def _pad_with_floats(
    graph: onnx.GraphProto,
    node: NodeProto,
    stored: dict[str, TensorProto],
    quantized: tuple[NDArray[Any], NDArray[Any]],
) -> None:
    scale, zero_point = quantized
    value = numpy_helper.to_array(stored[node.input[2]]).astype(np.int64)
    floats = ((value - zero_point) * scale).astype(np.float32).reshape(())
    node.input[2] = f"{node.output[0]}_value"
    graph.initializer.append(numpy_helper.from_array(floats, node.input[2]))


def _rename_outputs(graph: onnx.GraphProto, kept: list[NodeProto], instead: dict[str, str]) -> None:
    """Let what is now the source of an output of the file carry its name."""
    for output in graph.output:
        source = instead.get(output.name)
        if source is not None:
            kept.append(onnx.helper.make_node("Identity", [source], [output.name], name=f"{output.name}_plain"))


def _check(model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"the float file is not valid ONNX: {error}", where="fp32") from error
