"""Ranges of the activations, from images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError, nearest
from .fake_quantize import ActivationFakeQuantize
from .learned import LearnedActivationFakeQuantize
from .prepared import Prepared, as_prepared, floating
from .ranges import BINS, Floats, Histogram, entropy_range, mse_range, percentile_range
from .soundness import check_ranges

__all__ = ["Method", "calibrate"]

Method = Literal["min-max", "percentile", "entropy", "mse"]


def calibrate(
    prepared: nn.Module, batches: Iterable[Tensor], *, method: Method = "min-max", percentile: float = 99.99
) -> int:
    """Set the ranges of the activations from `batches` of images [N, C, H, W]; returns how many images were seen.

    Measured on the float network with stored batch norm statistics; earlier ranges are forgotten. The network keeps
    its mode and its fake-quant switch.
    method: min-max, the mean over the batches of each batch's extremes; the others keep all batches in memory and
    look at a histogram of all values: percentile leaves out (100 - percentile) % at each end, entropy loses least
    information (Migacz 2017), mse has the smallest squared error.
    Raises UsageError when there is no image, or one with NaN or infinity, and StageError for an activation that is
    not finite or, unless training can still widen its range, always zero, or zero but for what a percentile leaves out.
    """
    network = as_prepared(prepared)
    if method not in get_args(Method):
        raise UsageError(f"no calibration method {method!r}", where="method", hint=nearest(method, get_args(Method)))
    if not 50 < percentile <= 100:
        raise UsageError(f"percentile {percentile:g} is not above 50 and at most 100", where="percentile")
    modules = [m for m in network.modules() if isinstance(m, ActivationFakeQuantize)]
    shown = batches if method == "min-max" else list(batches)
    found = {module: _Extremes() for module in modules}
    images = _show(network, shown, found)
    if not images:
        raise UsageError("no image to calibrate with", where="calibration data", hint="a few hundred images suffice")
    for module, extremes in found.items():
        if extremes.lows:
            lows, highs = torch.stack(extremes.lows).double(), torch.stack(extremes.highs).double()
            module.set_range(lows.mean().item(), highs.mean().item())
    alive = not network.qat or any(isinstance(m, LearnedActivationFakeQuantize) for m in modules)
    check_ranges(network.network, alive=alive)
    if method != "min-max":
        counting = {m: _Counts(extremes.low, extremes.high) for m, extremes in found.items() if extremes.reach > 0}
        _show(network, shown, counting)
        for module, counts in counting.items():
            module.set_range(*_range(module, counts.histogram(), method, percentile))
        check_ranges(network.network, alive=alive, left_out=100 - percentile if method == "percentile" else 0)
    return images


class _Extremes:
    """The smallest and the largest value of every batch."""

    def __init__(self) -> None:
        self.lows: list[Tensor] = []
        self.highs: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.lows.append(low.float())
        self.highs.append(high.float())

    @property
    def low(self) -> float:
        return min(x.item() for x in self.lows)

    @property
    def high(self) -> float:
        return max(x.item() for x in self.highs)

    @property
    def reach(self) -> float:
        return max(abs(self.low), abs(self.high)) if self.lows else 0.0


class _Counts:
    """The histogram of all values, whose extremes are known."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high, self.largest = low, high, max(abs(low), abs(high))
        self.counts: Tensor | float = 0.0

    def __call__(self, x: Tensor) -> None:
        counted = torch.histc(x.float(), BINS, -self.largest, self.largest)
        self.counts = self.counts + counted.double()

    def histogram(self) -> Histogram:
        assert isinstance(self.counts, Tensor)
        return Histogram(self.counts.cpu().numpy(), self.largest, self.low, self.high)


def _show(
    network: Prepared, batches: Iterable[Tensor], collectors: Mapping[ActivationFakeQuantize, Callable[[Tensor], None]]
) -> int:
    """Let the float network see the batches while the collectors look on; how many images there were."""
    images = 0
    try:
        for module, collector in collectors.items():
            module.collector = collector
        with floating(network), torch.no_grad():
            for i, batch in enumerate(batches):
                if not torch.isfinite(batch).all():
                    raise UsageError(f"calibration batch {i} holds NaN or infinity", where="calibration data")
                network(batch.to(network.frozen.device))
                images += len(batch)
    finally:
        for module in collectors:
            module.collector = None
    return images


def _range(
    module: ActivationFakeQuantize, histogram: Histogram, method: Method, percentile: float
) -> tuple[float, float]:
    symmetric = module.qscheme == torch.per_tensor_symmetric
    if method == "percentile":
        low, high = percentile_range(histogram, percentile, symmetric)
        # Within the bins beside 0 nothing is left but zeros, spread over their bin.
        return (low, high) if max(-low, high) > 2 * histogram.largest / BINS else (0.0, 0.0)
    if method == "entropy":
        # As many integers as stand for one side of 0.
        one_sided = not symmetric and (histogram.low >= 0 or histogram.high <= 0)
        return entropy_range(histogram, 256 if one_sided else 128)

    def quantized(values: Floats, lows: Floats, highs: Floats) -> Floats:
        scales, zeros = (t.double().numpy() for t in module.qparams(torch.from_numpy(lows), torch.from_numpy(highs)))
        integers = np.clip(np.rint(values / scales) + zeros, module.quant_min, module.quant_max)
        return (integers - zeros) * scales

    return mse_range(histogram, quantized)
