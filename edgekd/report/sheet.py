"""Measurements for other programs: CSV for spreadsheets, JSON for github-action-benchmark."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Any

from ..bench.results import Interval, Results, Variant

__all__ = ["as_csv", "benchmark_json"]

#: What spreadsheets take for the beginning of a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_csv(results: Results) -> str:
    """One row a profile and variant; an interval is three columns, `NAME`, `NAME_low` and `NAME_high`.

    Text that a spreadsheet would run as a formula begins with an apostrophe.
    """
    rows = [
        {"run": results.name, "profile": p.profile, "device": p.device, "runtime": p.runtime, "rounds": p.rounds}
        | ({"elsewhere": p.elsewhere} if p.elsewhere is not None else {})
        | _flat(_of(v))
        | {"scheme": v.scheme, "final": v is p.variants[-1]}
        for p in results.profiles
        for v in p.variants
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [_safe(c) for c in columns], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({_safe(key): _safe(value) for key, value in row.items()})
    return stream.getvalue()


def _of(v: Variant) -> dict[str, Any]:
    latency = v.latency
    table: dict[str, Any] = {"variant": v.name, "key": v.key, "precision": v.precision, "origin": v.origin}
    table |= {f"metric.{name}": value for name, value in v.metrics.items()}
    table |= {"drop": v.drop, "mcnemar": v.mcnemar, "agreement": v.agreement}
    if latency is not None:
        table |= {f"{q}_ms": getattr(latency, q) for q in ("p50", "p90", "p95", "p99")}
        table |= {"mean_ms": latency.mean, "spread": latency.spread, "samples": latency.samples}
        table |= {"batch": latency.batch, "threads": latency.threads, "energy_mj": latency.energy_mj}
        table |= {f"{part}_ms": found for part, found in latency.parts.items()}
    if (estimate := v.estimate) is not None:
        table |= {"estimated_floor_ms": estimate.floor_ms, "estimated_roofline_ms": estimate.roofline_ms}
        if (own := estimate.fitted) is not None:
            table |= {"estimated_ms": own.ms, "estimated_ms_low": own.low_ms, "estimated_ms_high": own.high_ms}
    table |= {"speedup": v.speedup, "offline_images_per_s": v.offline}
    table |= {f"images_per_s.batch{size}": rate for size, rate in v.throughput.items()}
    table |= {key: getattr(v, key) for key in ("size_mb", "parameters", "macs", "peak_memory_mb", "load_ms")}
    return table | {f"layers.{kind}": count for kind, count in v.layers.items()}


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Interval):
            flat |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
        else:
            flat[key] = value
    return flat


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def benchmark_json(results: Results) -> str:
    """A list of {name, unit, value, range, extra}, of which less is better (tool `customSmallerIsBetter`)."""
    return json.dumps(list(_entries(results)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _entries(results: Results) -> Iterator[dict[str, Any]]:
    for p in results.profiles:
        for v in p.variants:
            extra = f"{p.device}\n{p.runtime}\n{p.rounds} rounds interleaved\nkey {v.key or 'none'}"
            figures: list[tuple[str, str, Interval | float | None]] = [
                (f"latency {q}", "ms", getattr(v.latency, q) if v.latency else None) for q in ("p50", "p95", "p99")
            ]
            figures += [("size", "MB", v.size_mb), ("peak memory", "MB", v.peak_memory_mb), ("load", "ms", v.load_ms)]
            value = v.metrics.get(results.headline)
            if value is not None and results.direction == "min":
                figures.append((results.headline, "", value))
            elif value is not None and 0 <= value <= 1:
                figures.append((f"{results.headline} error", "%", 100 * (1 - value)))
            for name, unit, figure in figures:
                entry = _entry(f"{p.profile} / {v.name} / {name}", unit, figure, extra)
                if entry is not None:
                    yield entry


def _entry(name: str, unit: str, figure: Interval | float | None, extra: str) -> dict[str, Any] | None:
    value = figure.value if isinstance(figure, Interval) else figure
    if value is None or not math.isfinite(value):
        return None
    entry = {"name": name, "unit": unit, "value": value, "extra": extra}
    if isinstance(figure, Interval):
        entry["range"] = f"± {max(figure.high - value, value - figure.low):.4g}"
    return entry
