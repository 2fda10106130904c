"""The report as one HTML file: styles and drawings inside, no scripts, nothing fetched."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import svg
from .history import Curve
from .model import Page, ProfileView
from .table import Quality

__all__ = ["html"]

WIDE, NARROW = (1000, 430), (360, 330)


def html(page: Page) -> str:
    """Render the page. Everything but edgekd's own drawings and styles is escaped."""
    package = files("edgekd.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(package.joinpath("template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        style=Markup(package.joinpath("style.css").read_text(encoding="utf-8")),
        plots={p.profile: _plots(p, page.quality) for p in page.profiles},
        draw_waterfall=lambda chart: Markup(svg.waterfall(chart)),
        draw_curve=_draw_curve,
        pretty=_pretty,
    )


def _plots(profile: ProfileView, quality: Quality) -> list[tuple[str, Markup]]:
    """The accuracy-latency plot for a wide page and for a phone; none where fewer than two variants have both."""
    marks = []
    for variant, row in zip(profile.variants, profile.rows, strict=True):
        value = quality.of(variant)
        if variant.latency is None or value is None or not variant.latency.p50.value > 0:
            continue
        p50, last = variant.latency.p50, variant is profile.variants[-1]
        marks.append(
            svg.Mark(
                variant.name,
                f"{quality.text(value)} · {row.cells['p50'].text} ms",
                p50.value,
                value,
                (p50.low, p50.high),
                _paired(profile, quality, variant.drop.low, variant.drop.high) if variant.drop else None,
                "final" if last else "teacher" if variant is profile.variants[0] else "step",
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
