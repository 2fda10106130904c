"""Fake quantization with learned scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fake_quantize import SMALLEST, ActivationFakeQuantize, WeightPerChannelFakeQuantize, fake_quantize, inside

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
        found: Tensor = _LearnedStep.apply(x, scale, self.zero_point, self.quant_min, self.quant_max)
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
        found: Tensor = _LearnedChannelStep.apply(weight, scale, self.quant_max, self.ch_axis)
        return found


def _scale(logarithm: Tensor) -> Tensor:
    return logarithm.exp().clamp_min(SMALLEST)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization of a tensor with a gradient for its scale, in float32 whatever comes in.

    d y / d scale is round(x / scale) - x / scale within the range, and the nearest bound (less the zero point) beyond.
    Both are (y - x where x is within the range) / scale, so only x is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = low, high
        return fake_quantize(x, scale, zero_point, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        value, quantizing = x.float(), (scale, zero_point, *ctx.limits)
        error = fake_quantize(value, *quantizing).sub_(inside(value, value, *quantizing))
        to_scale = error.mul_(gradients[0]).sum().reshape(1) / scale
        return inside(gradients[0], x, *quantizing), to_scale, None, None, None


class _LearnedChannelStep(torch.autograd.Function):
    """The same for the slices along an axis, each with its scale and zero point 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, largest: int, axis: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.settings = largest, axis
        return _fake_quantize_channels(x, scale, largest, axis).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        largest, axis = ctx.settings
        gradient, value = gradients[0].float(), x.float()
        within = value.abs() <= (largest + 0.5) * scale.reshape([-1 if d == axis else 1 for d in range(x.dim())])
        error = _fake_quantize_channels(value, scale, largest, axis) - value * within
        to_scale = (error * gradient).sum(dim=[d for d in range(x.dim()) if d != axis]) / scale
        return (gradient * within).to(x.dtype), to_scale, None, None


def _fake_quantize_channels(x: Tensor, scale: Tensor, largest: int, axis: int) -> Tensor:
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x.float(), scale, zero_point, axis, -largest, largest)
