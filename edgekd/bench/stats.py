"""Statistics of latencies and of paired accuracies. Pure: the same numbers in give the same figures out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UsageError
from .results import Histogram, Interval, Latency

__all__ = [
    "MIN_P99_SAMPLES",
    "bootstrap_median",
    "bootstrap_median_by_round",
    "bootstrap_quantile_by_round",
    "drift",
    "mcnemar",
    "paired_drop",
    "paired_ratio",
    "speedup",
    "summarize",
    "unpaired_ratio",
    "wilson",
]

#: MLPerf Inference's floor for a 99th percentile (early stopping, multi-stream): the smallest number of samples of
#: which at least two lie beyond the true 99th percentile with 99 % confidence.
MIN_P99_SAMPLES = 662

RESAMPLES = 4000
#: Of the drawn curve: denser towards 100, where tails are.
CURVE = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99, 100)
BINS = 60
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
    medians = _medians(x, np.random.default_rng(seed))
    tail = _expanded_tail(len(x))
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Interval(value=value, low=float(min(low, value)), high=float(max(high, value)))


def bootstrap_median_by_round(rounds: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The median of the rounds' medians with its 95 % interval.

    Whole rounds are drawn, since samples within one share what else the machine did then and are not independent.
    """
    return bootstrap_median([float(np.median(samples)) for samples in rounds], seed)


def bootstrap_quantile_by_round(rounds: Sequence[ArrayLike], share: float, seed: int = 0) -> Interval:
    """The `share` quantile (0.99 is p99) of all rounds' samples together, with its 95 % interval.

    Bootstrapped is the share of samples up to the quantile, by whole rounds, and its interval is read off the samples
    (Woodruff 1952, Confidence intervals for medians and other position measures): resampling few rounds' quantiles
    themselves covers only 70-90 % in the tail. The share's error may lie to either side, so the wider end counts.
    Raises ValueError for no or non-finite samples.
    """
    ordered = [np.sort(np.asarray(r, dtype=np.float64)) for r in rounds]
    pooled: np.ndarray[Any, Any] = np.sort(np.concatenate(ordered)) if ordered else np.empty(0)
    if not len(pooled) or not np.isfinite(pooled).all():
        raise ValueError("expected finite samples of at least one round")
    value = float(np.quantile(pooled, share))
    if len(ordered) == 1:
        return Interval(value=value, low=value, high=value)
    below = np.array([np.searchsorted(r, value, "right") / len(r) for r in ordered])
    picks = np.random.default_rng(seed).integers(0, len(below), (RESAMPLES, len(below)))
    tail = _expanded_tail(len(below))
    low, high = np.quantile(below[picks].mean(axis=1), [tail, 1 - tail])
    ends = np.clip([min(low, 2 * share - high), max(high, 2 * share - low)], 0, 1)
    first, last = np.quantile(pooled, ends)
    return Interval(value=value, low=float(min(first, value)), high=float(max(last, value)))


def unpaired_ratio(numerators: ArrayLike, denominators: ArrayLike, seed: int = 0) -> Interval:
    """The ratio of the medians of two independent series of rounds, with its 95 % bootstrap interval.

    For figures of two sessions, whose rounds cannot be paired. Raises ValueError as `bootstrap_median` does.
    """
    a, b = bootstrap_median(numerators, seed), bootstrap_median(denominators, seed)
    x, y = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    rng = np.random.default_rng(seed)
    ratios = _medians(x, rng) / _medians(y, rng)
    tail = _expanded_tail(max(2, min(len(x), len(y))))
    value = a.value / b.value
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(value=value, low=float(min(low, value)), high=float(max(high, value)))


def _medians(x: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    return np.asarray(np.median(x[rng.integers(0, len(x), (RESAMPLES, len(x)))], axis=1))


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


def drift(rounds: Sequence[float]) -> float | None:
    """The median of the last third of the rounds over that of the first, minus 1; None of fewer than three rounds."""
    third = len(rounds) // 3
    return float(np.median(rounds[-third:]) / np.median(rounds[:third]) - 1) if third else None


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Two-sided p of McNemar's exact test that `a` and `b` are right on equally many images.

    The binomial test of the discordant pairs (1 where there are none); `correct_a`, `correct_b`: bool [N].
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    lost, gained = int((a & ~b).sum()), int((~a & b).sum())
    n, k = lost + gained, min(lost, gained)
    log_half = n * math.log(0.5)
    terms = (
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half) for i in range(k + 1)
    )
    return min(1.0, 2 * math.fsum(terms))


def wilson(share: float, n: int) -> Interval:
    """A share of `n` independent images with its 95 % interval (Wilson 1927)."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Interval(value=share, low=max(0.0, min(centre - half, share)), high=min(1.0, max(centre + half, share)))


def summarize(
    rounds: Sequence[Sequence[float]],
    *,
    batch: int,
    threads: int,
    warmup_s: float = 0.0,
    steady: bool = True,
    energy_mj: Interval | None = None,
    parts: Mapping[str, Sequence[Sequence[float]]] | None = None,
    seed: int = 0,
) -> Latency:
    """The `Latency` of one variant from its milliseconds per call, by round (each with at least one sample).

    `parts` are milliseconds of the same calls, by what they are made of and by round.
    """
    samples: np.ndarray[Any, Any] = np.concatenate([np.asarray(r, dtype=np.float64) for r in rounds])
    p25, p50, p75 = np.percentile(samples, [25, 50, 75])
    p90, p95 = (bootstrap_quantile_by_round(rounds, share, seed) for share in (0.90, 0.95))
    p99 = bootstrap_quantile_by_round(rounds, 0.99, seed) if len(samples) >= MIN_P99_SAMPLES else None
    known_curve = [p for p in CURVE if p in (0, 100) or (1 - p / 100) * len(samples) >= 1]
    return Latency(
        p50=bootstrap_median_by_round(rounds, seed),
        p90=p90,
        p95=p95,
        p99=p99,
        mean=float(samples.mean()),
        spread=float((p75 - p25) / p50),
        samples=len(samples),
        round_p50=[float(np.median(r)) for r in rounds],
        curve=[(float(p), float(v)) for p, v in zip(known_curve, np.percentile(samples, known_curve), strict=True)],
        histogram=_histogram(samples),
        batch=batch,
        threads=threads,
        warmup_s=warmup_s,
        steady=steady,
        energy_mj=energy_mj,
        parts={name: bootstrap_median_by_round(found, seed) for name, found in (parts or {}).items()},
    )


def _histogram(samples: np.ndarray[Any, Any]) -> Histogram:
    """Up to a little beyond p99; the last bin holds the rest, so that one hiccup does not flatten the picture."""
    low, high = float(samples.min()), float(np.percentile(samples, 99)) * 1.05
    high = max(high, low * 1.01, low + 1e-9)
    counts, _ = np.histogram(np.minimum(samples, high), bins=BINS, range=(low, high))
    return Histogram(low=low, high=high, counts=counts.tolist())


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
