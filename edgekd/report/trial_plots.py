"""Drawings of a search: its trials in order, their training, and the metric against every field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import figures as f
from .svg import Scale, domain, label, line, shorten, text, tick, ticks
from .table import Quality

__all__ = ["against", "importance", "in_order", "reached", "short_names", "shown", "training"]

Trial = Mapping[str, Any]
#: More choices than these have no room for names.
NAMED = 8


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Every path's shortest ending that no other has: `lr` of `stage.distill.lr`."""
    names = {}
    for path in paths:
        keys = path.split(".")
        endings = [".".join(keys[-n:]) for n in range(1, len(keys) + 1)]
        others = [f".{other}" for other in paths if other != path]
        names[path] = next((e for e in endings if not any(o.endswith(f".{e}") for o in others)), path)
    return names


def shown(value: Any) -> str:
    """A field's value as people read it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def reached(trial: Trial) -> float | None:
    """What a trial reached: its value, or that of its last epoch where it was pruned."""
    if trial["value"] is not None:
        return float(trial["value"])
    return float(trial["curve"][-1][1]) if trial["state"] == "pruned" and trial["curve"] else None


def in_order(trials: Sequence[Trial], best: int | None, quality: Quality, size: tuple[int, int]) -> str:
    """The metric of every trial by its number, and the best so far as a line; empty without a trial that has one."""
    known = [(t, v) for t in trials if (v := reached(t)) is not None]
    if not known:
        return ""
    x = Scale(-0.5, max(max(t["number"] for t in trials), 1) + 0.5, 54.0, size[0] - 16.0)
    y = _heights([v for _, v in known], size)
    whole = [t for t in ticks(0, x.high, 8 if size[0] > 500 else 4) if t == int(t)]
    parts = _axes(x, y, quality, "trial", [(x(t), tick(t)) for t in whole])
    parts.append(_best_so_far(trials, x, y, quality))
    for t in trials:
        value = reached(t)
        if value is None and t["state"] == "failed":
            parts.append(_cross(x(t["number"]), y.start - 6, _told(t, quality)))
        elif value is not None:
            parts.append(_dot(x(t["number"]), y(value), t, best, quality))
    said = f"{quality.name} of {len(trials)} trials, the best {quality.text(_best(known, quality))}"
    return _svg(size, said, parts)


def _best(known: Sequence[tuple[Trial, float]], quality: Quality) -> float:
    return (max if quality.higher_is_better else min)(v for _, v in known)


def _best_so_far(trials: Sequence[Trial], x: Scale, y: Scale, quality: Quality) -> str:
    points: list[str] = []
    best: float | None = None
    for t in (t for t in trials if t["value"] is not None):
        better = best is None or (t["value"] > best if quality.higher_is_better else t["value"] < best)
        if better:
            if best is not None:
                points.append(f"{x(t['number']):.1f},{y(best):.1f}")
            best = t["value"]
            points.append(f"{x(t['number']):.1f},{y(t['value']):.1f}")
    if best is not None:
        points.append(f"{x(x.high):.1f},{y(best):.1f}")
    return f'<polyline points="{" ".join(points)}" class="best-line"/>'


def training(trials: Sequence[Trial], best: int | None, quality: Quality, size: tuple[int, int]) -> str:
    """The metric after every epoch, a line a trial; empty where none has two epochs."""
    drawn = [t for t in trials if len(t["curve"]) > 1]
    if not drawn:
        return ""
    x = Scale(1, max(t["curve"][-1][0] for t in drawn), 54.0, size[0] - 16.0)
    y = _heights([v for t in drawn for _, v in t["curve"]], size)
    whole = [t for t in ticks(1, x.high, 8 if size[0] > 500 else 4) if t == int(t)]
    parts = _axes(x, y, quality, "epoch", [(x(t), tick(t)) for t in whole])
    for t in sorted(drawn, key=lambda t: t["number"] == best):  # the best one on top
        css = "best" if t["number"] == best else t["state"]
        path = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in t["curve"])
        parts.append(f'<polyline points="{path}" class="run {css}"><title>{_told(t, quality)}</title></polyline>')
    return _svg(size, f"{quality.name} after every epoch of {len(drawn)} trials", parts)


def against(path: str, axis: Mapping[str, Any], trials: Sequence[Trial], best: int | None, quality: Quality) -> str:
    """The metric of every trial against a field's value; choices stand side by side."""
    size = (360, 240)
    known = [(t, v) for t in trials if path in t["values"] and (v := reached(t)) is not None]
    if not known:
        return ""
    y = _heights([v for _, v in known], size)
    choices = axis.get("choices")
    if choices is not None:
        x = Scale(-0.5, len(choices) - 0.5, 54.0, size[0] - 16.0)
        room = max(3, int((x.end - x.start) / len(choices) / 6.5))
        names = [(x(i), shorten(shown(c), room)) for i, c in enumerate(choices)] if len(choices) <= NAMED else []
        places = {json.dumps(c, sort_keys=True): x(i) for i, c in enumerate(choices)}
    else:
        low, high, log = float(axis["low"]), float(axis["high"]), bool(axis.get("log"))
        x = Scale(low, high, 60.0, size[0] - 22.0, log)
        marks = ticks(low, high, 4, log)
        if log and len(marks) > 5:  # decades alone, or their ends where there are none
            marks = [m for m in marks if f"{m:e}".startswith("1.0")] or [marks[0], marks[-1]]
        marks = marks or [low, high]
        names = [(x(m), f"{m:g}") for m in marks]
        places = {}
    name = f"{path}{' (log scale)' if axis.get('log') else ''}"
    parts = _axes(x, y, quality, shorten(name, 44), names)
    for t, value in sorted(known, key=lambda k: k[0]["number"] == best):
        found = t["values"][path]
        across = places[json.dumps(found, sort_keys=True)] if places else x(found)
        parts.append(_dot(across, y(value), t, best, quality))
    return _svg(size, f"{quality.name} against {path}", parts)


def importance(shares: Mapping[str, float]) -> str:
    """A bar a field: its share in how good a trial is."""
    parts = []
    for i, (path, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        y = i * 36
        parts.append(
            text("0", y + 13, path, "row-name") + text("100%", y + 13, f.percent(share, 0), "row-value", "end")
        )
        parts.append(f'<rect x="0" y="{y + 20}" width="100%" height="8" class="track"/>')
        parts.append(f'<rect x="0" y="{y + 20}" width="{100 * share:.1f}%" height="8" class="better"/>')
    told = label("importance: " + ", ".join(f"{path} {f.percent(share, 0)}" for path, share in shares.items()))
    return f'<svg width="100%" height="{36 * len(shares)}" role="img" aria-label="{told}">{"".join(parts)}</svg>'


def _heights(values: Sequence[float], size: tuple[int, int]) -> Scale:
    return Scale(*domain(values, None, log=False), size[1] - 44.0, 28.0)


def _axes(x: Scale, y: Scale, quality: Quality, name: str, marks: Sequence[tuple[float, str]]) -> list[str]:
    parts = [text(4, 14, f"{quality.name} on validation{', %' if quality.fraction else ''}", "axis-name")]
    for t in ticks(y.low, y.high, 6):
        parts += [line(x.start, y(t), x.end, y(t), "grid")]
        parts.append(text(x.start - 8, y(t) + 4, tick(100 * t if quality.fraction else t), "tick", "end"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    for place, mark in marks:
        parts += [line(place, y.start, place, y.start + 4, "axis"), text(place, y.start + 17, mark, "tick", "middle")]
    parts.append(text(x.end, y.start + 36, name, "axis-name", "end"))
    return parts


def _dot(x: float, y: float, t: Trial, best: int | None, quality: Quality) -> str:
    css = "best" if t["number"] == best else t["state"]
    radius = 6.5 if css == "best" else 4.5
    title = f"<title>{_told(t, quality)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="trial {css}">{title}</circle>'


def _cross(x: float, y: float, told: str) -> str:
    strokes = line(x - 4, y - 4, x + 4, y + 4, "cross") + line(x - 4, y + 4, x + 4, y - 4, "cross")
    return f"<g><title>{told}</title>{strokes}</g>"


def _told(t: Trial, quality: Quality) -> str:
    value = reached(t)
    found = f" {quality.text(value)}" if value is not None else ""
    values = ", ".join(f"{path} = {shown(v)}" for path, v in t["values"].items())
    return escape(f"trial {t['number']}: {t['state']}{found}; {values}")


def _svg(size: tuple[int, int], told: str, parts: Sequence[str]) -> str:
    shape = f'viewBox="0 0 {size[0]} {size[1]}"'
    return f'<svg {shape} role="img" aria-label="{label(told)}">{"".join(parts)}</svg>'
