"""The report as one HTML file: styles and drawings inside, no scripts, nothing fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..bench.stats import drift
from . import figures as f
from . import latency_plots, svg
from .heat import heat_map
from .history import Curve
from .model import Page, ProfileView
from .overview import overview
from .table import Quality

__all__ = ["html"]

WIDE, FLAT, NARROW = (1000, 430), (1000, 330), (360, 330)
#: Thirds of fewer rounds are single ones.
MIN_DRIFT = 6


def html(page: Page) -> str:
    """Render the page. Everything but edgekd's own drawings and styles is escaped."""
    package = files("edgekd.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(package.joinpath("template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        style=Markup(package.joinpath("style.css").read_text(encoding="utf-8")),
        plots={p.profile: _plots(p, page.quality) for p in page.profiles},
        overview=_sizes(lambda size: overview(page.profiles, page.quality, size)),
        details={p.profile: _details(p) for p in page.profiles},
        draw_waterfall=lambda chart: Markup(svg.waterfall(chart)),
        draw_curve=_draw_curve,
        pretty=_pretty,
    )


@dataclass(frozen=True)
class _Details:
    """Drawings of one profile, empty where there is nothing to draw."""

    percentiles: list[tuple[str, Markup]]
    histograms: list[tuple[str, str, Markup]]
    traces: list[tuple[str, str, Markup]]
    operators: Markup
    confusion: Markup


def _details(profile: ProfileView) -> _Details:
    variants = profile.variants
    timed = [(i, v, v.latency) for i, v in enumerate(variants) if v.latency is not None]
    ends = [timed[0], timed[-1]] if len(timed) > 1 else timed
    histograms = [
        (v.name, f"{latency.samples:,} calls", Markup(latency_plots.histogram(latency.histogram, i)))
        for i, v, latency in ends
        if latency.histogram is not None
    ]
    drawn = [(i, v, latency.round_p50) for i, v, latency in timed if _ordered(latency.round_p50)]
    # One scale for all: what one variant suffers, the others show by staying flat.
    reach = max((abs(r / sorted(rounds)[len(rounds) // 2] - 1) for _, _, rounds in drawn for r in rounds), default=0.0)
    reach = max(0.01, math.ceil(min(reach, 1.0) * 100) / 100)
    traces = [
        (v.name, _drift_in_words(rounds), Markup(latency_plots.trace(rounds, i, reach))) for i, v, rounds in drawn
    ]
    last = variants[-1] if variants else None
    return _Details(
        percentiles=_sizes(lambda size: latency_plots.percentiles(variants, size)),
        histograms=histograms,
        traces=traces,
        operators=Markup(latency_plots.operators(last.layer_times)) if last and last.layer_times else Markup(""),
        confusion=Markup(heat_map(last.confusion, [c.name for c in last.classes]))
        if last and last.confusion
        else Markup(""),
    )


def _ordered(rounds: list[float]) -> bool:
    return len(rounds) > 2 and all(math.isfinite(r) and r > 0 for r in rounds)


def _drift_in_words(rounds: list[float]) -> str:
    change = drift(rounds) if len(rounds) >= MIN_DRIFT else None
    if change is None:
        return f"{len(rounds)} rounds"
    return f"drift {f.signed(100 * change, 1)} %"


def _sizes(draw: Callable[[tuple[int, int]], str]) -> list[tuple[str, Markup]]:
    """A drawing for wide pages and one for phones; none where there is nothing to draw."""
    drawn = [(name, Markup(draw(size))) for name, size in (("wide", FLAT), ("narrow", NARROW))]
    return [d for d in drawn if d[1]]


def _plots(profile: ProfileView, quality: Quality) -> list[tuple[str, Markup]]:
    """The accuracy-latency plot for a wide page and for a phone; none where fewer than two variants have both."""
    marks = []
    for variant, row in zip(profile.variants, profile.rows, strict=True):
        value = quality.of(variant)
        if variant.latency is None or value is None or not variant.latency.p50.value > 0:
            continue
        p50, role = variant.latency.p50, "other" if row.foreign else "step"
        if variant is profile.variants[-1]:
            role = "final"
        elif variant is profile.variants[0]:
            role = "teacher"
        marks.append(
            svg.Mark(
                variant.name,
                f"{quality.text(value)} · {row.cells['p50'].text} ms",
                p50.value,
                value,
                (p50.low, p50.high),
                _paired(profile, quality, variant.drop.low, variant.drop.high) if variant.drop else None,
                role,
            )
        )
    if len(marks) < 2:
        return []
    return [
        (name, Markup(svg.scatter(marks, profile.budgets, quality, size)))
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    ]


def _paired(profile: ProfileView, quality: Quality, low: float, high: float) -> tuple[float, float] | None:
    """The interval of the loss, drawn around the variant: below the teacher by it."""
    teacher = quality.of(profile.variants[0])
    if teacher is None:
        return None
    sign = 1 if quality.higher_is_better else -1
    ends = (teacher - sign * low, teacher - sign * high)
    return min(ends), max(ends)


def _draw_curve(curve: Curve) -> Markup:
    return Markup(svg.curve(curve.points, curve.css, f"{curve.name} over epochs, {curve.first} to {curve.last}"))


def _pretty(value: Any) -> str:
    """A stage's configuration, one key a line."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "\n".join(f"{key} = {json.dumps(v, ensure_ascii=False, default=str)}" for key, v in value.items())
