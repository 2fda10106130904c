"""Fake quantization with learned scales (LSQ)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .fake_quantize import SMALLEST, ActivationFakeQuantize, WeightPerChannelFakeQuantize

__all__ = ["LearnedActivationFakeQuantize", "LearnedWeightFakeQuantize"]


class LearnedActivationFakeQuantize(ActivationFakeQuantize):
    """The scale is a parameter, the zero point stays as calibrated: calibrate before training.

    Its gradient is multiplied by 1 / sqrt(values per image * quant_max), so that scale and weights move at the same
    pace. Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        start = self.scale
        del self.scale
        self.scale = nn.Parameter(start)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return _positive(self.scale.detach()), self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if self.collector is not None:
            self.collector(x.detach())
            return x
        if not self.quantizes:
            return x
        pace = 1 / math.sqrt(x[0].numel() * self.quant_max)
        found: Tensor = _LearnedStep.apply(
            x, _positive(self.scale), self.zero_point, self.quant_min, self.quant_max, None, pace
        )
        return found


class LearnedWeightFakeQuantize(WeightPerChannelFakeQuantize):
    """One learned scale per slice along `ch_axis`; at first max |w| / quant_max. Source: as for activations."""

    def learn(self, weight: Tensor) -> None:
        """Start from the range of `weight`, whose C slices get a scale each."""
        self.scale = nn.Parameter(super().qparams(weight)[0])

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = _positive(self.scale.detach())
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def rescaled(self, factor: Tensor) -> WeightPerChannelFakeQuantize:
        new = super().rescaled(factor)
        new.scale = nn.Parameter(_positive(self.scale.detach() * factor))
        return new

    def forward(self, weight: Tensor) -> Tensor:
        if not self.quantizes:
            return weight
        scale = _positive(self.scale)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        pace = 1 / math.sqrt(weight.numel() / len(scale) * self.quant_max)
        found: Tensor = _LearnedStep.apply(
            weight, scale, zero_point, self.quant_min, self.quant_max, self.ch_axis, pace
        )
        return found


def _positive(scale: Tensor) -> Tensor:
    """What a scale stands for: a step of the optimizer may take it below zero, which must not end its learning."""
    return scale.abs().clamp_min(SMALLEST)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with a gradient for the scale, in float32 whatever comes in.

    d y / d scale is round(x / scale) - x / scale within the range, and the nearest bound (less the zero point) beyond.
    Both are (y - x where x is within the range) / scale, so only x is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None, pace: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.settings = low, high, axis, pace
        return _fake_quantize(x.float(), scale, zero_point, low, high, axis).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        low, high, axis, pace = ctx.settings
        gradient, value = gradients[0].float(), x.float()
        shape = [-1 if d == axis else 1 for d in range(value.dim())] if axis is not None else [1] * value.dim()
        step, zero = scale.reshape(shape), zero_point.reshape(shape)
        inside = (value >= (low - zero - 0.5) * step) & (value <= (high - zero + 0.5) * step)
        passed = gradient * inside
        y = _fake_quantize(value, scale, zero_point, low, high, axis)
        by_scale = y.mul_(gradient).sub_(value * passed)
        other = [d for d in range(value.dim()) if d != axis]
        to_scale = by_scale.sum(dim=other).reshape(-1) / scale * pace
        return passed.to(x.dtype), to_scale, None, None, None, None, None


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, low, high)
