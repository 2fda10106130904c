"""The figure that a rule looks at, with its interval, and whether the interval decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..bench.compare import Side, change_of, is_lower_better, machine_differences, quantile_of, ratio_of_quantiles
from ..bench.quality import unpacked
from ..bench.results import Interval, ProfileResults, Results, Variant
from ..bench.stats import mcnemar, paired_drop, paired_ratio, wilson
from ..errors import UsageError, nearest
from .rules import OWN_METRICS, RuleFor
from .verdict import Unit

__all__ = ["Baseline", "Figure", "decided", "figure_of", "reference_of", "unit_of"]

#: A limit that is met exactly must not fail by the last bit of a float (0.92 - 0.91 > 0.01).
TOLERANCE = 1e-9
#: Figures that belong to the machine they were measured on.
OF_THE_MACHINE = ("peak_memory_mb", "load_ms", "energy_mj")


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval. `note` is shown behind it."""

    value: float
    unit: Unit
    low: float | None = None
    high: float | None = None
    by_interval: bool = False
    note: str = ""


@dataclass(frozen=True)
class Baseline:
    """What `regress` compares with.

    `interleaved`: each profile's first variant is the baseline and its last one is ours, from the same rounds. If
    not, `results` is another session's document, whose variant of the same name (or else the last) counts.
    `other_machine` allows it to come from elsewhere.
    """

    results: Results
    where: str
    interleaved: bool = False
    other_machine: bool = False


def figure_of(
    results: Results, profile: ProfileResults, chosen: Variant, rule: RuleFor, baseline: Baseline | None
) -> Figure | None:
    """What `rule` looks at; None where there are too few samples, or no baseline.

    Raises UsageError when it was never measured.
    """
    if rule.bound == "regress":
        return _regress(results, profile, chosen, rule, baseline) if baseline is not None else None
    if rule.metric.startswith("latency."):
        return _latency(profile, chosen, rule)
    if rule.metric in OWN_METRICS:
        own = chosen.latency.energy_mj if rule.metric == "energy_mj" and chosen.latency else None
        value = own or getattr(chosen, rule.metric, None)
        if value is None:
            raise _missing(chosen, rule, [m for m in OWN_METRICS if getattr(chosen, m, None) is not None])
        if isinstance(value, Interval):
            return Figure(value.value, unit_of(rule), value.low, value.high, by_interval=True)
        return Figure(value, unit_of(rule))
    return _task_metric(results, profile, chosen, rule)


def _task_metric(results: Results, profile: ProfileResults, chosen: Variant, rule: RuleFor) -> Figure:
    metric = _metric_of(results, chosen, rule)
    value = chosen.metrics[metric]
    is_headline = metric == results.headline
    lower = is_lower_better(metric, results)
    share = not lower and (is_headline or metric == "accuracy") and (0 <= value <= 1 or math.isnan(value))
    if rule.bound != "drop":
        if not (share and results.test_images and math.isfinite(value)):
            return Figure(value, "percent" if share else "number")
        if not rule.strict:
            return Figure(value, "percent")
        own = wilson(value, results.test_images)
        return Figure(value, "percent", own.low, own.high, by_interval=True)
    unit: Unit = "points" if share else "number"
    reference = reference_of(profile, chosen, rule)
    if metric not in reference.metrics:
        raise _no_reference(chosen, rule)
    if is_headline and (drop := _paired(results, reference, chosen, rule.against is None)) is not None:
        interval, p = drop
        note = f", McNemar p = {p:.2g}" if p is not None else ""
        return Figure(interval.value, unit, interval.low, interval.high, by_interval=rule.strict, note=note)
    lost = value - reference.metrics[metric] if lower else reference.metrics[metric] - value
    return Figure(lost, unit)


def _metric_of(results: Results, chosen: Variant, rule: RuleFor) -> str:
    """`accuracy` stands for the headline metric of a task that has no accuracy."""
    metric = results.headline if rule.metric == "accuracy" and "accuracy" not in chosen.metrics else rule.metric
    if metric not in chosen.metrics:
        raise _missing(chosen, rule, [*chosen.metrics, *OWN_METRICS, "latency"])
    return metric


def _paired(results: Results, reference: Variant, chosen: Variant, first: bool) -> tuple[Interval, float | None] | None:
    """What the headline metric lost on the same images, with McNemar's p."""
    if reference.correct and chosen.correct and results.direction == "max":
        bits = [unpacked(text, results.test_images) for text in (reference.correct, chosen.correct)]
        found = paired_drop(*bits)
        if math.isclose(found.value, reference.metrics[results.headline] - chosen.metrics[results.headline]):
            return found, mcnemar(*bits)
    return (chosen.drop, chosen.mcnemar) if first and chosen.drop is not None else None


def _latency(profile: ProfileResults, chosen: Variant, rule: RuleFor) -> Figure | None:
    if chosen.latency is None:
        raise _missing(chosen, rule, [*chosen.metrics, *OWN_METRICS])
    quantile = rule.metric.partition(".")[2]
    own = quantile_of(chosen.latency, quantile)
    if rule.bound == "max":
        return None if own is None else Figure(own.value, "ms", own.low, own.high, by_interval=True)
    reference = reference_of(profile, chosen, rule)
    if reference.latency is None:
        raise _no_reference(chosen, rule)
    if quantile == "p50" and rule.against is None and chosen.speedup is not None:
        ratio = chosen.speedup
    elif quantile == "p50":
        ratio = paired_ratio(reference.latency.round_p50, chosen.latency.round_p50)
    else:
        theirs = quantile_of(reference.latency, quantile)
        if own is None or theirs is None:
            return None
        ratio = ratio_of_quantiles(theirs, own)
    return Figure(ratio.value, "x", ratio.low, ratio.high, by_interval=True)


def reference_of(profile: ProfileResults, chosen: Variant, rule: RuleFor) -> Variant:
    """The variant that drop and speedup compare with: the first, or the one that the rule names."""
    if rule.against is None:
        reference = profile.variants[0]
    else:
        found = next((v for v in profile.variants if v.name == rule.against), None)
        if found is None:
            known = [v.name for v in profile.variants]
            raise UsageError(
                f"no variant {rule.against!r} on {profile.profile}",
                where=f"gate {rule.name}",
                hint=nearest(rule.against, known),
            )
        reference = found
    if reference is chosen:
        raise _no_reference(chosen, rule)
    return reference


def _regress(
    results: Results, profile: ProfileResults, chosen: Variant, rule: RuleFor, baseline: Baseline
) -> Figure | None:
    beside = next((p for p in baseline.results.profiles if p.profile == rule.profile and p.variants), None)
    if beside is None:
        measured = [p.profile for p in baseline.results.profiles]
        raise UsageError(
            f"the baseline {baseline.where} was not measured on profile {rule.profile!r}",
            where=f"gate {rule.name}",
            hint=f"it was on: {', '.join(measured) or 'none'}; move it with `edgekd baseline update RUN`",
        )
    own = Side(results, profile, chosen)
    if baseline.interleaved:
        base = Side(baseline.results, beside, beside.variants[0])
        if rule.metric.startswith("latency.") or rule.metric in OF_THE_MACHINE:
            own = Side(baseline.results, beside, beside.variants[-1])
    else:
        same = next((v for v in beside.variants if v.name == chosen.name), beside.variants[-1])
        base = Side(baseline.results, beside, same)
    different = [] if baseline.interleaved else machine_differences(base, own)
    of_the_machine = rule.metric.startswith("latency.") or rule.metric in OF_THE_MACHINE
    if of_the_machine and different and not baseline.other_machine:
        raise UsageError(
            f"the baseline {baseline.where} is not comparable: {'; '.join(different)}",
            where=f"gate {rule.name}",
            hint="measure the baseline here, with `--baseline RUN` or a model file; or --allow-other-machine",
        )
    metric = rule.metric
    if not metric.startswith("latency.") and metric not in OWN_METRICS:
        metric = _metric_of(results, chosen, rule)
    try:
        change = change_of(metric, base, own, interleaved=baseline.interleaved)
    except UsageError as error:
        raise UsageError(
            error.problem.what, where=f"gate {rule.name}, baseline {baseline.where}", hint=error.problem.hint
        ) from error
    if change is None:
        return None
    notes = [change.how] if change.how else []
    notes += [f"McNemar p = {change.p:.2g}"] if change.p is not None else []
    notes += ["another machine"] if of_the_machine and different else []
    worse = change.worse
    single = worse.low == worse.value == worse.high
    return Figure(
        worse.value,
        "change",
        None if single else worse.low,
        None if single else worse.high,
        by_interval=change.decides or rule.strict,
        note="".join(f", {n}" for n in notes),
    )


def _missing(chosen: Variant, rule: RuleFor, known: Sequence[str]) -> UsageError:
    return UsageError(
        f"{rule.metric} of {chosen.name} was not measured on {rule.profile}",
        where=f"gate {rule.name}",
        hint=f"measured are: {', '.join(known)}",
    )


def _no_reference(chosen: Variant, rule: RuleFor) -> UsageError:
    return UsageError(
        f"{chosen.name} was not measured beside a {rule.against or 'teacher'} on {rule.profile}",
        where=f"gate {rule.name}",
        hint="the first path is what the others are compared with: edgekd bench TEACHER FILE; or use a max or min rule",
    )


def unit_of(rule: RuleFor) -> Unit:
    """How the limit of a rule is written where nothing was found to take the unit from."""
    if rule.bound == "regress":
        return "change"
    if rule.metric.startswith("latency."):
        return "ms" if rule.bound == "max" else "x"
    units: dict[str, Unit] = {
        "agreement": "percent", "size_mb": "MB", "peak_memory_mb": "MB", "load_ms": "ms", "energy_mj": "mJ",
        "parameters": "count", "macs": "count", "accuracy": "points" if rule.bound == "drop" else "percent",
    }  # fmt: skip
    return units.get(rule.metric, "number")


def decided(low: float, high: float, limit: float, smaller_is_better: bool) -> Literal["pass", "fail", "inconclusive"]:
    """Whether all between two ends, which may be one, is inside the limit, or all beyond it."""
    if not smaller_is_better:
        low, high, limit = -high, -low, -limit
    slack = TOLERANCE * max(1.0, abs(limit))
    if high <= limit + slack:
        return "pass"
    return "fail" if low > limit + slack else "inconclusive"
