"""Batch norm folded into the convolution in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .fake_quantize import WeightPerChannelFakeQuantize
from .graph import CONVOLUTIONS, attribute, operation

__all__ = ["fold_batch_norm"]


def fold_batch_norm(module: GraphModule) -> int:
    """Fold every batch norm that directly follows a convolution; returns how many. Changes the module in place.

    With s = gamma / sqrt(variance + eps), the weight becomes s*w and the bias beta + (b - mean)*s. As scales are per
    output channel and the integers symmetric, quantize(s*w) = s*quantize(w): what was trained with the batch norm
    behind the fake-quantized convolution is exactly what the folded one computes.
    """
    folded = 0
    for node in list(module.graph.nodes):
        convolution = node.args[0] if operation(node) == "batch_norm" else None
        if not isinstance(convolution, Node) or operation(convolution) not in CONVOLUTIONS:
            continue
        if list(convolution.users) != [node] or node.args[3] is None:
            continue
        _fold(module, convolution, node, folded)
        folded += 1
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return folded


def _fold(module: GraphModule, convolution: Node, norm: Node, number: int) -> None:
    quantizer = _quantizer_of(module, convolution)
    source: Any = convolution.args[1]
    weight = attribute(module, source.args[0] if quantizer else source)
    bias = _optional(module, convolution.args[2] if len(convolution.args) > 2 else None, 0.0)
    gamma, beta = _optional(module, norm.args[1], 1.0), _optional(module, norm.args[2], 0.0)
    mean, variance = (attribute(module, node) for node in norm.args[3:5])
    with torch.no_grad():
        epsilon: Any = norm.args[7]
        factor = torch.rsqrt(variance + epsilon) * gamma
        shift = (bias - mean) * factor + beta
        scaled = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    new_weight = _parameter(module, convolution, f"folded_{number}_weight", scaled, weight.requires_grad)
    new_bias = _parameter(module, convolution, f"folded_{number}_bias", shift, weight.requires_grad)
    if quantizer:
        # A module of its own: tied weights share one, and differently folded they no longer share a range.
        name = f"folded_{number}_quantizer"
        module.add_submodule(name, quantizer.rescaled(factor))
        with module.graph.inserting_before(convolution):
            new_weight = module.graph.call_module(name, (new_weight,))
    convolution.args = (convolution.args[0], new_weight, new_bias, *convolution.args[3:])
    norm.replace_all_uses_with(convolution)
    module.graph.erase_node(norm)


def _optional(module: GraphModule, node: Any, default: float) -> Any:
    return default if node is None else attribute(module, node)


def _quantizer_of(module: GraphModule, convolution: Node) -> WeightPerChannelFakeQuantize | None:
    weight = convolution.args[1]
    if not isinstance(weight, Node) or weight.op != "call_module":
        return None
    quantizer = module.get_submodule(str(weight.target))
    return quantizer if isinstance(quantizer, WeightPerChannelFakeQuantize) else None


def _parameter(module: GraphModule, before: Node, name: str, value: Tensor, trains: bool) -> Node:
    module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=trains))
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)
