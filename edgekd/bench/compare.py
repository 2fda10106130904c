"""Two measurements of the same thing: how much one figure differs from the other, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .env import same_machine
from .quality import unpacked
from .results import Interval, Latency, ProfileResults, Results, Variant
from .stats import mcnemar, paired_drop, paired_ratio, unpaired_ratio

__all__ = ["COSTS", "LOSSES", "Change", "Side", "change_of", "machine_differences", "quantile_of", "ratio_of_quantiles"]

#: Figures of a variant beside its task's metrics and latency: less is better.
COSTS = ("size_mb", "parameters", "macs", "peak_memory_mb", "load_ms", "energy_mj")
#: Metrics of which less is better, whatever the task.
LOSSES = ("loss", "ece")


@dataclass(frozen=True)
class Side:
    """One variant with what it was measured in."""

    results: Results
    profile: ProfileResults
    variant: Variant

    @property
    def first(self) -> Variant:
        return self.profile.variants[0]


@dataclass(frozen=True)
class Change:
    """From one side to the other. `worse` is the relative worsening: 0.05 is 5 % slower, larger, or of the metric lost.

    `decides` says whether the interval speaks of repeated measurement (a latency) and not of a fixed test set; `how`
    says how the two were paired; `p` is McNemar's, of accuracies on the same images.
    """

    before: float
    after: float
    worse: Interval
    decides: bool = False
    how: str = ""
    p: float | None = None


def change_of(metric: str, base: Side, own: Side, *, interleaved: bool = False) -> Change | None:
    """The change of `latency.p50`, a cost or a metric of the task; None where p99 has too few samples.

    `interleaved`: both sides come from the same rounds. Raises UsageError where a side was not measured for it.
    """
    if metric.startswith("latency."):
        return _latency_change(metric.partition(".")[2], base, own, interleaved)
    before, after = (_figure(metric, side, name) for side, name in ((base, "the baseline"), (own, own.variant.name)))
    if not (math.isfinite(before) and math.isfinite(after)):
        raise UsageError(
            f"{metric} is not a number: {before} in the baseline, {after} in {own.variant.name}",
            hint="look at the stage that made it, and measure again: edgekd bench RUN",
        )
    if before == 0:
        value = 0.0 if after == 0 else math.inf
        return Change(before, after, Interval(value=value, low=value, high=value))
    sign = 1 if is_lower_better(metric, own.results) else -1
    value = sign * (after - before) / abs(before)
    worse, p = Interval(value=value, low=value, high=value), None
    if metric == own.results.headline and (bits := _same_images(base, own)) is not None:
        drop = paired_drop(*bits)
        p = mcnemar(*bits)
        worse = Interval(value=value, low=min(value, drop.low / before), high=max(value, drop.high / before))
    elif metric in ("load_ms", "energy_mj"):
        ours, theirs = (_interval(metric, side.variant) for side in (own, base))
        if ours is not None and theirs is not None:
            ratio = ratio_of_quantiles(ours, theirs)
            worse = Interval(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)
        return Change(before, after, worse, decides=True)
    return Change(before, after, worse, p=p, how="same images" if p is not None else "")


def _latency_change(quantile: str, base: Side, own: Side, interleaved: bool) -> Change | None:
    theirs, ours = base.variant.latency, own.variant.latency
    for side, latency in ((base, theirs), (own, ours)):
        if latency is None:
            raise UsageError(f"no latency of {side.variant.name} was measured on {side.profile.profile}")
    assert theirs is not None
    assert ours is not None
    before, after = quantile_of(theirs, quantile), quantile_of(ours, quantile)
    if before is None or after is None:
        return None
    how = "same rounds" if interleaved else "another session"
    if quantile != "p50":
        ratio = ratio_of_quantiles(after, before)
    elif interleaved:
        ratio = paired_ratio(ours.round_p50, theirs.round_p50)
    elif _same_reference(base, own):
        ratio = unpaired_ratio(_relative(ours, own.first), _relative(theirs, base.first))
        how = f"relative to {own.first.name}"
    else:
        ratio = unpaired_ratio(ours.round_p50, theirs.round_p50)
    worse = Interval(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)
    return Change(before.value, after.value, worse, decides=True, how=how)


def is_lower_better(metric: str, results: Results) -> bool:
    if metric in COSTS or metric in LOSSES or metric.startswith("latency."):
        return True
    return metric == results.headline and results.direction == "min"


def quantile_of(latency: Latency, quantile: str) -> Interval | None:
    """p50, p90, p95 or p99; None where there are too few samples."""
    found = getattr(latency, quantile)
    return found if found is None or isinstance(found, Interval) else None


def ratio_of_quantiles(numerator: Interval, denominator: Interval) -> Interval:
    """A ratio with its 95 % interval from those of its two sides, taken as independent.

    Zou and Donner 2008 (MOVER), on logarithms. Rounds that both sides share make it wider than it needs to be.
    """
    a, b = numerator, denominator
    if min(a.low, b.low) <= 0:
        value = a.value / b.value if b.value else math.inf
        return Interval(value=value, low=0.0, high=math.inf)
    d = math.log(a.value / b.value)
    low = d - math.hypot(math.log(a.value / a.low), math.log(b.high / b.value))
    high = d + math.hypot(math.log(a.high / a.value), math.log(b.value / b.low))
    return Interval(value=math.exp(d), low=math.exp(low), high=math.exp(high))


def machine_differences(base: Side, own: Side) -> list[str]:
    """What makes latencies of the two incomparable: machine, runtime, threads, batch; empty for nothing."""
    found = same_machine(base.results.environment, own.results.environment)
    if base.profile.runtime != own.profile.runtime:
        found.append(f"runtime {base.profile.runtime!r} and here {own.profile.runtime!r}")
    ours, theirs = own.variant.latency, base.variant.latency
    if ours is not None and theirs is not None:
        for key in ("threads", "batch"):
            if getattr(ours, key) != getattr(theirs, key):
                found.append(f"{key} {getattr(theirs, key)} and here {getattr(ours, key)}")
    affinity = [side.profile.settings.get("affinity") for side in (base, own)]
    if affinity[0] != affinity[1]:
        found.append(f"affinity {affinity[0]} and here {affinity[1]}")
    return found


def _figure(metric: str, side: Side, who: str) -> float:
    if metric in COSTS or metric == "agreement":
        found = _interval(metric, side.variant) or getattr(side.variant, metric, None)
        value = found.value if isinstance(found, Interval) else found
    else:
        value = side.variant.metrics.get(metric)
    if value is None:
        known = [*side.variant.metrics, *(c for c in COSTS if _known(c, side.variant))]
        raise UsageError(
            f"{who} has no {metric} on {side.profile.profile}", hint=f"it has: {', '.join(known) or 'nothing'}, latency"
        )
    return float(value)


def _known(cost: str, variant: Variant) -> bool:
    return _interval(cost, variant) is not None or getattr(variant, cost, None) is not None


def _interval(metric: str, variant: Variant) -> Interval | None:
    if metric == "energy_mj":
        return variant.latency.energy_mj if variant.latency else None
    return variant.load_ms if metric == "load_ms" else None


def _same_reference(base: Side, own: Side) -> bool:
    """Both were measured beside the same first variant, so that its latency cancels what differs between sessions."""
    same = bool(own.first.key) and own.first.key == base.first.key
    alone = own.variant.name == own.first.name or base.variant.name == base.first.name
    return same and not alone and own.first.latency is not None and base.first.latency is not None


def _relative(latency: Latency, first: Variant) -> list[float]:
    assert first.latency is not None
    return list(np.asarray(latency.round_p50) / np.asarray(first.latency.round_p50))


def _same_images(base: Side, own: Side) -> tuple[np.ndarray, np.ndarray] | None:  # type: ignore[type-arg]
    """Which images each side got right, where both answered the same ones."""
    one, other = base.results, own.results
    if not one.data or one.data != other.data or one.test_images != other.test_images:
        return None
    if base.variant.correct is None or own.variant.correct is None:
        return None
    try:
        return unpacked(base.variant.correct, one.test_images), unpacked(own.variant.correct, other.test_images)
    except ValueError as error:
        raise UsageError(f"damaged answers of {base.variant.name} or {own.variant.name}: {error}") from error
