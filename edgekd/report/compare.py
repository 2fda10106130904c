"""Two results documents side by side: what changed, how sure that is, and whether it is for the better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..bench.compare import Change, Side, change_of, machine_differences
from ..bench.results import ProfileResults, Results, Variant
from ..errors import UsageError
from . import figures as f
from .columns import aligned
from .markdown import escape

__all__ = ["Difference", "compare", "comparison_markdown", "comparison_table", "comparison_text"]

Mark = Literal["better", "worse", "same", "unknown"]
MARKS: dict[Mark, str] = {"better": "+", "worse": "-", "same": "=", "unknown": "?"}
EMOJI: dict[Mark, str] = {"better": "✅ better", "worse": "❌ worse", "same": "same", "unknown": "❔ cannot be told"}
METRICS = ("latency.p50", "latency.p95", "latency.p99", "size_mb", "macs", "parameters", "peak_memory_mb", "load_ms")
UNITS = {"latency.p50": "ms", "latency.p95": "ms", "latency.p99": "ms", "load_ms": "ms", "size_mb": "MB",
         "peak_memory_mb": "MB"}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One figure of one variant on one profile. `mark` is unknown where the interval of the change holds zero."""

    profile: str
    variant: str
    metric: str
    change: Change
    mark: Mark


def compare(a: Results, b: Results) -> tuple[list[Difference], list[str]]:
    """From `a` to `b`: differences of the variants that both have, and what makes them less sure, in words.

    Where no variant has the same name, the last ones are compared. Raises UsageError when there is no common profile.
    """
    found: list[Difference] = []
    notes: dict[str, None] = {}
    common = [(p, q) for p in a.profiles for q in b.profiles if p.profile == q.profile and p.variants and q.variants]
    if not common:
        names = [", ".join(p.profile for p in r.profiles) or "none" for r in (a, b)]
        raise UsageError(f"no profile was measured in both: {names[0]}; {names[1]}", hint="edgekd bench RUN --profile")
    for p, q in common:
        for one, other in _pairs(p, q):
            base, own = Side(a, p, one), Side(b, q, other)
            different = machine_differences(base, own)
            for text in different:
                notes[f"{p.profile}: {text} (the first and the second)".replace(" and here ", " and ")] = None
            name = one.name if one.name == other.name else f"{one.name} → {other.name}"
            for metric in (b.headline, *METRICS):
                change = _change(metric, base, own)
                if change is not None:
                    found.append(Difference(p.profile, name, metric, change, _mark(change)))
    return found, list(notes)


def _pairs(p: ProfileResults, q: ProfileResults) -> list[tuple[Variant, Variant]]:
    same = [(v, w) for v in p.variants for w in q.variants if v.name == w.name]
    return same or [(p.variants[-1], q.variants[-1])]


def _change(metric: str, base: Side, own: Side) -> Change | None:
    """None where one of them does not have it."""
    try:
        return change_of(metric, base, own)
    except UsageError:
        return None


def _mark(change: Change) -> Mark:
    worse = change.worse
    if worse.low <= 0 <= worse.high:
        exact = worse.low == worse.high == 0
        return "same" if exact else "unknown"
    return "worse" if worse.value > 0 else "better"


def _figures(d: Difference, headline: str) -> tuple[str, str, str]:
    """before, after, and the change: points of a fraction, percent of everything else, with its interval."""
    c, worse = d.change, d.change.worse
    if d.metric == headline and 0 <= c.before <= 1 and 0 <= c.after <= 1:
        scale = 100 * c.before
        # `worse` is the share of the metric that was lost; points are what people read, and a gain is a plus.
        values = [-scale * x for x in (worse.value, worse.high, worse.low)]
        shown, unit = (f.percent(c.before, 2), f.percent(c.after, 2)), "points"
        texts = [f.signed(v, 2) for v in values]
    else:
        unit = "%"
        texts = [f.signed(100 * x, 1) for x in (worse.value, worse.low, worse.high)]
        ending = UNITS.get(d.metric, "")
        write = f.compact if d.metric in ("macs", "parameters") else f.significant
        shown = (f"{write(c.before)} {ending}".strip(), f"{write(c.after)} {ending}".strip())
    single = worse.low == worse.high
    interval = "" if single or not all(map(math.isfinite, (worse.low, worse.high))) else f" [{texts[1]}, {texts[2]}]"
    return (*shown, f"{texts[0]} {unit}{interval}")


def comparison_text(differences: Sequence[Difference], notes: Sequence[str], headline: str) -> str:
    """Aligned lines for a terminal: `+` better, `-` worse, `=` same, `?` cannot be told."""
    rows = [(MARKS[d.mark], d.profile, d.variant, d.metric, *_figures(d, headline), d.change.how) for d in differences]
    legend = "+ better, - worse, = same, ? the interval of the change holds zero"
    return "\n".join([*aligned(rows), legend, *(f"note: {n}" for n in notes)]) + "\n"


def comparison_markdown(differences: Sequence[Difference], notes: Sequence[str], headline: str) -> str:
    """A table for a pull request."""
    head = "| | profile | variant | figure | before | after | change |\n| --- | --- | --- | --- | ---: | ---: | ---: |"
    rows = [
        "| " + " | ".join(map(escape, (EMOJI[d.mark], d.profile, d.variant, d.metric, *_figures(d, headline)))) + " |"
        for d in differences
    ]
    return "\n".join([head, *rows, "", *(f"> {escape(n)}" for n in notes)]).rstrip() + "\n"


def comparison_table(differences: Sequence[Difference], notes: Sequence[str]) -> dict[str, Any]:
    """The same as one JSON document."""
    rows = [
        {"profile": d.profile, "variant": d.variant, "metric": d.metric, "before": d.change.before,
         "after": d.change.after, "worse": d.change.worse.model_dump(), "how": d.change.how, "p": d.change.p,
         "mark": d.mark}
        for d in differences
    ]  # fmt: skip
    return {"differences": rows, "notes": list(notes)}
