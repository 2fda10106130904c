"""The last touches before and after torchao's conversion, where runtimes are particular about integers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from .graph import MATRIX, attribute, operation
from .quantizer import PADS

__all__ = ["TRANSPOSED", "fix_weight_scales", "keep_float", "pad_integers", "quantize_biases"]

TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}

#: A bias of this many steps of its int32 scale still leaves room for the sum of products.
MOST_STEPS = 2**30


def fix_weight_scales(module: GraphModule) -> None:
    """Tell every weight's fake-quantize module what to convert with.

    Runtimes keep the bias as int32 with the scale of input times weight. A dead channel, all weights near 0, would
    make that scale so small that its bias overflows: such channels get a larger weight scale.
    """
    for node in module.graph.nodes:
        quantizer = _module(module, node.args[1]) if operation(node) in MATRIX else None
        if not isinstance(quantizer, WeightPerChannelFakeQuantize):
            continue
        weight = attribute(module, node.args[1].args[0]).detach()
        bias, activation = _bias(module, node), _module(module, node.args[0])
        floor = None
        if bias is not None and isinstance(activation, ActivationFakeQuantize):
            floor = bias.detach().abs() / (activation.calculate_qparams()[0] * MOST_STEPS)
        quantizer.converting(weight, floor)


def pad_integers(module: GraphModule) -> None:
    """Turn `dequantize, pad with 0, quantize` into padding with the zero point: ONNX Runtime would pad in float."""
    operators = torch.ops.quantized_decomposed
    for node in list(module.graph.nodes):
        source = node.args[0] if operation(node) in PADS else None
        following = list(node.users)
        if (
            isinstance(source, Node)
            and source.target is operators.dequantize_per_tensor.default
            and following
            and all(u.target is operators.quantize_per_tensor.default for u in following)
            and all(u.args[1:] == source.args[1:] for u in following)
        ):
            value = source.args[2]
            node.args = (source.args[0], node.args[1], *(("constant", value) if operation(node) == "pad" else (value,)))
            node.kwargs = {}
            for user in following:
                user.replace_all_uses_with(node)
                module.graph.erase_node(user)
    module.graph.eliminate_dead_code()
    module.recompile()


def quantize_biases(module: GraphModule) -> None:
    """Biases as int32 with the scale of input times weight: ONNX Runtime's Gemm stays float without."""
    operators = torch.ops.quantized_decomposed
    for number, node in enumerate(list(module.graph.nodes)):
        if operation(node) not in MATRIX or not _is_matrix_of_integers(node):
            continue
        bias = _bias(module, node)
        if bias is None or (operation(node) == "linear" and node.meta["val"].dim() != 2):
            # Behind a product of more dimensions the bias is an addition of its own.
            continue
        scales = attribute(module, node.args[1].args[1]).float() * float(node.args[0].args[1])
        limit = 2**31 - 1
        integers = torch.round(bias.detach().double() / scales.double()).clamp(-limit, limit).to(torch.int32)
        names = [f"bias_{number}_{part}" for part in ("integers", "scales", "zero_points")]
        values = [integers, scales, torch.zeros_like(integers, dtype=torch.int64)]
        with module.graph.inserting_before(node):
            parts = []
            for name, value in zip(names, values, strict=True):
                module.register_buffer(name, value)
                parts.append(module.graph.get_attr(name))
            new = module.graph.call_function(
                operators.dequantize_per_channel.default, (*parts, 0, -limit - 1, limit, torch.int32)
            )
        node.update_arg(2, new)
    module.graph.eliminate_dead_code()
    module.recompile()


def keep_float(module: GraphModule) -> None:
    """Give the float products that read integers one (equal) scale per channel of their input.

    ONNX Runtime quantizes float weights by itself, with one scale for the whole tensor, wherever the input of a Conv
    or Gemm comes from integers of one scale (its WeightBiasQuantization; seen in 1.32). What was to stay float for its
    accuracy would be worse off than all others. Several scales, though the same, make it leave the layer alone.
    """
    operators = torch.ops.quantized_decomposed
    for number, node in enumerate(list(module.graph.nodes)):
        if operation(node) not in MATRIX | TRANSPOSED or _is_matrix_of_integers(node):
            continue
        source = node.args[0]
        if source.target is not operators.dequantize_per_tensor.default:
            continue
        if operation(node) == "linear" and node.meta["val"].dim() != 2:
            continue  # a MatMul, which is left alone
        integers, scale, zero_point, *limits = source.args
        channels = _input_channels(module, node)
        names = [f"float_{number}_scales", f"float_{number}_zero_points"]
        values = [torch.full((channels,), scale), torch.full((channels,), zero_point, dtype=torch.int64)]
        with module.graph.inserting_before(node):
            parts = []
            for name, value in zip(names, values, strict=True):
                module.register_buffer(name, value)
                parts.append(module.graph.get_attr(name))
            new = module.graph.call_function(operators.dequantize_per_channel.default, (integers, *parts, 1, *limits))
        node.update_arg(0, new)
    module.graph.eliminate_dead_code()
    module.recompile()


def _input_channels(module: GraphModule, node: Node) -> int:
    weight: Any = node.args[1]
    shape = attribute(module, weight).shape if weight.op == "get_attr" else weight.meta["val"].shape
    if operation(node) in TRANSPOSED:
        return int(shape[0])
    groups: Any = node.args[6] if len(node.args) > 6 else 1
    return int(shape[1]) * groups


def _is_matrix_of_integers(node: Node) -> bool:
    operators = torch.ops.quantized_decomposed
    wanted = (operators.dequantize_per_tensor.default, operators.dequantize_per_channel.default)
    return all(isinstance(a, Node) and a.target is w for a, w in zip(node.args, wanted, strict=False))


def _bias(module: GraphModule, node: Node) -> torch.Tensor | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return attribute(module, bias) if isinstance(bias, Node) and bias.op == "get_attr" else None


def _module(module: GraphModule, node: Any) -> torch.nn.Module | None:
    return module.get_submodule(str(node.target)) if isinstance(node, Node) and node.op == "call_module" else None
