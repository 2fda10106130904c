"""Fake quantization with learned scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fake_quantize import SMALLEST, ActivationFakeQuantize, WeightPerChannelFakeQuantize

__all__ = ["LearnedActivationFakeQuantize", "LearnedPerChannelFakeQuantize"]


class LearnedActivationFakeQuantize(ActivationFakeQuantize):
    """The logarithm of the scale is a parameter, the zero point stays as calibrated: calibrate before training.

    The gradient with respect to the scale is LSQ's (Esser et al. 2020, "Learned Step Size Quantization",
    arXiv:1902.08153). Learned is its logarithm (Jain et al. 2020, "Trained Quantization Thresholds",
    arXiv:1903.08066), in place of LSQ's factor 1 / sqrt(N * quant_max): at 8 bits a step of the usual learning rate
    is a multiple of the scale itself, which the paper meets with a learning rate of 0.001 for the whole network.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.scale
        self.log_scale = nn.Parameter(torch.zeros(1))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return _scale(self.log_scale.detach()), self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if self.collector is not None:
            self.collector(x.detach())
            return x
        if not self.quantizes:
            return x
        scale = _scale(self.log_scale)
        found: Tensor = _LearnedStep.apply(x, scale, self.zero_point, self.quant_min, self.quant_max, None)
        return found

    def _settle(self) -> None:
        scale, zero_point = self.qparams(self.lowest, self.highest)
        self.log_scale.copy_(scale.log())
        self.zero_point.copy_(zero_point)


class LearnedPerChannelFakeQuantize(WeightPerChannelFakeQuantize):
    """One learned scale per slice along `ch_axis`; at first max |w| / quant_max. Sources: as for activations."""

    log_scale: nn.Parameter

    def learn(self, weight: Tensor) -> None:
        """Start from the range of `weight`, whose C slices get a scale each."""
        self.log_scale = nn.Parameter(super().qparams(weight)[0].log())

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = _scale(self.log_scale.detach())
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def rescaled(self, factor: Tensor) -> WeightPerChannelFakeQuantize:
        new = super().rescaled(factor)
        new.log_scale = nn.Parameter(self.log_scale.detach() + factor.abs().clamp_min(SMALLEST).log())
        return new

    def forward(self, weight: Tensor) -> Tensor:
        if not self.quantizes:
            return weight
        scale = _scale(self.log_scale)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        found: Tensor = _LearnedStep.apply(weight, scale, zero_point, self.quant_min, self.quant_max, self.ch_axis)
        return found


def _scale(logarithm: Tensor) -> Tensor:
    return logarithm.exp().clamp_min(SMALLEST)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with a gradient for the scale, in float32 whatever comes in.

    d y / d scale is round(x / scale) - x / scale within the range, and the nearest bound (less the zero point) beyond.
    Both are (y - x where x is within the range) / scale, so only x is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.settings = low, high, axis
        return _fake_quantize(x.float(), scale, zero_point, low, high, axis).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        low, high, axis = ctx.settings
        gradient, value = gradients[0].float(), x.float()
        shape = [-1 if d == axis else 1 for d in range(value.dim())]
        step, zero = scale.reshape(shape), zero_point.reshape(shape)
        inside = (value >= (low - zero - 0.5) * step) & (value <= (high - zero + 0.5) * step)
        passed = gradient * inside
        y = _fake_quantize(value, scale, zero_point, low, high, axis)
        by_scale = y.mul_(gradient).sub_(value * passed)
        other = [d for d in range(value.dim()) if d != axis]
        return passed.to(x.dtype), by_scale.sum(dim=other).reshape(-1) / scale, None, None, None, None


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, low, high)
