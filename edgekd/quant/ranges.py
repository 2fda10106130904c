"""Which part of an activation's values gets the integers: ranges from a histogram (NumPy, no network)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "Histogram", "entropy_range", "mse_range", "percentile_range"]

#: Of a histogram; half of them on each side of 0.
BINS = 4096
Floats = NDArray[np.float64]


class Histogram(NamedTuple):
    """How often values fell into `BINS` equal bins between -largest and largest; `low` and `high` are the extremes."""

    counts: Floats
    largest: float
    low: float
    high: float

    @property
    def edges(self) -> Floats:
        return np.linspace(-self.largest, self.largest, len(self.counts) + 1)

    @property
    def centres(self) -> Floats:
        return (self.edges[1:] + self.edges[:-1]) / 2


def percentile_range(histogram: Histogram, percentile: float, symmetric: bool) -> tuple[float, float]:
    """(low, high) that leave out (100 - percentile) % of the values at each end; symmetric: of their magnitudes."""
    share = percentile / 100
    if symmetric:
        reach = _quantile(_magnitudes(histogram.counts), np.linspace(0, histogram.largest, BINS // 2 + 1), share)
        return _cut(histogram, reach)
    low, high = (_quantile(histogram.counts, histogram.edges, s) for s in (1 - share, share))
    return max(low, histogram.low), min(high, histogram.high)


def entropy_range(histogram: Histogram, levels: int) -> tuple[float, float]:
    """(low, high) whose integers say most about the values: the smallest divergence KL(P || Q) of magnitudes.

    P: the first i bins of |x|, those beyond added to the last; Q: the first i bins summed into `levels` groups, each
    spread evenly over its bins that are not empty. i runs from `levels` to all bins. Values of exactly 0 would drown
    all others and cost nothing, so the first bin is set to the second one's count.
    Source: Migacz 2017, "8-bit inference with TensorRT", GTC; the first bin as in NVIDIA's pytorch-quantization.
    """
    counts = _magnitudes(histogram.counts)
    counts[0] = counts[1]
    used = np.flatnonzero(counts)
    if not len(used):
        return histogram.low, histogram.high
    last = int(used[-1]) + 1
    width = histogram.largest / len(counts)
    divergences = {i: _divergence(counts, i, levels) for i in range(min(levels, last), last + 1)}
    best = min(divergences, key=lambda i: (divergences[i], -i))
    return _cut(histogram, best * width)


def mse_range(histogram: Histogram, quantized: Callable[[Floats, Floats, Floats], Floats]) -> tuple[float, float]:
    """(low, high) with the smallest mean squared error between the values and what quantizing makes of them.

    quantized(values [B, 1], lows [K], highs [K]) -> [B, K]. Tried are hundredths of each extreme: first of both
    together, then twice of each with the other one fixed.
    """
    kept = histogram.counts > 0
    values, weights = histogram.centres[kept][:, None], histogram.counts[kept]
    parts = np.arange(1, 101) / 100

    def best(lows: Floats, highs: Floats) -> tuple[float, float]:
        errors = weights @ (quantized(values, lows, highs) - values) ** 2
        index = len(errors) - 1 - int(np.argmin(errors[::-1]))  # of equally good ones the widest
        return float(lows[index]), float(highs[index])

    low, high = best(histogram.low * parts, histogram.high * parts)
    for _ in range(2):
        low, high = best(np.full(100, low), histogram.high * parts)
        low, high = best(histogram.low * parts, np.full(100, high))
    return low, high


def _magnitudes(counts: Floats) -> Floats:
    """The histogram of |x|."""
    half = len(counts) // 2
    return counts[half:] + counts[:half][::-1]


def _cut(histogram: Histogram, reach: float) -> tuple[float, float]:
    return max(histogram.low, -reach), min(histogram.high, reach)


def _quantile(counts: Floats, edges: Floats, share: float) -> float:
    """Where a share of the values lies below, evenly spread within a bin."""
    below = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    return float(np.interp(share, below, edges))


def _divergence(counts: Floats, bins: int, levels: int) -> float:
    """KL(P || Q) in nats when `bins` bins are kept."""
    inside = counts[:bins]
    reference = inside.copy()
    reference[-1] += counts[bins:].sum()
    group = np.minimum(np.arange(bins) * levels // bins, levels - 1)
    filled = inside > 0
    sums = np.bincount(group, weights=inside, minlength=levels)
    shares = np.bincount(group, weights=filled, minlength=levels)
    candidate = np.where(filled, sums[group] / np.maximum(shares[group], 1), 0.0)
    if not candidate.any():
        return np.inf
    p, q = reference / reference.sum(), candidate / candidate.sum()
    taken = p > 0
    if (q[taken] == 0).any():  # only the last bin can be: what was cut off fell into an empty one
        return np.inf
    return float(np.sum(p[taken] * np.log(p[taken] / q[taken])))
