"""The table of variants: what is shown of each, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..bench.results import Estimate, Interval, ProfileResults, Variant
from . import figures as f

__all__ = [
    "Cell",
    "Column",
    "Group",
    "Quality",
    "Row",
    "interval_cell",
    "plus_minus",
    "ratio",
    "table_columns",
    "table_rows",
]

#: key, title, unit
Column = tuple[str, str, str]
#: title, columns
Group = tuple[str, list[Column]]

COLUMNS: list[Group] = [
    ("Quality", [("quality", "", ""), ("drop", "lost", ""), ("agreement", "agrees", "")]),
    (
        "Speed",
        [
            ("p50", "p50", "ms"),
            ("p95", "p95", "ms"),
            ("p99", "p99", "ms"),
            ("compute", "compute", "ms"),
            ("transfers", "transfers", "ms"),
            ("estimate", "estimated", "ms"),
            ("speedup", "latency ×", ""),
            ("macs_ratio", "MACs ×", ""),
            ("throughput", "img/s", ""),
            ("offline", "offline", "img/s"),
        ],
    ),
    (
        "Cost",
        [
            ("size", "size", "MB"),
            ("parameters", "params", ""),
            ("macs", "MACs", ""),
            ("memory", "memory", "MB"),
            ("load", "load", "ms"),
            ("energy", "energy", "mJ"),
            ("layers", "layers", "int8 / float"),
            ("scheme", "scheme", ""),
        ],
    ),
]


@dataclass(frozen=True)
class Quality:
    """The headline metric: how its values and differences are written."""

    name: str
    fraction: bool
    higher_is_better: bool

    def of(self, variant: Variant) -> float | None:
        value = variant.metrics.get(self.name)
        return value if value is not None and math.isfinite(value) else None

    def text(self, value: float) -> str:
        return f.percent(value) if self.fraction else f.significant(value, 4)

    def lost(self, value: float, sign: bool = False) -> str:
        """A difference: in points for fractions."""
        if self.fraction:
            return f.signed(100 * value, 1) if sign else f.points(value)
        return f.signed(value, 3) if sign else f.fixed(value, 3)

    @property
    def unit(self) -> str:
        return "points" if self.fraction else ""


@dataclass(frozen=True)
class Cell:
    """One figure of the table; `under` is its interval, or what else qualifies it."""

    text: str
    under: str = ""


@dataclass(frozen=True)
class Row:
    """One variant of the table. `foreign`: made for another profile's quantization scheme."""

    name: str
    tags: list[str]
    cells: dict[str, Cell]
    final: bool
    foreign: bool


def table_rows(profile: ProfileResults, quality: Quality) -> list[Row]:
    """One row a variant, compared with the first; those that no other beats are tagged."""
    variants = profile.variants
    rows = []
    for v in variants:
        final = len(variants) > 1 and v is variants[-1]
        rows.append(_row(v, variants[0], quality, final=final, foreign=profile.foreign(v)))
    front = _front(variants, quality)
    for row in rows:
        if row.name in front and len(front) < len(rows):
            row.tags.append("on the front")
    return rows


def table_columns(rows: Sequence[Row], quality: Quality) -> list[Group]:
    """The columns of which at least one row knows something."""
    groups = []
    for title, columns in COLUMNS:
        shown = [
            (key, name or quality.name, unit or (quality.unit if key == "drop" else ""))
            for key, name, unit in columns
            if any(row.cells[key].text != f.NONE for row in rows)
        ]
        if shown:
            groups.append((title, shown))
    return groups


def _row(v: Variant, first: Variant, quality: Quality, *, final: bool, foreign: bool) -> Row:
    value = quality.of(v)
    latency = v.latency
    best = max(v.throughput.items(), key=lambda item: item[1].value, default=None)
    int8, other = v.layers.get("int8", 0), v.layers.get("float", 0)
    cells = {
        "quality": Cell(quality.text(value)) if value is not None else Cell(f.NONE),
        "drop": interval_cell(v.drop, quality.lost) if v is not first else Cell(f.NONE),
        "agreement": _cell(v.agreement, f.percent) if v is not first else Cell(f.NONE),
        "p50": _known(latency.p50 if latency else None, f.ms),
        "p95": _known(latency.p95 if latency else None, f.ms),
        "p99": Cell(f.NONE, "too few")
        if latency and latency.p99 is None
        else _known(latency.p99 if latency else None, f.ms),
        **{part: _known(latency.parts.get(part) if latency else None, f.ms) for part in ("compute", "transfers")},
        "estimate": _estimated(v.estimate),
        "speedup": interval_cell(v.speedup, f.times) if v is not first else Cell(f.times(1) if latency else f.NONE),
        "macs_ratio": _cell(ratio(first.macs, v.macs), f.times),
        "throughput": Cell(f.significant(best[1].value, 4), f"batch {best[0]}") if best else Cell(f.NONE),
        "offline": _known(v.offline, lambda x: f.significant(x, 4)),
        "load": _known(v.load_ms, f.ms),
        "energy": _known(latency.energy_mj if latency else None, f.ms),
        "size": Cell(f.mb(v.size_mb)),
        "parameters": _cell(v.parameters, f.compact),
        "macs": _cell(v.macs, f.compact),
        "memory": _cell(v.peak_memory_mb, lambda x: f.fixed(x, 0)),
        "layers": Cell(f"{int8} / {other}") if v.layers else Cell(f.NONE),
        "scheme": Cell(v.scheme or f.NONE, "another profile's" if foreign else ""),
    }
    return Row(v.name, [v.precision, *([v.origin] if v.origin != "measured" else [])], cells, final, foreign)


def _cell(value: float | None, text: Callable[[float], str]) -> Cell:
    return Cell(f.NONE) if value is None or not math.isfinite(value) else Cell(text(value))


def _estimated(estimate: Estimate | None) -> Cell:
    """What was fitted to the device's own results with its interval, or else the lower bound."""
    if estimate is None:
        return Cell(f.NONE)
    own = estimate.fitted
    if own is None:
        return Cell(f"≥ {f.ms(estimate.floor_ms)}", "lower bound")
    if own.high_ms is None:
        return Cell(f.ms(own.ms), "range unknown")
    return Cell(f.ms(own.ms), f"[{f.ms(own.low_ms)},{f.NBSP}{f.ms(own.high_ms)}]")


def _known(interval: Interval | None, text: Callable[[float], str]) -> Cell:
    """A figure with half its interval's width under it; a dash where it is not known."""
    if interval is None or not math.isfinite(interval.value):
        return Cell(f.NONE)
    return Cell(text(interval.value), plus_minus(interval))


def interval_cell(interval: Interval | None, text: Callable[[float], str]) -> Cell:
    """A figure with its interval in brackets; a dash where it is not known."""
    if interval is None:
        return Cell(f.NONE)
    low, high = text(interval.low).rstrip("×"), text(interval.high).rstrip("×")
    return Cell(text(interval.value), f"[{low},{f.NBSP}{high}]")


def plus_minus(interval: Interval) -> str:
    """Half the interval's width, with the value's decimals, or more where it would be shown as nothing."""
    half = max(interval.high - interval.value, interval.value - interval.low)
    digits = f.decimals(interval.value)
    return f"± {f.fixed(half, digits if round(half, digits) > 0 else f.decimals(half, 1))}"


def ratio(before: float | None, after: float | None) -> float | None:
    return before / after if before and after else None


def _front(variants: Sequence[Variant], quality: Quality) -> set[str]:
    """Names of the variants that no other one beats in both the headline metric and p50."""
    sign = 1 if quality.higher_is_better else -1
    at = {}
    for v in variants:
        value = quality.of(v)
        if v.latency and value is not None:
            at[v.name] = (sign * value, -v.latency.p50.value)
    return {n for n, (q, s) in at.items() if not any(o != (q, s) and o[0] >= q and o[1] >= s for o in at.values())}
