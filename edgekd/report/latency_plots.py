"""Drawings of how latency is distributed: tails, histograms, the order of rounds, time per operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..bench.results import Histogram, LayerTime, Variant
from . import figures as f
from .svg import Scale, label, line, shorten, text, tick, ticks

__all__ = ["histogram", "operators", "percentiles", "trace"]

#: Percentiles with a tick, as far as there are samples.
TAIL = (50, 75, 90, 95, 99, 99.9, 99.99)


def percentiles(variants: Sequence[Variant], size: tuple[int, int]) -> str:
    """Latency over its own median against the percentile, whose axis stretches the tail (nines are evenly spaced).

    Empty where no variant has a curve beyond the median.
    """
    series = []
    for i, v in enumerate(variants):
        latency = v.latency
        if latency is None or not latency.p50.value > 0:
            continue
        points = [(p, ms / latency.p50.value) for p, ms in latency.curve if 50 <= p < 100 and math.isfinite(ms)]
        if len(points) > 1:
            series.append((v.name, i, points))
    if not series:
        return ""
    width, height = size
    narrow = width < 500
    last = max(p for _, _, points in series for p, _ in points)
    top = max(y for _, _, points in series for _, y in points)
    low = min(y for _, _, points in series for _, y in points)
    pad = max(0.02, 0.08 * (top - low))
    x = Scale(_nines(50), max(_nines(last), _nines(90)), 46.0, width - (16.0 if narrow else 150.0))
    y = Scale(low - pad, top + pad, height - 44.0, 26.0)
    parts = [text(4, 14, "latency, times its own median", "axis-name")]
    for t in ticks(y.low, y.high, 4):
        parts += [line(x.start, y(t), x.end, y(t), "grid"), text(x.start - 8, y(t) + 4, tick(t), "tick", "end")]
    for p in [p for p in TAIL if _nines(p) <= x.high + 1e-9]:
        parts.append(line(x(_nines(p)), y.start, x(_nines(p)), y.start + 4, "axis"))
        if not (narrow and p == 75):
            parts.append(text(x(_nines(p)), y.start + 17, f"p{p:g}", "tick", "middle"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text(x.end, height - 6, "percentile", "axis-name", "end"))
    taken: list[float] = []
    for name, i, points in sorted(series, key=lambda s: s[2][-1][1]):
        path = " ".join(f"{x(_nines(p)):.1f},{y(v):.1f}" for p, v in points)
        parts.append(f'<polyline points="{path}" class="series s{i % 6}"><title>{escape(name)}</title></polyline>')
        if not narrow:
            place = y(points[-1][1]) + 4
            while any(abs(place - other) < 14 for other in taken):
                place -= 2
            taken.append(place)
            parts.append(text(x.end + 8, place, f"{shorten(name, 12)}  {f.times(points[-1][1])}", f"direct s{i % 6}"))
    told = "; ".join(f"{name} {points[-1][1]:.3g} at p{points[-1][0]:g}" for name, _, points in series)
    return _svg(width, height, f"latency over its own median by percentile: {told}", parts)


def _nines(percentile: float) -> float:
    return -math.log10(1 - percentile / 100)


def histogram(found: Histogram, index: int, size: tuple[int, int] = (400, 150)) -> str:
    """Counts of calls by milliseconds; the last bin holds everything beyond."""
    width, height = size
    counts = found.counts
    x = Scale(found.low, found.high if found.high > found.low else found.low + 1e-9, 6.0, width - 6.0)
    tallest = max(counts, default=0) or 1
    base = height - 26.0
    step = (x.end - x.start) / max(len(counts), 1)
    parts = []
    for i, count in enumerate(counts):
        tall = (base - 6) * count / tallest
        title = f"<title>{count:,} calls from {found.low + (found.high - found.low) * i / len(counts):.4g} ms</title>"
        place = f'x="{x.start + i * step:.1f}" y="{base - tall:.1f}" width="{max(step - 1, 0.5):.1f}"'
        parts.append(f'<rect {place} height="{tall:.1f}" class="fill s{index % 6}">{title}</rect>')
    parts.append(line(x.start, base, x.end, base, "axis"))
    for t in ticks(x.low, x.high, 4):
        parts += [line(x(t), base, x(t), base + 4, "axis"), text(x(t), base + 17, tick(t), "tick", "middle")]
    parts.append(text(x.end, 8, "calls", "tick", "end"))
    return _svg(width, height, f"histogram of {sum(counts):,} calls, {found.low:.4g} to {found.high:.4g} ms", parts)


def trace(rounds: Sequence[float], index: int, reach: float, size: tuple[int, int] = (300, 90)) -> str:
    """The rounds' medians in the order in which they were measured, over their median; the axis spans ± `reach`."""
    width, height = size
    middle = sorted(rounds)[len(rounds) // 2] or 1.0
    x = Scale(0, max(len(rounds) - 1, 1), 44.0, width - 8.0)
    y = Scale(1 - reach, 1 + reach, height - 8.0, 8.0)
    parts = []
    for at in (1 - reach, 1.0, 1 + reach):
        shown = "median" if at == 1 else f"{f.signed(100 * (at - 1), 0 if reach >= 0.02 else 1)} %"
        parts += [line(x.start, y(at), x.end, y(at), "grid"), text(x.start - 6, y(at) + 4, shown, "tick", "end")]
    points = [(x(i), y(min(max(r / middle, y.low), y.high))) for i, r in enumerate(rounds)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    parts.append(f'<polyline points="{path}" class="series s{index % 6}"/>')
    parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" class="fill s{index % 6}"/>' for a, b in points]
    return _svg(width, height, f"medians of {len(rounds)} rounds in order", parts)


def operators(times: Sequence[LayerTime], shown: int = 12) -> str:
    """The slowest operators as bars from zero: name, kind, microseconds, share of all."""
    rows = times[:shown]
    largest = max((t.ms for t in rows), default=0.0) or 1.0
    parts = []
    for i, t in enumerate(rows):
        top = 34 * i
        parts.append(f"<g><title>{escape(t.name)}</title>")
        parts.append(text("0", top + 12, _ending(t.name, 26), "row-name"))
        parts.append(text("60%", top + 12, shorten(t.op, 16), "row-change op", "end"))
        parts.append(text("100%", top + 12, f"{f.significant(1000 * t.ms)} µs · {f.percent(t.share, 0)}", "", "end"))
        for share, css in ((100.0, "track"), (100 * t.ms / largest, "better")):
            parts.append(f'<rect x="0" y="{top + 19}" width="{share:.2f}%" height="6" class="{css}"/>')
        parts.append("</g>")
    told = "; ".join(f"{t.name} {t.op} {1000 * t.ms:.3g} microseconds" for t in rows)
    body = "".join(parts)
    return f'<svg width="100%" height="{34 * len(rows)}" role="img" aria-label="{label(told)}">{body}</svg>'


def _ending(name: str, characters: int) -> str:
    """Paths of nodes differ at their end."""
    return name if len(name) <= characters else "…" + name[1 - characters :]


def _svg(width: float, height: float, told: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label(told)}">{"".join(parts)}</svg>'
