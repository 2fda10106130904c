"""Statistics of latencies and of paired accuracies. Pure: the same numbers in give the same figures out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UsageError
from .results import Interval, Latency

__all__ = [
    "MIN_P99_SAMPLES",
    "bootstrap_median",
    "bootstrap_median_by_round",
    "paired_drop",
    "paired_ratio",
    "speedup",
    "summarize",
]

#: MLPerf Inference's floor for a 99th percentile (early stopping, multi-stream): the smallest number of samples of
#: which at least two lie beyond the true 99th percentile with 99 % confidence.
MIN_P99_SAMPLES = 662

RESAMPLES = 4000
Z95 = 1.959963984540054


def bootstrap_median(values: ArrayLike, seed: int = 0) -> Interval:
    """The median of independent values (one per round) with its 95 % bootstrap interval.

    Percentile bootstrap whose percentiles are expanded for few values (Hesterberg 2015, What Teachers Should Know
    About the Bootstrap): in simulation, plain percentiles of 12 values cover 92-94 %, these 95-97 %.
    A single value has no interval: low = value = high. Raises ValueError for no values or non-finite ones.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"expected finite values of at least one round, got shape {x.shape}")
    value = float(np.median(x))
    if len(x) == 1:
        return Interval(value=value, low=value, high=value)
    picks = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    medians = np.median(x[picks], axis=1)
    tail = _expanded_tail(len(x))
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Interval(value=value, low=float(min(low, value)), high=float(max(high, value)))


def bootstrap_median_by_round(rounds: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The median of the rounds' medians with its 95 % interval.

    Whole rounds are drawn, since samples within one share what else the machine did then and are not independent.
    """
    return bootstrap_median([float(np.median(samples)) for samples in rounds], seed)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """The median over rounds of numerator / denominator with its 95 % interval; what slows both cancels out."""
    if len(numerators) != len(denominators):
        raise UsageError(
            f"{len(numerators)} and {len(denominators)} rounds cannot be paired", hint="measure both in one session"
        )
    return bootstrap_median(np.asarray(numerators) / np.asarray(denominators), seed)


def speedup(reference: Latency, other: Latency) -> Interval:
    """How many times faster `other` is than `reference`, paired by round. Both must come from one measurement.

    Raises UsageError when their rounds differ in number.
    """
    return paired_ratio(reference.round_p50, other.round_p50)


def paired_drop(correct_a: ArrayLike, correct_b: ArrayLike) -> Interval:
    """Accuracy of `a` (the reference) minus that of `b` on the same images, as a fraction: positive is a loss.

    `correct_a`, `correct_b`: bool [N]. The 95 % interval is that of Agresti and Min (2005), Simple improved
    confidence intervals for comparing matched proportions: Wald's after half an image is added to each of the
    four cells of the paired table. Raises UsageError for no images or different numbers of them.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UsageError(f"paired accuracies need the same images, got {a.shape} and {b.shape}")
    lost, gained, n = int((a & ~b).sum()), int((~a & b).sum()), len(a)
    value = (lost - gained) / n
    centre = (lost - gained) / (n + 2)
    error = Z95 * math.sqrt((lost + gained + 1) - (lost - gained) ** 2 / (n + 2)) / (n + 2)
    return Interval(value=value, low=max(-1.0, min(centre - error, value)), high=min(1.0, max(centre + error, value)))


def summarize(rounds: Sequence[Sequence[float]], *, batch: int, threads: int, seed: int = 0) -> Latency:
    """The `Latency` of one variant from its milliseconds per call, by round (each with at least one sample)."""
    samples: np.ndarray[Any, Any] = np.concatenate([np.asarray(r, dtype=np.float64) for r in rounds])
    p25, p50, p75, p90, p95, p99 = np.percentile(samples, [25, 50, 75, 90, 95, 99])
    return Latency(
        p50=bootstrap_median_by_round(rounds, seed),
        p90=float(p90),
        p95=float(p95),
        p99=float(p99) if len(samples) >= MIN_P99_SAMPLES else None,
        mean=float(samples.mean()),
        spread=float((p75 - p25) / p50),
        samples=len(samples),
        round_p50=[float(np.median(r)) for r in rounds],
        batch=batch,
        threads=threads,
    )


def _expanded_tail(n: int) -> float:
    """What replaces 2.5 % for `n` values: a normal tail at Student's t, for a resample's spread is too small."""
    return _normal_cdf(-math.sqrt(n / (n - 1)) * _t975(n - 1))


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _t975(degrees: int) -> float:
    """97.5 % quantile of Student's t by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5)."""
    z, v = Z95, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
