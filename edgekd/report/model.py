"""From results and verdicts to what a page shows: pure, and the same for HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from ..bench.results import Lineage, ProfileResults, Results, Variant
from . import figures as f
from .classes import ClassRow, class_rows, most_confused
from .history import Training, training
from .table import Group, Quality, Row, interval_cell, plus_minus, ratio, table_columns, table_rows

__all__ = ["Bar", "Budget", "Page", "ProfileView", "Tile", "VerdictLike", "Waterfall", "prepare"]


class VerdictLike(Protocol):
    """What a report reads of a gate's verdict (gate and report do not know each other)."""

    @property
    def profile(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def limit(self) -> float: ...
    @property
    def allowed(self) -> str: ...
    @property
    def found(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def shown(self) -> str: ...
    @property
    def hint(self) -> str | None: ...


@dataclass(frozen=True)
class Bar:
    """What one stage changed: `before` is None for the teacher."""

    name: str
    before: float | None
    after: float
    text: str
    change: str
    better: bool | None


@dataclass(frozen=True)
class Waterfall:
    """One figure from the teacher to the final variant. `zero`: bars are drawn from zero."""

    title: str
    total: str
    bars: list[Bar]
    zero: bool


@dataclass(frozen=True)
class Budget:
    """A gate's limit as a line in the plot of accuracy against latency."""

    axis: str
    at: float
    label: str


@dataclass(frozen=True)
class Tile:
    """One of the large figures on top."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class ProfileView:
    """Everything that the page says about one profile."""

    profile: str
    measured: str
    estimated: str
    sentence: str
    file: str
    tiles: list[Tile]
    variants: list[Variant]
    rows: list[Row]
    groups: list[Group]
    waterfalls: list[Waterfall]
    budgets: list[Budget]
    verdicts: list[VerdictLike]
    status: str
    warnings: list[str]
    classes: list[ClassRow]
    confused: list[tuple[str, str, int]]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    results: Results
    quality: Quality
    profiles: list[ProfileView]
    status: str
    data: str
    training: list[Training]
    lineage: list[Lineage]
    environment: list[tuple[str, str]]


def prepare(results: Results, verdicts: Sequence[VerdictLike]) -> Page:
    """The view of a run's results."""
    values = [v.metrics.get(results.headline) for p in results.profiles for v in p.variants]
    higher = results.direction == "max"
    fraction = higher and all(0 <= v <= 1 for v in values if v is not None and math.isfinite(v))
    quality = Quality(results.headline, fraction, higher)
    shown = ", ".join(results.classes[:12]) + (", …" if len(results.classes) > 12 else "")
    named = f" ({shown})" if results.classes else ""
    return Page(
        results=results,
        quality=quality,
        profiles=[
            _profile(p, quality, [v for v in verdicts if v.profile == p.profile], of_run=bool(results.lineage))
            for p in results.profiles
        ],
        status=_status(verdicts),
        data=f"{results.test_images:,} test images, {len(results.classes)} classes{named}",
        training=training(results.lineage, quality.name, quality.fraction),
        lineage=results.lineage,
        environment=list(_flat(results.environment)),
    )


def _status(verdicts: Sequence[VerdictLike]) -> str:
    found = {v.verdict for v in verdicts}
    return next((s for s in ("fail", "inconclusive", "pass") if s in found), "none")


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else NONE_TEXT.get(str(value), str(value))
            rows.append((f"{prefix}{key}".replace("_", " "), text))
    return rows


NONE_TEXT = {"None": f.NONE, "True": "yes", "False": "no"}


def _profile(profile: ProfileResults, quality: Quality, verdicts: list[VerdictLike], *, of_run: bool) -> ProfileView:
    variants = profile.variants
    # What was made for other profiles is no stage on the way to this one's file.
    way = [v for v in variants if v is variants[-1] or not profile.foreign(v)]
    rows = table_rows(profile, quality)
    return ProfileView(
        profile=profile.profile,
        measured=_measured(profile),
        estimated=_estimated(profile),
        sentence=_sentence(variants, quality) if variants else "nothing was measured",
        file=_file(profile) if of_run and len(variants) > 1 else "",
        tiles=_tiles(variants, quality) if variants else [],
        variants=variants,
        rows=rows,
        groups=table_columns(rows, quality),
        waterfalls=_waterfalls(way, quality) if len(way) > 1 else [],
        budgets=_budgets(variants, quality, verdicts) if variants else [],
        verdicts=verdicts,
        status=_status(verdicts),
        warnings=profile.warnings,
        classes=class_rows(variants[-1]) if variants else [],
        confused=most_confused(variants[-1]) if variants else [],
    )


def _measured(profile: ProfileResults) -> str:
    if profile.elsewhere is not None:
        return f"not measured here: {profile.elsewhere}; accuracies are measured on this machine"
    latencies = [v.latency for v in profile.variants if v.latency]
    parts = [profile.device, profile.runtime]
    if latencies:
        threads = latencies[0].threads
        parts += [f"{threads} thread{'s' * (threads != 1)}", f"batch {latencies[0].batch}"]
        parts += [f"{profile.rounds} rounds interleaved"]
    origins = sorted({v.origin for v in profile.variants}) or ["measured"]
    return f"{' and '.join(origins)} on " + " · ".join(parts)


def _estimated(profile: ProfileResults) -> str:
    """What the estimates stand on; empty where there is none."""
    found = [v.estimate for v in profile.variants if v.estimate is not None]
    if not found:
        return ""
    networks = max((e.fitted.networks for e in found if e.fitted is not None), default=0)
    if networks:
        told = f"fitted to {networks} network{'s' * (networks > 1)} measured on that device, with their range"
    else:
        told = "a lower bound; networks take several times as long, as no kernel reaches the peak"
    return f"estimated for {profile.device}, not measured: {told}. Datasheet: {found[0].source}"


def _file(profile: ProfileResults) -> str:
    """Which file is this profile's."""
    last = profile.variants[-1]
    wanted = f", made for {last.scheme} and not for {profile.settings['scheme']}" if profile.foreign(last) else ""
    return f"{last.name}{wanted}: {last.file}"


def faster(speedup: float) -> str:
    return f"{f.times(speedup)} faster" if speedup >= 1 else f"{f.times(1 / speedup)} slower"


def _sentence(variants: list[Variant], quality: Quality) -> str:
    first, last = variants[0], variants[-1]
    a, b = quality.of(first), quality.of(last)
    if first is last:
        parts = [f"p50 {f.ms(last.latency.p50.value)} ms"] if last.latency else []
        parts += [f"{f.mb(last.size_mb)} MB"] + ([f"{quality.name} {quality.text(b)}"] if b is not None else [])
        return f"{last.name}: " + ", ".join(parts)
    parts = []
    if last.speedup:
        parts.append(faster(last.speedup.value))
    smaller = ratio(first.size_mb, last.size_mb)
    if smaller:
        parts.append(f"{f.times(smaller)} smaller" if smaller >= 1 else f"{f.times(1 / smaller)} larger")
    if a is not None and b is not None:
        parts.append(f"{quality.name} {quality.text(a)}{f.NBSP}→{f.NBSP}{quality.text(b)}")
    return ", ".join(parts)


def _tiles(variants: list[Variant], quality: Quality) -> list[Tile]:
    first, last = variants[0], variants[-1]
    tiles = []
    a, b = quality.of(first), quality.of(last)
    if last is first:
        if last.latency:
            tiles.append(Tile("latency p50", f"{f.ms(last.latency.p50.value)} ms", plus_minus(last.latency.p50)))
    elif last.speedup and first.latency and last.latency:
        cell = interval_cell(last.speedup, f.times)
        change = f"{f.ms(first.latency.p50.value)} → {f.ms(last.latency.p50.value)} ms"
        tiles.append(Tile("latency ×", cell.text, f"{change} · {cell.under}"))
    macs = ratio(first.macs, last.macs)
    if macs and first.macs and last.macs and last is not first:
        tiles.append(Tile("MACs ×", f.times(macs), f"{f.compact(first.macs)} → {f.compact(last.macs)}"))
    smaller = ratio(first.size_mb, last.size_mb)
    if last is first or not smaller:
        tiles.append(Tile("size", f"{f.mb(last.size_mb)} MB", ""))
    else:
        tiles.append(Tile("size ×", f.times(smaller), f"{f.mb(first.size_mb)} → {f.mb(last.size_mb)} MB"))
    if b is not None:
        details = [f"from {quality.text(a)}"] if a is not None and last is not first else []
        if last.drop and last is not first:
            cell = interval_cell(last.drop, quality.lost)
            details.append(" ".join(filter(None, ("lost", cell.text, quality.unit, cell.under))))
        tiles.append(Tile(quality.name, quality.text(b), " · ".join(details)))
    return tiles


def _waterfalls(variants: list[Variant], quality: Quality) -> list[Waterfall]:
    found = [
        _waterfall(quality.name, "", variants, quality.of, quality.text, not quality.higher_is_better, quality),
        _waterfall(
            "latency p50", " ms", variants, lambda v: v.latency.p50.value or None if v.latency else None, f.ms, True
        ),
        _waterfall("size", " MB", variants, lambda v: v.size_mb or None, f.mb, True),
        _waterfall("MACs", "", variants, lambda v: float(v.macs) if v.macs else None, f.compact, True),
    ]
    return [w for w in found if len(w.bars) > 1]


def _waterfall(
    title: str,
    unit: str,
    variants: list[Variant],
    value: Callable[[Variant], float | None],
    text: Callable[[float], str],
    lower_is_better: bool,
    quality: Quality | None = None,
) -> Waterfall:
    known = [(v.name, x) for v in variants if (x := value(v)) is not None]
    bars = [Bar(name, None, x, text(x) + unit, "", None) for name, x in known[:1]]
    for (_, before), (name, after) in pairwise(known):
        same = math.isclose(before, after, rel_tol=1e-9, abs_tol=1e-12)
        if quality:
            change = f"{quality.lost(after - before, sign=True)} {quality.unit}".rstrip()
        else:
            change = f"÷ {f.significant(before / after)}" if after < before else f"× {f.significant(after / before)}"
        better = None if same else (after < before) == lower_is_better
        bars.append(Bar(name, before, after, text(after) + unit, "unchanged" if same else change, better))
    total = f"{bars[0].text} → {bars[-1].text}" if len(bars) > 1 else ""
    return Waterfall(title, total, bars, zero=quality is None)


def _budgets(variants: list[Variant], quality: Quality, verdicts: list[VerdictLike]) -> list[Budget]:
    """The tightest line per axis: latency in ms, quality in the metric's own unit."""
    first = variants[0]
    teacher = quality.of(first)
    lines: list[Budget] = []
    for v in verdicts:
        metric, _, bound = v.rule.rpartition(" ")
        if metric == "latency.p50":
            if bound == "max":
                lines.append(Budget("latency", v.limit, f"gate: p50 {v.allowed}"))
            elif first.latency and v.limit > 0:
                lines.append(Budget("latency", first.latency.p50.value / v.limit, f"gate: speed-up {v.allowed}"))
        elif metric in ("accuracy", quality.name):
            if bound in ("min", "max"):
                lines.append(Budget("quality", v.limit, f"gate: {v.allowed}"))
            elif bound == "drop" and teacher is not None:
                at = teacher - v.limit if quality.higher_is_better else teacher + v.limit
                lines.append(Budget("quality", at, f"gate: lost {v.allowed}"))
    tightest = []
    for axis, pick in (("latency", min), ("quality", max if quality.higher_is_better else min)):
        own = [b for b in lines if b.axis == axis]
        if own:
            tightest.append(pick(own, key=lambda b: b.at))
    return tightest
