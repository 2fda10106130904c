"""The two fake-quantize modules: activations with tracked ranges, weights whose range is their own maximum.

torchao's own modules are not used: they keep observing in evaluation (the ranges drift with every test image), fail
under bfloat16 autocast, set no scale while quantizing is off, and convert with scales other than those they trained
with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pt2e import FakeQuantizeBase

__all__ = ["SMALLEST", "ActivationFakeQuantize", "WeightPerChannelFakeQuantize", "fake_quantize", "inside"]

#: The smallest scale: a channel of zeros must not get scale 0, which TensorRT refuses and which divides by zero.
SMALLEST = 1e-9


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """x rounded to integers from `low` to `high` and back, calculated in float32 whatever its type.

    On a CPU these five operators are faster than `torch.fake_quantize_per_tensor_affine` (torch 2.13).
    """
    if x.device.type != "cpu":
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, low, high).to(x.dtype)
    step, zero = scale.item(), zero_point.item()
    y = x * (1 / step) if x.dtype == torch.float32 else x.float().mul_(1 / step)
    return y.round_().clamp_(low - zero, high - zero).mul_(step).to(x.dtype)


def inside(values: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`values` where x is rounded to an integer within the range, 0 elsewhere."""
    if x.device.type == "cpu":
        step, zero = scale.item(), zero_point.item()
        bounds = (low - zero - 0.5) * step, (high - zero + 0.5) * step
        return torch.ops.aten.hardtanh_backward(values, x, *bounds)
    return values * ((x >= (low - zero_point - 0.5) * scale) & (x <= (high - zero_point + 0.5) * scale))


class FakeQuantize(torch.autograd.Function):
    """Fake quantization with the straight-through gradient: 1 within the range, 0 beyond. Keeps x alone for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        # The range moves on before the backward pass where a module runs twice.
        ctx.save_for_backward(x, scale.clone(), zero_point.clone())
        ctx.limits = low, high
        return fake_quantize(x, scale, zero_point, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        return inside(gradients[0], x, scale, zero_point, *ctx.limits), None, None, None, None


class _Switched(FakeQuantizeBase):
    """torchao's two switches, with a copy outside the tensors: reading those would stall a GPU in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizes = self.observes = True

    def enable_fake_quant(self, enabled: bool = True) -> None:
        super().enable_fake_quant(enabled)
        self.quantizes = enabled

    def enable_observer(self, enabled: bool = True) -> None:
        super().enable_observer(enabled)
        self.observes = enabled

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.quantizes = bool(self.fake_quant_enabled.item())
        self.observes = bool(self.observer_enabled.item())


class ActivationFakeQuantize(_Switched):
    """One scale and zero point for a tensor of any shape; the range is a moving average of each batch's extremes.

    Observes only in training mode (or while `calibrate` runs), so evaluation never moves a range.
    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(
        self, dtype: torch.dtype, qscheme: torch.qscheme, quant_min: int, quant_max: int, is_dynamic: bool = False
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme = dtype, qscheme
        self.quant_min, self.quant_max, self.is_dynamic = quant_min, quant_max, is_dynamic
        self.averaging = 0.01
        #: Calibration looks at what passes through this; while it is set, nothing is quantized.
        self.collector: Callable[[Tensor], None] | None = None
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("lowest", torch.tensor([float("inf")]))
        self.register_buffer("highest", torch.tensor([float("-inf")]))

    @property
    def observed(self) -> bool:
        """Whether any tensor has passed while observing, and all were finite."""
        return bool((self.lowest <= self.highest).item() and torch.isfinite(self.highest - self.lowest).item())

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale [1], zero point [1]): the very numbers that training and evaluation used."""
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if self.collector is not None:
            self.collector(x.detach())
            return x
        if self.observes and self.training:
            self._observe(x.detach())
        if not self.quantizes:
            return x
        found: Tensor = FakeQuantize.apply(x, self.scale, self.zero_point, self.quant_min, self.quant_max)
        return found

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = (value.float() for value in torch.aminmax(x))
        first = self.lowest > self.highest
        self.lowest.copy_(torch.where(first, low, self.lowest + self.averaging * (low - self.lowest)))
        self.highest.copy_(torch.where(first, high, self.highest + self.averaging * (high - self.highest)))
        self._settle()

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Quantize values from `low` to `high` from now on."""
        self.lowest.fill_(low)
        self.highest.fill_(high)
        self._settle()

    def _settle(self) -> None:
        """Scale and zero point from the range."""
        scale, zero_point = self.qparams(self.lowest, self.highest)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(scales, zero points) for ranges from low to high, all of one shape."""
        # 0 is always in the range, and exactly an integer: padding and ReLU depend on it.
        low, high = low.clamp_max(0), high.clamp_min(0)
        if self.qscheme == torch.per_tensor_symmetric:
            scale = (torch.maximum(-low, high) / self.quant_max).clamp_min(SMALLEST)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        steps = self.quant_max - self.quant_min
        below = torch.round(-low * steps / (high - low).clamp_min(SMALLEST * steps))
        # With the zero point rounded, one end would stick out by up to half a step. Widening the step instead loses
        # no value; and for images normalised with mean 0.5 every pixel would lie half way between two integers, where
        # each runtime rounds as it likes.
        scale = torch.maximum(-low / below.clamp_min(1), high / (steps - below).clamp_min(1))
        return scale.clamp_min(SMALLEST), (self.quant_min + below).to(torch.int32)


class WeightPerChannelFakeQuantize(_Switched):
    """One scale per slice along `ch_axis`: max |w| / quant_max, zero point 0.

    Without state: the scale follows from the weight, so a reloaded or edited weight can never meet a stale range.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        quant_min: int,
        quant_max: int,
        ch_axis: int,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.ch_axis = dtype, qscheme, ch_axis
        self.quant_min, self.quant_max, self.is_dynamic = quant_min, quant_max, is_dynamic
        self._converting: tuple[Tensor, Tensor] | None = None

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(scales [C] float32, zero points [C] int32) of a weight with C slices along the channel axis."""
        other = [d for d in range(weight.dim()) if d != self.ch_axis]
        largest = weight.detach().float().abs().amax(dim=other)
        scale = (largest / self.quant_max).clamp_min(SMALLEST)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def rescaled(self, factor: Tensor) -> WeightPerChannelFakeQuantize:
        """A module for the weight times `factor` [C], with the same switch."""
        new = type(self)(self.dtype, self.qscheme, self.quant_min, self.quant_max, self.ch_axis)
        new.enable_fake_quant(self.quantizes)
        return new

    def converting(self, weight: Tensor, floor: Tensor | None) -> None:
        """Fix the result of `calculate_qparams`, which torchao calls without a weight; floor [C]: smallest scales."""
        scale, zero_point = self.qparams(weight)
        self._converting = (scale if floor is None else torch.maximum(scale, floor)), zero_point

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scales [C], zero points [C]) as `converting` fixed them."""
        if self._converting is None:
            raise RuntimeError("converting() first")
        return self._converting

    def forward(self, weight: Tensor) -> Tensor:
        if not self.quantizes:
            return weight
        scale, zero_point = self.qparams(weight)
        return torch.fake_quantize_per_channel_affine(
            weight.float(), scale, zero_point, self.ch_axis, self.quant_min, self.quant_max
        ).to(weight.dtype)
