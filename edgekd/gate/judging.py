"""Rules against measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from ..bench.compare import is_lower_better
from ..bench.results import ProfileResults, Results, Variant
from ..errors import Problem, RecipeError, UsageError, nearest
from .estimated import judge_estimate
from .figure import TOLERANCE, Baseline, Figure, decided, figure_of, unit_of
from .rules import OWN_METRICS, RuleFor
from .verdict import Unit, Verdict, bare, text

__all__ = ["judge"]


def judge(
    results: Results, rules: Sequence[RuleFor], *, variant: str | None = None, baseline: Baseline | None = None
) -> list[Verdict]:
    """A verdict for each rule on each profile's last variant, or on the one called `variant`.

    Rules that compare with a baseline are inconclusive without one.
    Raises RecipeError (a UsageError) with everything that was never measured or is not a number.
    """
    verdicts: list[Verdict] = []
    problems: dict[Problem, None] = {}
    for rule in rules:
        try:
            verdicts.append(_judge(results, rule, variant, baseline))
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise RecipeError(list(problems))
    return verdicts


def _judge(results: Results, rule: RuleFor, name: str | None, baseline: Baseline | None) -> Verdict:
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
    here = _known_here(profile, rule)
    if not here and rule.estimates:
        told = judge_estimate(profile, chosen, rule, _there(profile.profile))
        if told is not None:
            return told
    figure = figure_of(results, profile, chosen, rule, baseline) if here else None
    smaller_is_better = rule.bound in ("max", "drop", "regress")
    low = high = hint = None
    verdict: Literal["pass", "fail", "inconclusive"] = "inconclusive"
    if figure is None:
        (limit_text,) = text(unit_of(rule), [rule.limit])
        samples = chosen.latency.samples if chosen.latency else 0
        shown = f"not known: {samples} samples are too few for {rule.metric.partition('.')[2]}"
        hint = "raise rounds or block_s in the profile's [protocol]"
        if not here:
            shown, hint = f"not known: {profile.elsewhere}", _there(profile.profile)
        elif rule.bound == "regress" and baseline is None:
            shown, hint = "not known: no baseline to compare with", "name one: edgekd gate RUN --baseline PATH"
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
        shown += figure.note
        if verdict == "inconclusive" and rule.strict:
            shown += f": not told apart by {results.test_images:,} test images"
            hint = "a larger test set narrows the interval; without strict = true the figure itself decides"
        elif verdict == "inconclusive":
            rounds = profile.rounds
            if baseline is not None and rule.bound == "regress":
                rounds = next((p.rounds for p in baseline.results.profiles if p.profile == rule.profile), rounds)
            shown += f": too noisy after {rounds} rounds"
            hint = "raise cap_s in the profile's [protocol], or measure on a quieter machine"
        elif verdict == "fail":
            hint = _mend(results, profile, chosen, rule, figure)
    if chosen.origin != "measured":
        shown += f" ({chosen.origin})"
    return Verdict(
        profile=profile.profile,
        variant=chosen.name,
        rule=rule.name,
        verdict=verdict,
        origin=chosen.origin,
        limit=rule.limit,
        allowed=f"{'≤' if smaller_is_better else '≥'} {limit_text}",
        found=figure.value if figure else None,
        low=low,
        high=high,
        shown=shown,
        hint=hint,
    )


def _known_here(profile: ProfileResults, rule: RuleFor) -> bool:
    """Whether what a rule looks at was measured on the device, or is in the file, which is the same everywhere."""
    return profile.elsewhere is None or rule.metric in ("size_mb", "parameters", "macs")


def _there(profile: str) -> str:
    return f"measure it there, over ssh: edgekd bench RUN --profile {profile} --host USER@DEVICE"


def _decide(figure: Figure, limit: float, smaller_is_better: bool) -> Literal["pass", "fail", "inconclusive"]:
    if figure.by_interval and figure.low is not None and figure.high is not None:
        return decided(figure.low, figure.high, limit, smaller_is_better)
    return decided(figure.value, figure.value, limit, smaller_is_better)


def _mend(results: Results, profile: ProfileResults, chosen: Variant, rule: RuleFor, figure: Figure) -> str | None:
    """Why a rule may have failed: the stage that lost most, or how much is left to go."""
    if rule.bound == "regress":
        return "see what changed: edgekd compare BASELINE RUN"
    if rule.metric.startswith("latency.") or (rule.metric in OWN_METRICS and rule.bound == "max"):
        ratio = figure.value / rule.limit if rule.bound == "max" else rule.limit / max(figure.value, TOLERANCE)
        return f"{ratio:.2f}x to go: prune further, or distil into a smaller student"
    metric = results.headline if rule.metric not in chosen.metrics else rule.metric
    steps = [v for v in profile.variants if v is chosen or not profile.foreign(v)]
    steps = steps[: steps.index(chosen) + 1]
    sign = -1 if is_lower_better(metric, results) else 1
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
