"""What an estimate may decide, where a rule allows it to.

A lower bound of every call's time that lies beyond the limit fails a rule: no measurement could pass it. Below the
limit it says nothing. An interval fitted to networks that were measured on the device decides as a measured one does,
of the median alone, and where half of like networks lie inside it or more: with three of them or more.
"""

from __future__ import annotations

import math

from ..bench.results import Estimate, Fitted, Interval, ProfileResults, Variant
from .figure import decided, reference_of
from .rules import RuleFor
from .verdict import Unit, Verdict, bare, text

__all__ = ["judge_estimate"]

#: Share of further networks like those measured that lie inside the interval; (n-1)/(n+1) for n of them.
LEAST_COVERAGE = 0.5


def judge_estimate(profile: ProfileResults, chosen: Variant, rule: RuleFor, there: str) -> Verdict | None:
    """A verdict on a latency rule by what was estimated; None where no estimate says anything on it.

    `there` is the hint how to measure it. Raises UsageError where the variant that a speedup is against is not there.
    """
    if chosen.estimate is None or rule.bound == "regress":
        return None
    found = _interval(profile, chosen, rule)
    if found is not None:
        return _verdict(profile, chosen, rule, found, "from networks measured there", there)
    if rule.bound != "max":
        return None
    floor = chosen.estimate.floor_ms
    least = Interval(value=floor, low=floor, high=math.inf)
    return _verdict(profile, chosen, rule, least, "a lower bound", there)


def _interval(profile: ProfileResults, chosen: Variant, rule: RuleFor) -> Interval | None:
    """Of the median or of its ratio, where enough networks were measured."""
    own = _known(chosen.estimate) if rule.metric == "latency.p50" else None
    if own is None or rule.bound == "max":
        return own
    before = _known(reference_of(profile, chosen, rule).estimate)
    if before is None:
        return None
    # As if what holds one network back never held back the other: wider than it is, not narrower.
    return Interval(value=before.value / own.value, low=before.low / own.high, high=before.high / own.low)


def _known(estimate: Estimate | None) -> Interval | None:
    fitted: Fitted | None = estimate.fitted if estimate is not None else None
    if fitted is None or fitted.high_ms is None or fitted.coverage < LEAST_COVERAGE:
        return None
    return Interval(value=fitted.ms, low=fitted.low_ms, high=fitted.high_ms)


def _verdict(
    profile: ProfileResults, chosen: Variant, rule: RuleFor, found: Interval, from_what: str, there: str
) -> Verdict:
    smaller = rule.bound == "max"
    unit: Unit = "ms" if smaller else "x"
    bounded = math.isfinite(found.high)
    limit, value, *ends = text(unit, [rule.limit, found.value, *([found.low, found.high] if bounded else [])])
    shown = f"{value} [{bare(ends[0])}, {bare(ends[1])}]" if bounded else f"≥ {value}"
    verdict = decided(found.low, found.high, rule.limit, smaller)
    return Verdict(
        profile=profile.profile,
        variant=chosen.name,
        rule=rule.name,
        verdict=verdict,
        origin="estimated",
        limit=rule.limit,
        allowed=f"{'≤' if smaller else '≥'} {limit}",
        found=found.value,
        low=found.low,
        high=found.high if bounded else None,
        shown=f"{shown} (estimated: {from_what})",
        hint="no run there can be faster: prune further, or distil into a smaller student"
        if verdict == "fail" and not bounded
        else there,
    )
