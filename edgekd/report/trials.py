"""A search as a page and as text: pure renderings of the content of `trials.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import figures as f
from . import trial_plots as plots
from .columns import aligned
from .table import Quality

__all__ = ["trials_html", "trials_text"]

FLAT, NARROW = (1000, 330), (360, 300)
#: Lines of the table on a terminal; the file has all.
LINES = 10


def trials_html(document: Mapping[str, Any]) -> str:
    """One page that needs no network: trials in order, training, every field, and a table."""
    package = files("edgekd.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(package.joinpath("trials.html.j2").read_text(encoding="utf-8"))
    trials, quality = document["trials"], _quality(document)
    best = document["best"]["number"] if document["best"] else None
    return template.render(
        document=document,
        style=Markup(package.joinpath("style.css").read_text(encoding="utf-8")),
        in_order=_sizes([plots.in_order(trials, best, quality, size) for size in (FLAT, NARROW)]),
        training=_sizes([plots.training(trials, best, quality, size) for size in (FLAT, NARROW)]),
        against=[
            (path, Markup(drawing))
            for path, axis in document["fields"].items()
            if (drawing := plots.against(path, axis, trials, best, quality))
        ],
        importance=Markup(plots.importance(document["importance"])) if document["importance"] else "",
        summary=_summary(document),
        head=_head(document),
        rows=[(t["number"] == best, t["state"], _row(t, document, quality)) for t in _sorted(document)],
    )


def trials_text(document: Mapping[str, Any]) -> str:
    """The best trials as a table for a terminal, and how all of them ended."""
    quality = _quality(document)
    rows = _sorted(document)[:LINES]
    table = [_head(document), *(_row(t, document, quality) for t in rows)]
    lines = aligned(table)
    more = len(document["trials"]) - len(rows)
    if more > 0:
        lines.append(f"... and {more} more")
    return "\n".join([*lines, _summary(document)]) + "\n"


def _quality(document: Mapping[str, Any]) -> Quality:
    metric = document["metric"]
    return Quality(metric, metric.endswith("accuracy"), document["direction"] == "max")


def _sizes(drawings: Sequence[str]) -> list[tuple[str, Markup]]:
    return [(name, Markup(d)) for name, d in zip(("wide", "narrow"), drawings, strict=True) if d]


def _head(document: Mapping[str, Any]) -> list[str]:
    fields = plots.short_names(list(document["fields"])).values()
    return ["trial", "state", document["metric"], "epochs", "seconds", *fields]


def _row(t: Mapping[str, Any], document: Mapping[str, Any], quality: Quality) -> list[str]:
    reached = plots.reached(t)
    found = quality.text(reached) if reached is not None else f.NONE
    values = [plots.shown(t["values"][path]) if path in t["values"] else f.NONE for path in document["fields"]]
    return [str(t["number"]), t["state"], found, str(t["epochs"]), f"{t['seconds']:.1f}", *values]


def _sorted(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Complete ones first, each kind from best to worst."""
    sign = -1 if document["direction"] == "max" else 1
    order = ["complete", "running", "pruned"]

    def place(t: Mapping[str, Any]) -> tuple[int, float, int]:
        reached = plots.reached(t)
        rank = order.index(t["state"]) if t["state"] in order else len(order)
        return rank, sign * reached if reached is not None else 0.0, t["number"]

    return sorted(document["trials"], key=place)


def _summary(document: Mapping[str, Any]) -> str:
    states = [t["state"] for t in document["trials"]]
    ended = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))
    best = document["best"]
    if best is None:
        return f"{len(states)} trials: {ended}"
    found = _quality(document).text(best["value"])
    return f"{len(states)} trials: {ended}; the best, {best['number']}, has {document['metric']} {found} on validation"
