"""Rules against measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..bench.results import Latency, ProfileResults, Results, Variant
from ..errors import Problem, RecipeError, UsageError, nearest
from .rules import OWN_METRICS, RuleFor
from .verdict import Unit, Verdict, bare, text

__all__ = ["judge"]

#: A limit that is met exactly must not fail by the last bit of a float (0.92 - 0.91 > 0.01).
TOLERANCE = 1e-9


@dataclass(frozen=True)
class _Figure:
    """What a rule looks at: the figure with its interval, how it is shown, and whether the interval decides."""

    value: float
    unit: Unit
    low: float | None = None
    high: float | None = None
    by_interval: bool = False


def judge(results: Results, rules: Sequence[RuleFor], *, variant: str | None = None) -> list[Verdict]:
    """A verdict for each rule on each profile's last variant, or on the one called `variant`.

    Raises RecipeError (a UsageError) with everything that was never measured or is not a number.
    """
    verdicts: list[Verdict] = []
    problems: dict[Problem, None] = {}
    for rule in rules:
        try:
            verdicts.append(_judge(results, rule, variant))
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise RecipeError(list(problems))
    return verdicts


def _judge(results: Results, rule: RuleFor, name: str | None) -> Verdict:
    profile = next((p for p in results.profiles if p.profile == rule.profile), None)
    if profile is None or not profile.variants:
        measured = [p.profile for p in results.profiles if p.variants]
        raise UsageError(
            f"nothing was measured on profile {rule.profile!r}",
            where=f"gate {rule.name}",
            hint=nearest(rule.profile, measured) or "measure first: edgekd bench RUN",
        )
    chosen = profile.variants[-1] if name is None else next((v for v in profile.variants if v.name == name), None)
    if chosen is None:
        known = [v.name for v in profile.variants]
        raise UsageError(f"no variant {name!r} on {profile.profile}", where="gate", hint=nearest(str(name), known))
    figure = _figure(results, profile, chosen, rule)
    smaller_is_better = rule.bound in ("max", "drop")
    low = high = hint = None
    verdict: Literal["pass", "fail", "inconclusive"] = "inconclusive"
    if figure is None:
        (limit_text,) = text(_unit_of(rule), [rule.limit])
        samples = chosen.latency.samples if chosen.latency else 0
        shown = f"not known: {samples} samples are too few for {rule.metric.partition('.')[2]}"
        hint = "raise rounds or block_s in the profile's [protocol]"
    else:
        low, high = figure.low, figure.high
        figures = [x for x in (figure.value, low, high) if x is not None]
        if not all(map(math.isfinite, figures)):
            raise UsageError(
                f"{rule.metric} of {chosen.name} on {profile.profile} is not a number, got {figures[0]}",
                where=f"gate {rule.name}",
                hint="look at the stage that made it, and measure again: edgekd bench RUN",
            )
        verdict = _decide(figure, rule.limit, smaller_is_better)
        limit_text, *texts = text(figure.unit, [rule.limit, *figures])
        shown = texts[0] if len(texts) == 1 else f"{texts[0]} [{bare(texts[1])}, {bare(texts[2])}]"
        if verdict == "inconclusive":
            shown += f": too noisy after {profile.rounds} rounds"
            hint = "raise rounds in the profile's [protocol], or measure on a quieter machine"
        elif verdict == "fail":
            hint = _mend(results, profile, chosen, rule, figure)
    if chosen.origin != "measured":
        shown += f" ({chosen.origin})"
    return Verdict(
        profile=profile.profile,
        variant=chosen.name,
        rule=rule.name,
        verdict=verdict,
        limit=rule.limit,
        allowed=f"{'≤' if smaller_is_better else '≥'} {limit_text}",
        found=figure.value if figure else None,
        low=low,
        high=high,
        shown=shown,
        hint=hint,
    )


def _decide(figure: _Figure, limit: float, smaller_is_better: bool) -> Literal["pass", "fail", "inconclusive"]:
    low, high = figure.value, figure.value
    if figure.by_interval and figure.low is not None and figure.high is not None:
        low, high = figure.low, figure.high
    if not smaller_is_better:
        low, high, limit = -high, -low, -limit
    slack = TOLERANCE * max(1.0, abs(limit))
    if high <= limit + slack:
        return "pass"
    return "fail" if low > limit + slack else "inconclusive"


def _figure(results: Results, profile: ProfileResults, chosen: Variant, rule: RuleFor) -> _Figure | None:
    """What `rule` looks at; None where there are too few samples. Raises UsageError when it was never measured."""
    first = profile.variants[0]
    if rule.metric.startswith("latency."):
        return _latency_figure(profile, first, chosen, rule)
    if rule.metric in OWN_METRICS:
        value = getattr(chosen, rule.metric)
        if value is None:
            raise _missing(chosen, rule, [m for m in OWN_METRICS if getattr(chosen, m) is not None])
        return _Figure(value, _unit_of(rule))
    metric = rule.metric
    if metric == "accuracy" and metric not in chosen.metrics:
        metric = results.headline
    if metric not in chosen.metrics:
        raise _missing(chosen, rule, [*chosen.metrics, *OWN_METRICS, "latency"])
    value = chosen.metrics[metric]
    is_headline = metric == results.headline
    higher_is_better = not is_headline or results.direction == "max"
    fraction = higher_is_better and (is_headline or metric == "accuracy") and (0 <= value <= 1 or math.isnan(value))
    if rule.bound != "drop":
        return _Figure(value, "percent" if fraction else "number")
    unit: Unit = "points" if fraction else "number"
    if chosen is first or metric not in first.metrics:
        raise _no_reference(chosen, rule)
    if is_headline and chosen.drop is not None:
        return _Figure(chosen.drop.value, unit, chosen.drop.low, chosen.drop.high)
    lost = first.metrics[metric] - value
    return _Figure(lost if higher_is_better else -lost, unit)


def _latency_figure(profile: ProfileResults, first: Variant, chosen: Variant, rule: RuleFor) -> _Figure | None:
    if chosen.latency is None:
        raise _missing(chosen, rule, [*chosen.metrics, *OWN_METRICS])
    quantile = rule.metric.partition(".")[2]
    if rule.bound == "max":
        if quantile == "p50":
            p50 = chosen.latency.p50
            return _Figure(p50.value, "ms", p50.low, p50.high, by_interval=True)
        value = _quantile(chosen.latency, quantile)
        return None if value is None else _Figure(value, "ms")
    if chosen is first or first.latency is None:
        raise _no_reference(chosen, rule)
    if quantile == "p50":
        if chosen.speedup is None:
            raise _no_reference(chosen, rule)
        return _Figure(chosen.speedup.value, "x", chosen.speedup.low, chosen.speedup.high, by_interval=True)
    ours, theirs = _quantile(chosen.latency, quantile), _quantile(first.latency, quantile)
    return None if ours is None or theirs is None else _Figure(theirs / ours if ours else math.inf, "x")


def _quantile(latency: Latency, quantile: str) -> float | None:
    value = getattr(latency, quantile)
    return value.value if quantile == "p50" else value


def _missing(chosen: Variant, rule: RuleFor, known: Sequence[str]) -> UsageError:
    return UsageError(
        f"{rule.metric} of {chosen.name} was not measured on {rule.profile}",
        where=f"gate {rule.name}",
        hint=f"measured are: {', '.join(known)}",
    )


def _no_reference(chosen: Variant, rule: RuleFor) -> UsageError:
    return UsageError(
        f"{chosen.name} was not measured beside a teacher on {rule.profile}",
        where=f"gate {rule.name}",
        hint="the first path is what the others are compared with: edgekd bench TEACHER FILE; or use a max or min rule",
    )


def _mend(results: Results, profile: ProfileResults, chosen: Variant, rule: RuleFor, figure: _Figure) -> str | None:
    """Why a rule may have failed: the stage that lost most, or how much is left to go."""
    if rule.metric.startswith("latency.") or (rule.metric in OWN_METRICS and rule.bound == "max"):
        ratio = figure.value / rule.limit if rule.bound == "max" else rule.limit / max(figure.value, TOLERANCE)
        return f"{ratio:.2f}x to go: prune further, or distil into a smaller student"
    metric = results.headline if rule.metric not in chosen.metrics else rule.metric
    steps = profile.variants[: profile.variants.index(chosen) + 1]
    sign = -1 if metric == results.headline and results.direction == "min" else 1
    losses = [
        (sign * (before.metrics[metric] - after.metrics[metric]), after.name)
        for before, after in pairwise(steps)
        if metric in before.metrics and metric in after.metrics
    ]
    loss, stage = max(losses, default=(0.0, ""))
    if loss <= 0:
        return None
    unit: Unit = "points" if figure.unit in ("points", "percent") else "number"
    return f"the largest loss is at {stage}: {text(unit, [loss])[0]}"


def _unit_of(rule: RuleFor) -> Unit:
    if rule.metric.startswith("latency."):
        return "ms" if rule.bound == "max" else "x"
    units: dict[str, Unit] = {"agreement": "percent", "size_mb": "MB", "peak_memory_mb": "MB"}
    return units.get(rule.metric, "count")
