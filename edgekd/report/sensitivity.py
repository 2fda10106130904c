"""A sensitivity sweep as text and as a page: pure renderings of the document of `edgekd sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import pairwise
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import figures as f
from .columns import aligned
from .svg import Scale, label, line, shorten, text, tick, ticks

__all__ = ["harm_at", "sensitivity_html", "sensitivity_text"]

Document = Mapping[str, Any]
Row = Mapping[str, Any]
WIDE, NARROW = (1000, 430), (360, 330)
#: Shares of the channels that are gone in the table's columns.
SHARES = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
#: The drawing begins so far below the largest harm: less is nothing.
DECADES = 1e-4
#: Lines with a colour of their own.
NAMED = 6


def harm_at(group: Row, share: float) -> float | None:
    """The harm with that share of a group's units gone, on straight lines between its steps; None beyond the last."""
    gone = [(1 - step["left"] / group["units"], step["harm"]) for step in group["steps"]]
    for (x0, y0), (x1, y1) in pairwise(gone):
        if x0 <= share <= x1:
            return float(y0 + (y1 - y0) * (share - x0) / (x1 - x0))
    return None


def sensitivity_text(document: Document) -> str:
    """How it was measured, then a table of groups, of blocks and of layers, each from the most harmful on."""
    parts = [how_measured(document)]
    for title, table in _tables(document):
        parts += ["", title, *aligned(table, left=(0,))]
    alone = _left_alone(document)
    parts += ["", "left alone", *(f"  {name}: {reason}" for name, reason in alone)] if alone else []
    return "\n".join(parts) + "\n"


def sensitivity_html(document: Document) -> str:
    """One page that needs no network: harm against the channels that are left, bars for blocks and layers, tables."""
    package = files("edgekd.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(package.joinpath("sensitivity.html.j2").read_text(encoding="utf-8"))
    return template.render(
        document=document,
        style=Markup(package.joinpath("style.css").read_text(encoding="utf-8")),
        how=how_measured(document),
        drawings=[(n, Markup(curves(document["groups"], s))) for n, s in (("wide", WIDE), ("narrow", NARROW))],
        names=[group["name"] for group in _drawn(document["groups"])[:NAMED]],
        tables=[(title, table[0], table[1:]) for title, table in _tables(document)],
        bars=[
            (title, Markup(bars(rows)))
            for title, rows in (("Without a block", document["blocks"]), ("With a layer in int8", document["layers"]))
            if any(row["harm"] is not None for row in rows)
        ],
        alone=_left_alone(document),
    )


def how_measured(document: Document) -> str:
    """Images, importance, channel multiple and scheme: what every figure goes with."""
    accuracy = document["accuracy"]
    known = "" if accuracy is None else f", top-1 {f.percent(accuracy)} as it is"
    split = f"{document.get('split', '')} images".lstrip()
    told = f"{document['images']:,} {split}" if "images" in document else split
    return (
        f"{told}{known} · {f.compact(document['macs'])} MACs · channels by {document['importance']}, "
        f"multiples of {document['channel_multiple']} · int8 as {document['scheme']}"
    )


def _tables(document: Document) -> list[tuple[str, list[list[str]]]]:
    tables = []
    groups = _drawn(document["groups"])
    if groups:
        title = "groups of channels: harm in nats with a share of them gone, and with all that may go"
        head = ["group", "channels", *SHARES, "most", "drop, points", "left", "saves MACs"]
        tables.append((title, [head, *map(_group_cells, groups)]))
    for title, rows, share in (
        ("blocks: harm without one", document["blocks"], "saves MACs"),
        ("layers: harm with one in int8", document["layers"], "MACs"),
    ):
        known = [row for row in rows if row["harm"] is not None]
        if known:
            head = [title.partition("s:")[0], "harm", "drop, points", share]
            cells = [[r["name"], _nats(r["harm"]), _points(r["drop"]), f.percent(r["macs"])] for r in known]
            tables.append((title, [head, *cells]))
    return tables


def _group_cells(group: Row) -> list[str]:
    last = group["steps"][-1]
    shares = [_nats(harm_at(group, share)) for share in SHARES.values()]
    left = round(group["channels"] * last["left"] / group["units"])
    end = [_nats(last["harm"]), _points(last["drop"]), str(left), f.percent(1 - last["macs"])]
    return [group["name"], str(group["channels"]), *shares, *end]


def _nats(value: float | None) -> str:
    return f.NONE if value is None else f.significant(value, 2)


def _points(drop: float | None) -> str:
    return f.NONE if drop is None else f.points(drop)


def _left_alone(document: Document) -> list[tuple[str, str]]:
    rows = [(row["name"], row["reason"]) for row in (*document["groups"], *document["blocks"]) if row["reason"]]
    for what in ("not_pruned", "not_quantized"):
        if document[what]:
            rows.append((what.replace("_", " "), document[what]))
    return rows


def _drawn(groups: Sequence[Row]) -> list[Row]:
    return [group for group in groups if len(group["steps"]) > 1]


def curves(groups: Sequence[Row], size: tuple[int, int]) -> str:
    """Harm, logarithmic, against the share of channels that is left: a line a group, the most harmful in colour."""
    drawn = _drawn(groups)
    top = max((step["harm"] for group in drawn for step in group["steps"]), default=0.0)
    if top <= 0:
        return ""
    left, right, bottom = 64.0, size[0] - 16.0, size[1] - 44.0
    x = Scale(1.0, 0.0, left, right)
    y = Scale(top * DECADES, top * 1.3, bottom, 28.0, log=True)
    parts = [text(4, 14, "harm: KL divergence of the answers, nats (log scale)", "axis-name")]
    for t in ticks(y.low, y.high, 5, log=True):
        if f"{t:e}".startswith("1.0"):
            parts += [line(left, y(t), right, y(t), "grid"), text(left - 8, y(t) + 4, tick(t), "tick", "end")]
    for t in (1.0, 0.75, 0.5, 0.25, 0.0):
        name = f"{round(100 * t)} %"
        parts += [line(x(t), bottom, x(t), bottom + 4, "axis"), text(x(t), bottom + 17, name, "tick", "middle")]
    parts.append(line(left, bottom, right, bottom, "axis"))
    parts.append(text(right, size[1] - 8, "channels of the group that are left", "axis-name", "end"))
    for i, group in reversed(list(enumerate(drawn))):  # the most harmful on top
        css = f"series s{i}" if i < NAMED else "run"
        shares = [(step["left"] / group["units"], max(step["harm"], y.low)) for step in group["steps"]]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in shares)
        parts.append(f'<polyline points="{path}" class="{css}"><title>{escape(_told(group))}</title></polyline>')
    told = label("; ".join(map(_told, drawn)))
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{told}">{"".join(parts)}</svg>'


def _told(group: Row) -> str:
    channels = group["channels"] / group["units"]
    steps = ", ".join(
        f"{_nats(step['harm'])} with {round(step['left'] * channels)} left" for step in group["steps"][1:]
    )
    return f"{group['name']}: {steps}"


def bars(rows: Sequence[Row]) -> str:
    """A bar a row: its harm, the longest one the whole width."""
    known = [row for row in rows if row["harm"] is not None]
    top = max((row["harm"] for row in known), default=0.0) or 1.0
    parts = []
    for i, row in enumerate(known):
        y = i * 36
        parts.append(text("0", y + 13, shorten(row["name"], 40), "row-name"))
        parts.append(text("100%", y + 13, f"{_nats(row['harm'])} nats", "row-value", "end"))
        parts.append(f'<rect x="0" y="{y + 20}" width="100%" height="8" class="track"/>')
        width = 100 * max(row["harm"], 0.0) / top
        parts.append(f'<rect x="0" y="{y + 20}" width="{width:.1f}%" height="8" class="worse"/>')
    told = label("; ".join(f"{row['name']} {_nats(row['harm'])}" for row in known))
    return f'<svg width="100%" height="{36 * len(known)}" role="img" aria-label="{told}">{"".join(parts)}</svg>'
