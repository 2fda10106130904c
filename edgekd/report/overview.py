"""All profiles in one picture: the headline metric against latency, one colour a profile."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .model import ProfileView
from .svg import Scale, domain, label, line, text, tick, ticks
from .table import Quality

__all__ = ["overview"]


def overview(profiles: Sequence[ProfileView], quality: Quality, size: tuple[int, int]) -> str:
    """Marks of every variant, joined by profile; filled where no other variant of the profile beats it in both.

    A gate's limits are dashed lines in the profile's colour. Empty where fewer than two profiles have both figures.
    """
    series = [(p, found) for p in profiles if (found := _points(p, quality))]
    if len(series) < 2:
        return ""
    width, height = size
    narrow = width < 500
    xs = [x for _, points in series for _, x, _, _ in points]
    ys = [y for _, points in series for _, _, y, _ in points]
    log = max(xs) / min(xs) >= 3
    left, right, top, bottom = 50.0, width - 14.0, 26.0, height - 44.0
    x = Scale(*domain(xs, None, log), left, right, log)
    y = Scale(*domain(ys, None, log=False), bottom, top)
    parts = [text(4, 14, f"{quality.name}{', %' if quality.fraction else ''}", "axis-name")]
    for t in ticks(y.low, y.high, 4):
        shown = tick(round(100 * t, 9) if quality.fraction else t)
        parts += [line(left, y(t), right, y(t), "grid"), text(left - 8, y(t) + 4, shown, "tick", "end")]
    for t in ticks(x.low, x.high, 4 if narrow else 7, log):
        parts += [line(x(t), bottom, x(t), bottom + 4, "axis"), text(x(t), bottom + 17, tick(t), "tick", "middle")]
    parts.append(line(left, bottom, right, bottom, "axis"))
    parts.append(text(right, height - 6, f"latency p50, ms{' (log scale)' if log else ''}", "axis-name", "end"))
    for i, (profile, points) in enumerate(series):
        css = f"s{i % 6}"
        for budget in profile.budgets:
            if budget.axis == "latency" and x.inside(budget.at):
                parts.append(line(x(budget.at), bottom, x(budget.at), top, f"series limit {css}"))
            elif budget.axis == "quality" and y.inside(budget.at):
                parts.append(line(left, y(budget.at), right, y(budget.at), f"series limit {css}"))
        foreign = {row.name for row in profile.rows if row.foreign and not row.final}
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for name, a, b, _ in points if name not in foreign)
        parts.append(f'<polyline points="{path}" class="series {css}"/>')
        for name, a, b, front in points:
            title = f"<title>{escape(profile.profile)}: {escape(name)}</title>"
            fill = f"fill {css}" if front else f"hollow {css}"
            parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5.5" class="{fill}">{title}</circle>')
    told = "; ".join(f"{p.profile}: " + ", ".join(f"{n} {a:.3g} ms" for n, a, _, _ in points) for p, points in series)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label(told)}">{"".join(parts)}</svg>'


def _points(profile: ProfileView, quality: Quality) -> list[tuple[str, float, float, bool]]:
    """(name, p50 ms, metric, on the front) of the variants that have both."""
    found = []
    tagged = any("on the front" in row.tags for row in profile.rows)  # not where all of them are
    for variant, row in zip(profile.variants, profile.rows, strict=True):
        value = quality.of(variant)
        if variant.latency is not None and value is not None and variant.latency.p50.value > 0:
            found.append((variant.name, variant.latency.p50.value, value, not tagged or "on the front" in row.tags))
    return found
