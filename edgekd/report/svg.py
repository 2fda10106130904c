"""Drawings by hand as inline SVG: small, sharp, themed by the page's style sheet, and readable without scripts.

Colours are classes, so that light, dark and print share one drawing. All text goes through `text`, which escapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from .model import Budget, Waterfall
from .table import Quality

__all__ = ["Mark", "Scale", "curve", "label", "line", "scatter", "shorten", "text", "tick", "ticks", "waterfall"]


@dataclass(frozen=True)
class Mark:
    """A variant in the plot: x is the median latency in ms, y the headline metric, each with its interval.

    `role`: teacher, step or final, which are joined; other: made for another profile.
    """

    name: str
    detail: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    role: str = "step"


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, 1e-12)), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def inside(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class _Box:
    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: _Box) -> float:
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return width * height if width > 0 and height > 0 else 0.0


def text(x: float | str, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    place = f"{x:.1f}" if isinstance(x, float | int) else x
    return f'<text x="{place}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def shorten(name: str, characters: int) -> str:
    return name if len(name) <= characters else name[: characters - 1] + "…"


def label(told: str) -> str:
    """What a drawing says in words, as an attribute's value."""
    return escape(told, quote=True)


def ticks(low: float, high: float, wanted: int, log: bool = False) -> list[float]:
    """Round values between low and high: steps of 1, 2 or 5."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        return [t for t in every if low <= t <= high]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") if value else "0"


def domain(values: Sequence[float], budget: float | None, log: bool) -> tuple[float, float]:
    """The range to draw: all values, and the gate's line where it is near enough not to squash them."""
    low, high = min(values), max(values)
    if log:
        if budget is not None and low / 4 <= budget <= high * 4:
            low, high = min(low, budget), max(high, budget)
        pad = max(1.15, (high / low) ** 0.12)
        return low / pad, high * pad
    spread = high - low or abs(high) * 0.1 or 1.0
    if budget is not None and low - spread <= budget <= high + spread:
        low, high = min(low, budget), max(high, budget)
    spread = high - low or spread
    return low - 0.14 * spread, high + 0.14 * spread


def scatter(marks: Sequence[Mark], budgets: Sequence[Budget], quality: Quality, size: tuple[int, int]) -> str:
    """The headline metric against median latency, in stage order; faster is left. `size` in pixels."""
    width, height = size
    left, right, top, bottom = 50.0, width - 14.0, 30.0, height - 44.0
    at = {b.axis: b for b in budgets}
    latencies = [x for m in marks for x in (m.x, *(m.x_interval or ()))]
    log = max(latencies) / min(latencies) >= 3 and min(latencies) > 0
    x = Scale(*domain(latencies, at["latency"].at if "latency" in at else None, log), left, right, log)
    values = [v for m in marks for v in (m.y, *(m.y_interval or ()))]
    y = Scale(*domain(values, at["quality"].at if "quality" in at else None, log=False), bottom, top)
    parts = [*_frame(x, y, quality.fraction, narrow=width < 500), *_allowed(x, y, at, quality.higher_is_better)]
    parts.append(text(left, 14, f"{quality.name}{', %' if quality.fraction else ''}", "axis-name"))
    parts.append(
        text(right, height - 8, f"latency p50, ms{' (log scale)' if log else ''}: faster is left", "axis-name", "end")
    )
    way = [m for m in marks if m.role != "other"]
    parts += _path(way, x, y)
    for m in marks:
        if m.x_interval:
            parts.append(line(x(m.x_interval[0]), y(m.y), x(m.x_interval[1]), y(m.y), "whisker"))
        if m.y_interval:
            parts.append(line(x(m.x), y(m.y_interval[0]), x(m.x), y(m.y_interval[1]), "whisker"))
    for m in marks:
        radius = 7 if m.role == "final" else 5.5
        title = f"<title>{escape(m.name)}: {escape(m.detail)}</title>"
        parts.append(f'<circle cx="{x(m.x):.1f}" cy="{y(m.y):.1f}" r="{radius}" class="mark {m.role}">{title}</circle>')
    lines = [_Box(x(b.at) - 2, top, x(b.at) + 2, bottom) for b in budgets if b.axis == "latency"]
    lines += [_Box(left, y(b.at) - 2, right, y(b.at) + 2) for b in budgets if b.axis == "quality"]
    parts += _labels(marks, way, x, y, _Box(left, top - 8, right, bottom), lines, detailed=width >= 500)
    told = label(f"{quality.name} against latency: " + "; ".join(f"{m.name} {m.detail}" for m in marks))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{told}">{"".join(parts)}</svg>'


def _frame(x: Scale, y: Scale, fraction: bool, narrow: bool) -> list[str]:
    parts = []
    for t in ticks(y.low, y.high, 4 if narrow else 5):
        parts.append(line(x.start, y(t), x.end, y(t), "grid"))
        parts.append(text(x.start - 8, y(t) + 4, tick(round(100 * t, 9) if fraction else t), "tick", "end"))
    for t in ticks(x.low, x.high, 4 if narrow else 7, x.log):
        parts.append(line(x(t), y.start, x(t), y.start + 4, "axis"))
        parts.append(text(x(t), y.start + 17, tick(t), "tick", "middle"))
    return [*parts, line(x.start, y.start, x.end, y.start, "axis")]


def _allowed(x: Scale, y: Scale, at: dict[str, Budget], up: bool) -> list[str]:
    """The gate's limits as dashed lines, and what they leave as a tinted field."""
    budgets = {axis: b for axis, b in at.items() if (x if axis == "latency" else y).inside(b.at)}
    if not budgets:
        return []
    parts = []
    edge = x(budgets["latency"].at) if "latency" in budgets else x.end
    floor, ceiling = (y.start, y.end) if up else (y.end, y.start)
    limit = y(budgets["quality"].at) if "quality" in budgets else floor
    upper, lower = min(limit, ceiling), max(limit, ceiling)
    place = f'x="{x.start:.1f}" y="{upper:.1f}" width="{edge - x.start:.1f}" height="{lower - upper:.1f}"'
    parts.append(f'<rect {place} class="allowed"/>')
    if "latency" in budgets:
        parts.append(line(edge, y.start, edge, y.end, "budget"))
        crowded = edge < x.start + 150
        parts.append(
            text(
                edge + (5 if crowded else -5),
                y.end - 4,
                budgets["latency"].label,
                "budget-name",
                "start" if crowded else "end",
            )
        )
    if "quality" in budgets:
        parts.append(line(x.start, limit, x.end, limit, "budget"))
        parts.append(text(x.end, limit + (14 if up else -6), budgets["quality"].label, "budget-name", "end"))
    return parts


def _path(marks: Sequence[Mark], x: Scale, y: Scale) -> list[str]:
    """The way through the stages, with an arrow head in the middle of each leg."""
    parts = []
    for a, b in pairwise(marks):
        x0, y0, x1, y1 = x(a.x), y(a.y), x(b.x), y(b.y)
        parts.append(line(x0, y0, x1, y1, "path"))
        length = math.hypot(x1 - x0, y1 - y0)
        if length < 28:
            continue
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        cx, cy = (x0 + x1) / 2 + 4 * ux, (y0 + y1) / 2 + 4 * uy
        corners = [(cx, cy), (cx - 8 * ux - 4 * uy, cy - 8 * uy + 4 * ux), (cx - 8 * ux + 4 * uy, cy - 8 * uy - 4 * ux)]
        parts.append(f'<polygon points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in corners)}" class="arrow"/>')
    return parts


def _labels(
    marks: Sequence[Mark], way: Sequence[Mark], x: Scale, y: Scale, plot: _Box, lines: Sequence[_Box], detailed: bool
) -> list[str]:
    """Each name beside its mark, on the side where it covers least."""
    taken = [*lines]
    taken += [_Box(x(m.x) - 8, y(m.y) - 8, x(m.x) + 8, y(m.y) + 8) for m in marks]
    for m in marks:
        if m.y_interval:
            taken.append(_Box(x(m.x) - 2, y(m.y_interval[1]), x(m.x) + 2, y(m.y_interval[0])))
    for a, b in pairwise(way):
        for i in range(1, 24):
            px, py = (x(a.x) + (x(b.x) - x(a.x)) * i / 24, y(a.y) + (y(b.y) - y(a.y)) * i / 24)
            taken.append(_Box(px - 3, py - 3, px + 3, py + 3))
    parts = []
    for m in marks:
        name = shorten(m.name, 24 if detailed else 14)
        wide = max(7.0 * len(name), 6.0 * len(m.detail) if detailed else 0)
        tall = 28 if detailed else 14
        cx, cy = x(m.x), y(m.y)
        options = [
            ("start", cx + 12, cy - tall / 2),
            ("end", cx - 12, cy - tall / 2),
            ("middle", cx, cy - tall - 10),
            ("middle", cx, cy + 10),
            ("start", cx + 9, cy - tall - 7),
            ("start", cx + 9, cy + 7),
            ("end", cx - 9, cy - tall - 7),
            ("end", cx - 9, cy + 7),
        ]
        if m.y_interval:
            options += [("middle", cx, y(m.y_interval[1]) - tall - 5), ("middle", cx, y(m.y_interval[0]) + 2)]
        best: tuple[float, str, float, float, _Box] | None = None
        for anchor, px, py in options:
            x0 = px - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = _Box(x0, py, x0 + wide, py + tall)
            beyond = wide * tall - box.overlap(plot)
            cost = 4 * beyond + sum(box.overlap(other) for other in taken)
            if best is None or cost < best[0] - 1e-6:
                best = (cost, anchor, px, py, box)
        assert best is not None
        _, anchor, px, py, box = best
        taken.append(box)
        parts.append(text(px, py + 12, name, f"name {m.role}", anchor))
        if detailed:
            parts.append(text(px, py + 26, m.detail, "detail", anchor))
    return parts


ROW = 40


def waterfall(chart: Waterfall) -> str:
    """What each stage changed. Horizontal places are in percent, so that the text keeps its size at any width."""
    values = [v for b in chart.bars for v in (b.before, b.after) if v is not None]
    low, high = (0.0, max(values)) if chart.zero else domain(values, None, log=False)
    scale = Scale(low, high if high > low else low + 1, 0.0, 100.0)
    parts = []
    for i, bar in enumerate(chart.bars):
        y = i * ROW
        end = scale(bar.after)
        start = scale(bar.before) if bar.before is not None else end
        css = {True: "better", False: "worse", None: "same"}[bar.better]
        title = f"<title>{escape(bar.name)}: {escape(bar.text)} {escape(bar.change)}</title>"
        parts.append(f"<g>{title}{text('0', y + 13, shorten(bar.name, 13), 'row-name')}")
        parts.append(text("100%", y + 13, bar.text, "row-value", "end"))
        parts.append(text("66%", y + 13, bar.change, f"row-change {css}", "end"))
        parts.append(_bar(0, 100, y, "track"))
        if chart.zero:
            parts.append(_bar(0, min(start, end), y, "rest"))
        if bar.before is not None:
            parts.append(_bar(min(start, end), max(start, end), y, css))
        parts.append(f'<line x1="{end:.2f}%" x2="{end:.2f}%" y1="{y + 20}" y2="{y + 32}" class="stop"/>')
        parts.append("</g>")
    height = ROW * len(chart.bars)
    told = label(f"{chart.title}: " + "; ".join(f"{b.name} {b.text} {b.change}" for b in chart.bars))
    return f'<svg width="100%" height="{height}" role="img" aria-label="{told}">{"".join(parts)}</svg>'


def _bar(start: float, end: float, y: float, css: str) -> str:
    return f'<rect x="{start:.2f}%" y="{y + 22}" width="{max(end - start, 0):.2f}%" height="8" class="{css}"/>'


def curve(points: Sequence[tuple[float, float]], css: str, told: str, height: int = 72) -> str:
    """A line over epochs, stretched to any width without stretching its stroke."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, 0, 100)
    y = Scale(min(ys), max(ys) if max(ys) > min(ys) else min(ys) + 1, 96, 4)
    path = " ".join(f"{x(a):.2f},{y(b):.2f}" for a, b in points)
    return (
        f'<svg width="100%" height="{height}" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{label(told)}"><line x1="0" y1="99" x2="100" y2="99" class="axis"/>'
        f'<polyline points="{path}" class="curve {css}"/></svg>'
    )
