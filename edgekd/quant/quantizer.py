"""Where Q/DQ pairs go: read off the graph, per runtime.

ONNX Runtime turns an operator into its integer form only when all its inputs *and* its output are quantized, with the
output's Q behind the batch norm and ReLU that it absorbs. TensorRT wants the inputs of matrix layers and leaves the
outputs alone; of a residual addition it wants only the skip branch, as the other one is fused into the convolution.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from .graph import CONVOLUTIONS, MATRIX, layers, operation, users
from .learned import LearnedActivationFakeQuantize, LearnedPerChannelFakeQuantize
from .pt2e import (
    Q_ANNOTATION_KEY,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from .scheme import Scheme

__all__ = ["PADS", "PlacingQuantizer", "has_weight", "moves", "wanted_float"]

#: Absorbed by the convolution or addition in front of them.
CLAMPS = {"relu", "relu6"}
#: Move values without changing them: what comes out has the scale of what went in.
MOVES = {
    *("flatten", "view", "reshape", "_unsafe_view", "transpose", "permute", "squeeze", "unsqueeze", "slice", "select"),
    *("contiguous", "clone", "max_pool1d", "max_pool2d", "pixel_shuffle", "channel_shuffle"),
}
PADS = {"pad", "constant_pad_nd"}
POOLS = {"mean", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
#: Elementwise: calculated in float between a DQ and a Q, so that the chain of int8 tensors is not broken.
ELEMENTWISE = {"relu", "relu6", "hardtanh", "clamp", "leaky_relu", "hardswish", "hardsigmoid", "sigmoid", "silu"}


class PlacingQuantizer(Quantizer):
    """Annotates an exported, functional graph according to a scheme; what lies in `float_layers` stays float."""

    def __init__(self, scheme: Scheme, float_layers: Collection[str] = (), learned: bool = False) -> None:
        super().__init__()
        self.float_layers = frozenset(float_layers)
        self.placement = scheme.placement
        unsigned = scheme.activation_dtype == "uint8"
        self.activation = QuantizationSpec(
            dtype=torch.uint8 if unsigned else torch.int8,
            observer_or_fake_quant_ctr=LearnedActivationFakeQuantize if learned else ActivationFakeQuantize,
            quant_min=0 if unsigned else -128,
            quant_max=255 if unsigned else 127,
            qscheme=torch.per_tensor_symmetric if scheme.activation_symmetric else torch.per_tensor_affine,
        )
        # -128 is left out: a symmetric range makes quantization commute with the sign of a folded batch norm.
        largest = 2 ** (scheme.weight_bits - 1) - 1
        self.weight = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=LearnedPerChannelFakeQuantize if learned else WeightPerChannelFakeQuantize,
            quant_min=-largest,
            quant_max=largest,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Set the annotation of every node that is to be quantized."""
        for node in model.graph.nodes:
            if node.op != "call_function" or Q_ANNOTATION_KEY in node.meta or wanted_float(node, self.float_layers):
                continue
            if self.placement == "tensorrt":
                self._for_tensorrt(node)
            else:
                self._for_onnxruntime(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what cannot be quantized stays float."""

    def _for_onnxruntime(self, node: Node) -> None:
        name = operation(node)
        tensors = [a for a in node.args if isinstance(a, Node)]
        if has_weight(node):
            self._inputs(node, {node.args[0]: self.activation, node.args[1]: self.weight})
            # A linear layer dequantizes by itself. Its output stays float: logits keep their precision, and between
            # the layers of a transformer float elementwise work is the faster one.
            if name in CONVOLUTIONS:
                self._output(_last_absorbed(node), self.activation)
        elif name in {"add", "mul"} and len(tensors) == 2 and any(map(_quantized, tensors)) and _all_computed(tensors):
            self._inputs(node, dict.fromkeys(tensors, self.activation))
            self._output(_last_absorbed(node), self.activation)
        elif name == "cat" and isinstance(node.args[0], list | tuple) and all(map(_quantized, node.args[0])):
            # Each part keeps its own scale: the integer operator takes one per input.
            self._inputs(node, dict.fromkeys(node.args[0], self.activation))
            self._output(node, self.activation)
        elif tensors and _quantized(tensors[0]):
            if moves(node):
                self._inputs(node, {tensors[0]: self.activation})
                self._output(node, SharedQuantizationSpec((tensors[0], node)))
            elif name in POOLS or name in ELEMENTWISE:
                self._inputs(node, {tensors[0]: self.activation})
                self._output(node, self.activation)

    def _for_tensorrt(self, node: Node) -> None:
        name = operation(node)
        if has_weight(node):
            self._inputs(node, {node.args[0]: self.activation, node.args[1]: self.weight})
        elif name == "add":
            skip = _skip_branch(node)
            if skip is not None:
                self._inputs(node, {skip: self.activation})

    def _inputs(self, node: Node, specs: dict[Any, QuantizationSpec]) -> None:
        _annotation(node).input_qspec_map.update(specs)

    def _output(self, node: Node, spec: object) -> None:
        _annotation(node).output_qspec = spec


def _annotation(node: Node) -> QuantizationAnnotation:
    return node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))


def _quantized(node: object) -> bool:
    """Whether this value comes out of a Q/DQ pair."""
    if not isinstance(node, Node):
        return False
    if operation(node) == "dropout":
        return _quantized(node.args[0])
    return Q_ANNOTATION_KEY in node.meta and node.meta[Q_ANNOTATION_KEY].output_qspec is not None


def wanted_float(node: Node, float_layers: Collection[str]) -> bool:
    """Whether the node belongs to one of the modules that are to stay float."""
    return any(path in float_layers for path in layers(node))


def has_weight(node: Node) -> bool:
    """A matrix layer whose weight is a plain parameter, not one calculated from others."""
    return operation(node) in MATRIX and isinstance(node.args[1], Node) and node.args[1].op == "get_attr"


def _all_computed(tensors: list[Node]) -> bool:
    """Neither parameters (a position embedding, a layer scale) nor shape arithmetic."""
    return all(t.op == "call_function" and isinstance(t.meta.get("val"), torch.Tensor) for t in tensors)


def _last_absorbed(node: Node) -> Node:
    """The end of `node -> batch norm -> ReLU`, as far as nobody else looks at the values in between."""
    for wanted in ({"batch_norm"}, CLAMPS) if operation(node) in CONVOLUTIONS else (CLAMPS,):
        following = users(node)
        if len(following) == 1 and (
            operation(following[0]) in wanted or (CLAMPS is wanted and _is_relu6(following[0]))
        ):
            node = following[0]
    return node


def _is_relu6(node: Node) -> bool:
    return operation(node) in {"hardtanh", "clamp"} and len(node.args) == 3 and bool(node.args[1] == 0)


def moves(node: Node) -> bool:
    """Whether the node only moves values of its first input; padding with zero does, as every range holds 0."""
    name = operation(node)
    if name in PADS:
        return all(value in ("constant", 0, None) for value in (*node.args[2:], *node.kwargs.values()))
    return name in MOVES


def _skip_branch(node: Node) -> Node | None:
    """Of `convolution(...) + x`, the x; of two convolutions, the second one. None if no int8 convolution is added."""
    tensors = [a for a in node.args if isinstance(a, Node)]
    if len(tensors) != 2 or not _all_computed(tensors):
        return None
    first, second = (_is_convolution(t) for t in tensors)
    if not first and not second:
        return None
    return tensors[1] if first else tensors[0]


def _is_convolution(node: Node) -> bool:
    while operation(node) == "batch_norm" and isinstance(node.args[0], Node) and len(users(node)) == 1:
        node = node.args[0]
    return operation(node) in CONVOLUTIONS and Q_ANNOTATION_KEY in node.meta and len(users(node)) == 1
