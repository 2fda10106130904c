"""What a `[gate]` table asks, as a flat list of limits per profile."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import Problem, nearest

__all__ = ["OWN_METRICS", "RuleFor", "parse_rules"]

QUANTILES = ("p50", "p90", "p95", "p99")
#: Metrics that edgekd itself measures, with their bounds; every other name is a metric of the task.
OWN_METRICS = {
    "agreement": ("min", "regress"),
    "energy_mj": ("max", "regress"),
    "load_ms": ("max", "regress"),
    "macs": ("max", "regress"),
    "parameters": ("max", "regress"),
    "peak_memory_mb": ("max", "regress"),
    "size_mb": ("max", "regress"),
}
#: The key by which a table allows what was not measured to decide.
ESTIMATES = "estimates"
LATENCY_BOUNDS = ("max", "speedup", "regress")
TASK_BOUNDS = ("min", "max", "drop", "regress")
#: What stands beside bounds: the stage that drop and speedup compare with, and whether accuracy's interval decides.
MODIFIERS = ("against", "strict")


@dataclass(frozen=True)
class RuleFor:
    """One limit on one profile: `metric` is `accuracy`, `latency.p50`, ...; `bound` max, min, drop, speedup, regress.

    `against` names the variant that drop and speedup compare with (None: the first, the teacher); `strict` asks the
    bound of the whole interval of a metric whose figure alone would decide; `estimates`: where the device is elsewhere,
    an estimate of its latency may decide.
    """

    profile: str
    metric: str
    bound: str
    limit: float
    against: str | None = None
    strict: bool = False
    estimates: bool = False

    @property
    def name(self) -> str:
        beside = f" against {self.against}" if self.against else ""
        return f"{self.metric} {self.bound}{beside}"


class Limit(NamedTuple):
    """A bound's limit with its modifiers."""

    value: float
    against: str | None = None
    strict: bool = False


Limits = dict[tuple[str, str], Limit]


def parse_rules(table: dict[str, Any], profiles: list[str], where: str = "gate") -> tuple[list[RuleFor], list[Problem]]:
    """The rules of each profile, and everything that is wrong with the table.

    `profiles` are names as they stand in results.json. A sub-table named like a profile adds to the general rules
    and replaces those of the same metric and bound.
    """
    problems: list[Problem] = []
    general: Limits = {}
    own: dict[str, Limits] = {}
    estimates = _estimates(table, where, problems)
    allowed: dict[str, bool] = {}
    for key, value in table.items():
        if key == ESTIMATES:
            continue
        if key not in profiles:
            general.update(_limits(key, value, profiles, where, problems))
        elif not isinstance(value, dict):
            problems.append(Problem(f"{where}.{key}", f"must be a table of rules, got {value!r}"))
        else:
            own[key] = {}
            allowed[key] = _estimates(value, f"{where}.{key}", problems, estimates)
            for metric, bounds in value.items():
                if metric != ESTIMATES:
                    own[key].update(_limits(metric, bounds, [], f"{where}.{key}", problems))
    rules = [
        RuleFor(profile, metric, bound, *limit, metric.startswith("latency.") and allowed.get(profile, estimates))
        for profile in profiles
        for (metric, bound), limit in {**general, **own.get(profile, {})}.items()
    ]
    return rules, problems


def _estimates(table: dict[str, Any], where: str, problems: list[Problem], otherwise: bool = False) -> bool:
    """Whether a table lets estimates decide."""
    given = table.get(ESTIMATES, otherwise)
    if not isinstance(given, bool):
        problems.append(Problem(f"{where}.{ESTIMATES}", f"must be true or false, got {given!r}"))
    return given is True


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
    if nested or difflib.get_close_matches(key, ["latency", ESTIMATES, *OWN_METRICS], n=1, cutoff=0.7):
        known = ["latency", "accuracy", ESTIMATES, *OWN_METRICS, *profiles]
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
    modifiers = _modifiers(metric, value, place, problems)
    bounds = {bound: limit for bound, limit in value.items() if bound not in MODIFIERS}
    if not bounds:
        problems.append(Problem(place, f"no limit in it, expected {' or '.join(known)}"))
    for bound, given in bounds.items():
        limit = _fraction(given) if bound == "regress" else given
        if bound not in known:
            problems.append(Problem(f"{place}.{bound}", "unknown key", nearest(bound, [*known, *MODIFIERS])))
        elif isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            expected = 'a share like "5%" or 0.05' if bound == "regress" else "a number"
            problems.append(Problem(f"{place}.{bound}", f"must be {expected}, got {given!r}"))
        elif problem := _range_problem(metric, bound, limit):
            problems.append(Problem(f"{place}.{bound}", *problem))
        else:
            compares = bound in ("drop", "speedup")
            against = modifiers.get("against") if compares else None
            found[metric, bound] = Limit(float(limit), against, modifiers.get("strict", False))
    if "against" in modifiers and not {"drop", "speedup"} & bounds.keys():
        problems.append(Problem(f"{place}.against", "says what drop or speedup compares with, and there is neither"))
    return found


def _modifiers(metric: str, value: dict[str, Any], place: str, problems: list[Problem]) -> dict[str, Any]:
    found = {}
    for key, kind, expected in (("against", str, "a stage's name"), ("strict", bool, "true or false")):
        if key not in value:
            continue
        if key == "strict" and (metric.startswith("latency.") or metric in OWN_METRICS):
            what = "is for metrics of the task: " + (
                "a latency is always judged by its whole interval" if "latency" in metric else f"{metric} has none"
            )
            problems.append(Problem(f"{place}.{key}", what))
        elif not isinstance(value[key], kind) or value[key] == "":
            problems.append(Problem(f"{place}.{key}", f"must be {expected}, got {value[key]!r}"))
        else:
            found[key] = value[key]
    return found


def _fraction(given: Any) -> Any:
    """0.05 of "5%" and of 0.05."""
    if isinstance(given, str) and given.strip().endswith("%"):
        try:
            return float(given.strip()[:-1]) / 100
        except ValueError:
            return given
    return given


def _range_problem(metric: str, bound: str, limit: float) -> tuple[str, str | None] | None:
    if bound == "regress":
        if not 0 <= limit < 1:
            return f"must be a share in [0, 1), got {limit:g}", '"5%" and 0.05 are the same'
        return None
    if metric in ("accuracy", "agreement"):
        if bound == "drop" and not -1 < limit < 1:
            return f"must be a fraction in (-1, 1), got {limit}", "0.01 is one point"
        if bound != "drop" and not 0 <= limit <= 1:
            return f"must be a fraction in [0, 1], got {limit}", f"{limit / 100:g} is {limit:g} %"
    elif (metric in OWN_METRICS or metric.startswith("latency.")) and limit <= 0:
        return f"must be positive, got {limit}", None
    return None
