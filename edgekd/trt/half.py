"""Typed half precision: a file in which tensors and weights are float16, for builds that take types from the file.

What stays float32, between casts:

- the file's own inputs and outputs, so that a caller need not know;
- sums over many values (means over an image, norms): added up in float16, the 1024 values of a 32x32 mean may lose
  three of its eleven bits, or pass 65504 on the way to a mean that would fit;
- operators that have no float16 form, and those with a constant that float16 would make 0 or infinite (an epsilon).

A softmax does not: it subtracts the maximum first, so its sum is at most the number of tokens, and attention kernels
fuse only where all of it is float16. Nor does LayerNormalization, which ONNX defines to keep its statistics in
float32 (`stash_type`), nor products, which GPUs add up in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..errors import StageError
from ..onnx_edit import attribute, copied, drop_unread, lift_constants, opset_of
from ..onnx_opset import upgraded
from .scales import half_scales

__all__ = ["LARGEST_HALF", "in_half"]

LARGEST_HALF = float(np.finfo(np.float16).max)
#: QuantizeLinear and DequantizeLinear take float16 from here on.
TYPED_OPSET = 19
SUMS = {
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"),
    *("ReduceSumSquare", "GlobalAveragePool", "GlobalLpPool", "LpPool", "LpNormalization", "CumSum"),
    *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "MeanVarianceNormalization"),
}


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a float32 or Q/DQ file with float16 inside; inputs and outputs keep their types.

    A Q/DQ file gets float16 scales, for which it goes up to opset 19 at least. Raises StageError, naming the tensor
    or the node: a weight that float16 cannot hold, a scale below what it can, control flow.
    """
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    model = upgraded(model, TYPED_OPSET) if quantized else copied(model)
    if model.functions or any(a.HasField("g") or a.graphs for n in model.graph.node for a in n.attribute):
        raise StageError("functions, branches and loops are not written in float16", where="fp16")
    lift_constants(model.graph)
    half_scales(model)
    _Halving(model).run()
    return _checked(model)


class _Halving:
    """Rewrites a graph. Each float tensor has a float16 form, a float32 form, or both, with a cast between them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph, self.opset = model.graph, opset_of(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        typed = (*inferred.value_info, *inferred.input, *inferred.output)
        self.floats = {v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.stored = {t.name: t for t in model.graph.initializer}
        self.floats |= {name for name, t in self.stored.items() if t.data_type == TensorProto.FLOAT}
        #: Both ends of the file keep their names, and float32.
        self.ends = {v.name for v in (*model.graph.input, *model.graph.output)}
        self.made = {v.name for v in model.graph.input}
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def run(self) -> None:
        for node in self.graph.node:
            self._convert(node)
        for output in self.graph.output:
            if output.name in self.floats:
                self._full(output.name)
        kept = [t for t in self.graph.initializer if t.name not in self.floats]
        del self.graph.initializer[:], self.graph.node[:]
        self.graph.initializer.extend([*kept, *self.constants.values()])
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]

    def _convert(self, node: NodeProto) -> None:
        half = self._takes_half(node)
        for position, name in enumerate(node.input):
            if name in self.floats:
                wanted = half and _may_be_half(self._parameter(node, position))
                node.input[position] = self._half(name) if wanted else self._full(name)
        if node.op_type == "Cast" and half and attribute(node, "to", 0) == TensorProto.FLOAT:
            node.attribute[0].i = TensorProto.FLOAT16
        for position, name in enumerate(node.output):
            if name in self.floats:
                node.output[position] = self._name(name, half)
                self.made.add(node.output[position])
        self.nodes.append(node)

    def _takes_half(self, node: NodeProto) -> bool:
        """Whether a node runs in float16."""
        if node.op_type == "Cast":
            return True
        floats = [name for name in node.input if name in self.floats]
        if node.op_type in SUMS or not floats or self._parameters(node) is None:
            return False
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return True
        if node.op_type == "LayerNormalization" and attribute(node, "stash_type", 1) != TensorProto.FLOAT:
            return False
        if any(name in self.stored and _lost(self.stored[name]) for name in floats):
            return False
        halves = [self._parameter(node, i) for i, name in enumerate(node.input) if name in self.floats]
        return any(map(_may_be_half, halves))

    def _parameters(self, node: NodeProto) -> Any:
        try:
            return onnx.defs.get_schema(node.op_type, self.opset, node.domain).inputs
        except onnx.defs.SchemaError:
            return None

    def _parameter(self, node: NodeProto, position: int) -> Any:
        parameters = self._parameters(node)
        return parameters[min(position, len(parameters) - 1)]  # the last one may be repeated

    def _name(self, name: str, half: bool) -> str:
        if name in self.ends:
            return f"{name}_half" if half else name
        return name if half else f"{name}_float"

    def _half(self, name: str) -> str:
        return self._form(name, True)

    def _full(self, name: str) -> str:
        return self._form(name, False)

    def _form(self, name: str, half: bool) -> str:
        """The name of a tensor's float16 or float32 form, which is made if it is not there."""
        found = self._name(name, half)
        if found in self.made:
            return found
        if name in self.stored:
            value = numpy_helper.to_array(self.stored[name])
            self.constants[found] = numpy_helper.from_array(_halved(value, name) if half else value, found)
        else:
            kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            source = self._name(name, not half)
            self.nodes.append(helper.make_node("Cast", [source], [found], name=f"{found}_cast", to=kind))
        self.made.add(found)
        return found


def _may_be_half(parameter: Any) -> bool:
    return "tensor(float16)" in parameter.types


def _lost(tensor: TensorProto) -> bool:
    """Whether float16 turns a constant of one value into 0 or infinity."""
    if int(np.prod(tensor.dims)) != 1:
        return False
    value = abs(float(numpy_helper.to_array(tensor).reshape(())))
    return np.isfinite(value) and (value > LARGEST_HALF or (value > 0 and np.float16(value) == 0))


def _halved(value: NDArray[Any], name: str) -> NDArray[np.float16]:
    largest = float(np.abs(value[np.isfinite(value)]).max(initial=0.0))
    if largest > LARGEST_HALF:
        raise StageError(
            f"{name} holds {largest:.3g}, beyond float16's {LARGEST_HALF:.0f}",
            where=name,
            hint="fold batch norms, or train with weight decay; such a network needs fp32",
        )
    return value.astype(np.float16)


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    drop_unread(model.graph)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"the float16 file is not valid ONNX: {error}", where="fp16") from error
    return model
