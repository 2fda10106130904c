"""Adaptive rounding (AdaRound)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .graph import operation
from .side_by_side import Layer, layers_side_by_side

__all__ = ["adapt_rounding"]

#: Rows of a layer's input that its rounding is learned from: patches of a convolution, vectors of a linear layer.
ROWS = 8192
BATCH = 512
#: The share of the iterations before the rounding is pushed to a decision.
FREE = 0.2
#: How much an undecided weight costs, where the layer's error from rounding to the nearest is 1.
UNDECIDED = 1.0
RATE = 0.01


def adapt_rounding(prepared: nn.Module, batches: Iterable[Tensor], iterations: int = 1000, seed: int = 0) -> int:
    """Round each weight up or down as it suits its layer's output; returns how many layers got better by it.

    Layer by layer, on `batches` of images [N, C, H, W], with all earlier layers quantized and rounded: minimised is
    the squared difference from the output in the float network, over `iterations` steps of Adam on 8192 rows drawn
    from the layer's input. The bias then takes up the mean difference that is left. The rounded weights replace the
    float ones, so that plain rounding gives them again after saving, loading and converting. A layer for which
    rounding to the nearest is better keeps it. Calibrate first. Convolutions other than 2-d stay as they are.
    Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568; the
    error is divided by that of rounding to the nearest, which makes layers alike in what a decision costs.
    Raises what `layers_side_by_side` raises.
    """
    better = 0
    drawn = torch.Generator().manual_seed(seed)
    for layer in layers_side_by_side(prepared, batches):
        if operation(layer.node) not in {"conv2d", "linear"}:
            continue
        floats, quantized = _rows(layer, drawn)
        target = _product(floats, _grouped(layer, layer.before))
        with torch.enable_grad():
            rounded = _rounded(layer, quantized, target, iterations, drawn)
        nearest = layer.quantizer(layer.weight)
        errors = [target - _product(quantized, _grouped(layer, weight)) for weight in (nearest, rounded)]
        if errors[1].square().sum() < errors[0].square().sum():
            layer.weight.copy_(rounded)
            better += 1
        left = errors[1] if errors[1].square().sum() < errors[0].square().sum() else errors[0]
        if layer.bias is not None:
            layer.bias.add_(left.mean(dim=1).flatten())
    return better


def _rounded(layer: Layer, inputs: Tensor, target: Tensor, iterations: int, drawn: torch.Generator) -> Tensor:
    """The weight on integers, each up or down. inputs [G, R, K], target [G, R, outputs per group]."""
    weight = layer.weight
    shape = [-1 if d == layer.quantizer.ch_axis else 1 for d in range(weight.dim())]
    step = layer.quantizer.qparams(weight)[0].reshape(shape)
    below = torch.floor(weight / step)
    share = (weight / step - below).clamp(0.001, 0.999)
    variable = nn.Parameter(-torch.log(1.2 / (share + 0.1) - 1))
    low, high = layer.quantizer.quant_min, layer.quantizer.quant_max
    with torch.no_grad():
        plain = _product(inputs, _grouped(layer, layer.quantizer(weight)))
        scale = 1 / (target - plain).square().mean().clamp_min(1e-20)
    optimizer = torch.optim.Adam([variable], lr=RATE)
    for iteration in range(iterations):
        rows = torch.randint(inputs.shape[1], (min(BATCH, inputs.shape[1]),), generator=drawn).to(inputs.device)
        up = _up(variable)
        soft = ((below + up).clamp(low, high)) * step
        error = (_product(inputs[:, rows], _grouped(layer, soft)) - target[:, rows]).square().mean() * scale
        progress = (iteration / iterations - FREE) / (1 - FREE)
        if progress > 0:
            beta = 20 + (2 - 20) * progress
            error = error + UNDECIDED * (1 - (2 * up - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    with torch.no_grad():
        hard = (below + (_up(variable) >= 0.5)).clamp(low, high) * step
        # The largest weight of a channel says what its scale is: it stays, and none may exceed it.
        other = [d for d in range(weight.dim()) if d != layer.quantizer.ch_axis]
        largest = weight.abs().amax(dim=other, keepdim=True)
        return torch.where(weight.abs() == largest, weight, hard.clamp(-largest, largest))


def _up(variable: Tensor) -> Tensor:
    """How far up, in [0, 1]: the rectified sigmoid of the paper, equation 23."""
    return (torch.sigmoid(variable) * 1.2 - 0.1).clamp(0, 1)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """[G, R, K] times [G, O, K] -> [G, R, O]."""
    return torch.bmm(rows, weight.transpose(1, 2))


def _grouped(layer: Layer, weight: Tensor) -> Tensor:
    """[groups, outputs per group, K]."""
    groups: Any = layer.node.args[6] if len(layer.node.args) > 6 else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _rows(layer: Layer, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same rows of the layer's input, float and quantized: [groups, R, K] each."""
    images = sum(len(x) for x in layer.floats)
    each = max(1, ROWS // images)
    floats, quantized = [], []
    for x, y in zip(layer.floats, layer.quantized, strict=True):
        seed = int(torch.randint(2**31, (1,), generator=drawn))
        take = _patches if operation(layer.node) == "conv2d" else _vectors
        floats.append(take(layer, x, each, seed))
        quantized.append(take(layer, y, each, seed))
    return torch.cat(floats, dim=1), torch.cat(quantized, dim=1)


def _vectors(layer: Layer, x: Tensor, each: int, seed: int) -> Tensor:
    rows = x.reshape(len(x), -1, x.shape[-1])
    drawn = torch.Generator().manual_seed(seed)
    picked = torch.randint(rows.shape[1], (len(x), min(each, rows.shape[1])), generator=drawn).to(x.device)
    return rows[torch.arange(len(x), device=x.device)[:, None], picked].reshape(1, -1, x.shape[-1])


def _patches(layer: Layer, x: Tensor, each: int, seed: int) -> Tensor:
    """Drawn positions of the output: what the kernel sees there."""
    kernel = layer.weight.shape[2:]
    args: Any = layer.node.args
    stride, padding, dilation = (args[i] if len(args) > i else d for i, d in ((3, [1, 1]), (4, [0, 0]), (5, [1, 1])))
    stride, dilation = list(stride) * (2 // len(stride)), list(dilation) * (2 // len(dilation))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        sides = [0, 0, 0, 0] if padding == "valid" else [s for r in reversed(reach) for s in (r // 2, r - r // 2)]
    else:
        padding = list(padding) * (2 // len(padding))
        sides = [padding[1], padding[1], padding[0], padding[0]]
    padded = nn.functional.pad(x, sides)
    sizes = [(padded.shape[2 + i] - reach[i] - 1) // stride[i] + 1 for i in (0, 1)]
    drawn = torch.Generator().manual_seed(seed)
    corners = [torch.randint(sizes[i], (len(x), each), generator=drawn).to(x.device) * stride[i] for i in (0, 1)]
    ys, xs = (
        corners[i][..., None] + dilation[i] * torch.arange(kernel[i], device=x.device) for i in (0, 1)
    )  # [N, each, kernel]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    found = padded.permute(0, 2, 3, 1)[image, ys[..., :, None], xs[..., None, :]]  # [N, each, kh, kw, C]
    groups: Any = args[6] if len(args) > 6 else 1
    found = found.flatten(0, 1).permute(0, 3, 1, 2)  # [R, C, kh, kw]
    return found.reshape(len(found), groups, -1).transpose(0, 1).contiguous()
