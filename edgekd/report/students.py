"""Fronts of students as text and as a page: pure renderings of the document of `edgekd students`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import figures as f
from .columns import aligned
from .svg import Scale, domain, label, line, text, tick, ticks

__all__ = ["students_html", "students_text"]

Front = Mapping[str, Any]
Row = Mapping[str, Any]
WIDE, NARROW = (1000, 430), (360, 330)


def students_text(document: Mapping[str, Any]) -> str:
    """A block a profile: how it was measured, a line a candidate (a star: on the front), and what capacity means."""
    return "\n".join(_block(front) for front in document["fronts"])


def students_html(document: Mapping[str, Any]) -> str:
    """One page that needs no network: for each profile a drawing and a table."""
    package = files("edgekd.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(package.joinpath("students.html.j2").read_text(encoding="utf-8"))
    return template.render(
        family=document["family"],
        style=Markup(package.joinpath("style.css").read_text(encoding="utf-8")),
        fronts=[
            {
                "front": front,
                "how": how_measured(front),
                "against": _against(front),
                "drawings": [(name, Markup(drawing(front, s))) for name, s in (("wide", WIDE), ("narrow", NARROW))],
                "head": _head(front),
                "rows": [(row["front"], _cells(row, front, "±")) for row in front["candidates"]],
            }
            for front in document["fronts"]
        ],
    )


def how_measured(front: Front) -> str:
    """Device, runtime, threads, images, date: what every figure of a front goes with."""
    threads = f"{front['threads']} thread{'s' if front['threads'] > 1 else ''}"
    size = "x".join(map(str, front["size"]))
    rounds = [p["rounds"] for row in front["candidates"] for p in row["precisions"].values()]
    return (
        f"{front['profile']} · {front['device']} · {front['runtime']} · {threads} · batch {front['batch']} · {size} · "
        f"measured {front['measured']}, {min(rounds)} rounds or more, interleaved"
    )


def _against(front: Front) -> str:
    p50 = front["against"]["p50_ms"]
    return f"speed-ups are against {front['against']['name']}: {f.ms(p50['value'])} ms {_interval(p50)}"


def _interval(p50: Mapping[str, float]) -> str:
    return f"[{f.ms(p50['low'])}, {f.ms(p50['high'])}]"


def _block(front: Front) -> str:
    table = [["", *_head(front)], *(["*" if r["front"] else "", *_cells(r, front, "±")] for r in front["candidates"])]
    legend = f"* on the front of latency ({front['precisions'][-1]}) against capacity = {front['capacity']}"
    return "\n".join([how_measured(front), *aligned(table, left=(0, 1)), _against(front), legend]) + "\n"


def _head(front: Front) -> list[str]:
    precisions = front["precisions"]
    cells = ["student", "depth", "width", "params", "MACs"]
    for precision in precisions:
        cells += [f"{precision} p50 ms", f"{precision} speed-up", f"{precision} MB"]
    return cells + (["fp32 / int8"] if len(precisions) > 1 else [])


def _cells(row: Row, front: Front, sign: str) -> list[str]:
    cells = [row["name"], str(row["depth"] or f.NONE), f"{row['width']:g}"]
    cells += [f.compact(row["parameters"]), f.compact(row["macs"])]
    for precision in front["precisions"]:
        found = row["precisions"][precision]
        p50 = found["p50_ms"]
        half = max(p50["high"] - p50["value"], p50["value"] - p50["low"])
        cells.append(f"{f.ms(p50['value'])} {sign} {f.fixed(half, f.decimals(p50['value']))}")
        cells += [f.times(found["speedup"]["value"]), f.mb(found["size_mb"])]
    if len(front["precisions"]) > 1:
        first, last = (row["precisions"][p]["p50_ms"]["value"] for p in front["precisions"])
        cells.append(f.times(first / last))
    return cells


def drawing(front: Front, size: tuple[int, int]) -> str:
    """MACs against median latency, both logarithmic: a mark a candidate and precision, the front as a line."""
    precisions, rows = front["precisions"], front["candidates"]
    left, right, top, bottom = 58.0, size[0] - 22.0, 30.0, size[1] - 44.0
    times = [v for row in rows for p in precisions for v in row["precisions"][p]["p50_ms"].values()]
    x = Scale(*domain(times, None, log=True), left, right, log=True)
    y = Scale(*domain([row["macs"] / 1e6 for row in rows], None, log=True), bottom, top, log=True)
    parts = [text(4, 14, "MACs, millions (log scale): a stand-in for what it can learn", "axis-name")]
    for t in ticks(y.low, y.high, 5, log=True):
        parts += [line(left, y(t), right, y(t), "grid"), text(left - 8, y(t) + 4, tick(t), "tick", "end")]
    for t in ticks(x.low, x.high, 7, log=True):
        parts += [line(x(t), bottom, x(t), bottom + 4, "axis"), text(x(t), bottom + 17, tick(t), "tick", "middle")]
    parts.append(line(left, bottom, right, bottom, "axis"))
    parts.append(text(right, size[1] - 8, "latency p50, ms (log scale): faster is left", "axis-name", "end"))
    best = sorted((row for row in rows if row["front"]), key=lambda row: float(row["macs"]))
    points = " ".join(f"{x(_p50(row, precisions[-1])):.1f},{y(row['macs'] / 1e6):.1f}" for row in best)
    parts.append(f'<polyline points="{points}" class="front"/>')
    for precision in precisions:
        parts += _marks(rows, precision, precision == precisions[-1], x, y)
    parts += _names(best, precisions[-1], x, y, right, size[0] > 500)
    told = label("; ".join(f"{row['name']} {f.ms(_p50(row, precisions[-1]))} ms" for row in best))
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="on the front: {told}">{"".join(parts)}</svg>'


def _p50(row: Row, precision: str) -> float:
    return float(row["precisions"][precision]["p50_ms"]["value"])


def _marks(rows: Sequence[Row], precision: str, decides: bool, x: Scale, y: Scale) -> Iterator[str]:
    for row in rows:
        p50, height = row["precisions"][precision]["p50_ms"], y(row["macs"] / 1e6)
        css = "final" if decides and row["front"] else "step" if decides else "teacher"
        told = f"{row['name']} {precision}: {f.ms(p50['value'])} ms {_interval(p50)}, {f.compact(row['macs'])} MACs"
        yield line(x(p50["low"]), height, x(p50["high"]), height, "whisker")
        yield (
            f'<circle cx="{x(p50["value"]):.1f}" cy="{height:.1f}" r="{5.5 if decides else 4}" class="mark {css}">'
            f"<title>{escape(told)}</title></circle>"
        )


def _names(best: Sequence[Row], precision: str, x: Scale, y: Scale, right: float, wide: bool) -> Iterator[str]:
    """Names of the front's members, left of their marks; on a phone only those with room between them."""
    free = float("inf")
    for row in best:
        height = y(row["macs"] / 1e6)
        name = row["name"].rpartition("-")[2]
        if free - height < (13 if wide else 22):
            continue
        free = height
        yield text(x(_p50(row, precision)) - 10, height - 4, name, "name final", "end")
