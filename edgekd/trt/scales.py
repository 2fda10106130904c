"""Scales of Q/DQ pairs that float16 can hold."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from ..errors import StageError
from ..onnx_edit import attribute
from .plain import fold_constants

__all__ = ["half_scales"]

#: The reciprocal of a smaller scale, by which runtimes may multiply, is beyond float16.
SMALLEST_ACTIVATION_SCALE = 1 / float(np.finfo(np.float16).max)


def half_scales(model: onnx.ModelProto) -> None:
    """Round every constant scale of a Q/DQ file up to a value of float16, in place; tensors stay float32.

    Up, so that no value leaves its range. Integer weights are rounded again where the scale moves far, as it does for
    channels of very small weights. Raises StageError, naming the tensor, for an activation whose scale is too small.
    """
    graph = model.graph
    # Biases of int32: their steps are below what float16 can hold, and TensorRT takes no quantized bias anyway.
    fold_constants(graph, integers={TensorProto.INT32})
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in stored:
            readers[node.input[1]].append(node)
    requantized: set[str] = set()
    for name, group in readers.items():
        scale = numpy_helper.to_array(stored[name]).astype(np.float32)
        rounded = _up(scale)
        if not np.isfinite(rounded).all():
            raise StageError(f"the scale of {group[0].input[0]} is beyond float16", where=group[0].input[0])
        for node in group:
            if node.input[0] in stored:
                if node.input[0] not in requantized:
                    _requantize(stored[node.input[0]], node, scale / rounded)
                requantized.add(node.input[0])
            elif rounded.min() < SMALLEST_ACTIVATION_SCALE:
                raise StageError(
                    f"the scale {scale.min():.3g} of {node.input[0]} is too small for float16",
                    where=node.input[0],
                    hint="its values are next to nothing: prune the layer in front of it away, or keep it in float",
                )
        stored[name].CopyFrom(numpy_helper.from_array(rounded, name))


def _up(scale: NDArray[Any]) -> NDArray[np.float32]:
    """The next values of float16 that are not smaller."""
    near = scale.astype(np.float16)
    return np.where(near.astype(np.float32) < scale, np.nextafter(near, np.float16(np.inf)), near).astype(np.float32)


def _requantize(tensor: onnx.TensorProto, node: NodeProto, factor: NDArray[Any]) -> None:
    integers = numpy_helper.to_array(tensor)
    if integers.dtype.kind not in "iu":
        return  # a float weight that the file quantizes as it runs
    if factor.size > 1:
        shape = [1] * integers.ndim
        shape[attribute(node, "axis", 1)] = -1
        factor = factor.reshape(shape)
    new = np.rint(integers * factor.astype(np.float64)).astype(integers.dtype)
    if not np.array_equal(new, integers):
        tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
