"""What a `[gate]` table asks, as a flat list of limits per profile."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Problem, nearest

__all__ = ["OWN_METRICS", "RuleFor", "parse_rules"]

QUANTILES = ("p50", "p90", "p95", "p99")
#: Metrics that edgekd itself measures, with their bounds; every other name is a metric of the task.
OWN_METRICS = {
    "agreement": ("min",),
    "macs": ("max",),
    "parameters": ("max",),
    "peak_memory_mb": ("max",),
    "size_mb": ("max",),
}
LATENCY_BOUNDS = ("max", "speedup")
TASK_BOUNDS = ("min", "max", "drop")

Limits = dict[tuple[str, str], float]


@dataclass(frozen=True)
class RuleFor:
    """One limit on one profile: `metric` is `accuracy`, `latency.p50`, ...; `bound` is max, min, drop or speedup."""

    profile: str
    metric: str
    bound: str
    limit: float

    @property
    def name(self) -> str:
        return f"{self.metric} {self.bound}"


def parse_rules(table: dict[str, Any], profiles: list[str], where: str = "gate") -> tuple[list[RuleFor], list[Problem]]:
    """The rules of each profile, and everything that is wrong with the table.

    `profiles` are names as they stand in results.json. A sub-table named like a profile adds to the general rules
    and replaces those of the same metric and bound.
    """
    problems: list[Problem] = []
    general: Limits = {}
    own: dict[str, Limits] = {}
    for key, value in table.items():
        if key not in profiles:
            general.update(_limits(key, value, profiles, where, problems))
        elif not isinstance(value, dict):
            problems.append(Problem(f"{where}.{key}", f"must be a table of rules, got {value!r}"))
        else:
            own[key] = {}
            for metric, bounds in value.items():
                own[key].update(_limits(metric, bounds, [], f"{where}.{key}", problems))
    rules = [
        RuleFor(profile, metric, bound, limit)
        for profile in profiles
        for (metric, bound), limit in {**general, **own.get(profile, {})}.items()
    ]
    return rules, problems


def _limits(key: str, value: Any, profiles: list[str], where: str, problems: list[Problem]) -> Limits:
    place = f"{where}.{key}"
    if key == "latency":
        if not isinstance(value, dict) or not value:
            problems.append(Problem(place, f"must name quantiles, got {value!r}", "latency = { p50 = { max = 2.0 } }"))
            return {}
        found: Limits = {}
        for quantile, bounds in value.items():
            if quantile in QUANTILES:
                found.update(_bounds(f"latency.{quantile}", bounds, LATENCY_BOUNDS, where, problems))
            else:
                hint = "latency = { p50 = { ... } }" if quantile in LATENCY_BOUNDS else nearest(quantile, QUANTILES)
                problems.append(Problem(f"{place}.{quantile}", "unknown key: expected a quantile", hint))
        return found
    if key in OWN_METRICS:
        return _bounds(key, value, OWN_METRICS[key], where, problems)
    # A task may call its metrics anything; only what cannot be one, or is one letter off ours, is refused here.
    nested = isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values())
    if nested or difflib.get_close_matches(key, ["latency", *OWN_METRICS], n=1, cutoff=0.7):
        known = ["latency", "accuracy", *OWN_METRICS, *profiles]
        problems.append(
            Problem(place, "unknown key: neither a metric nor a profile of this recipe", nearest(key, known))
        )
        return {}
    return _bounds(key, value, TASK_BOUNDS, where, problems)


def _bounds(metric: str, value: Any, known: Sequence[str], where: str, problems: list[Problem]) -> Limits:
    place = f"{where}.{metric}"
    if not isinstance(value, dict) or not value:
        hint = f"{metric.rpartition('.')[2]} = {{ {known[0]} = ... }}"
        problems.append(Problem(place, f"must be a table with {' or '.join(known)}, got {value!r}", hint))
        return {}
    found: Limits = {}
    for bound, limit in value.items():
        if bound not in known:
            problems.append(Problem(f"{place}.{bound}", "unknown key", nearest(bound, known)))
        elif isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            problems.append(Problem(f"{place}.{bound}", f"must be a number, got {limit!r}"))
        elif problem := _range_problem(metric, bound, limit):
            problems.append(Problem(f"{place}.{bound}", *problem))
        else:
            found[metric, bound] = float(limit)
    return found


def _range_problem(metric: str, bound: str, limit: float) -> tuple[str, str | None] | None:
    if metric in ("accuracy", "agreement"):
        if bound == "drop" and not -1 < limit < 1:
            return f"must be a fraction in (-1, 1), got {limit}", "0.01 is one point"
        if bound != "drop" and not 0 <= limit <= 1:
            return f"must be a fraction in [0, 1], got {limit}", f"{limit / 100:g} is {limit:g} %"
    elif (metric in OWN_METRICS or metric.startswith("latency.")) and limit <= 0:
        return f"must be positive, got {limit}", None
    return None
