"""Estimates as plain text: every figure under a heading that says it is none that was measured."""

from __future__ import annotations

import textwrap

from ..bench.results import Estimate
from ..estimate import Efficiency, Estimates, Fit, Roofline
from . import figures as f
from .columns import aligned

__all__ = ["ROOFLINE", "estimates_text", "interval_text"]

WIDTH = 100
#: fp16, 640 x 640, batch 1, MAXN_SUPER: 8.7e9 operations in 4.43 ms are 2.0 of 17 TFLOPS.
#: Source: github.com/hokwangchoi/jetson-orin-nano-benchmarks; operations: Ultralytics' page of YOLOv8.
ROOFLINE = (
    "every layer at the datasheet's peak or at full bandwidth, one after the other, and nothing for starting a kernel, "
    "which takes microseconds. Real networks take several times as long: a YOLOv8n in fp16 on a Jetson Orin Nano was "
    "published at about a tenth of the peak"
)


def estimates_text(document: Estimates, layers: bool = False) -> str:
    """A line a file, what the columns mean, and what the fit is worth; with `layers` a table a file before that."""
    mode = f" · {document.power_mode}" if document.power_mode else ""
    lines = [f"{document.profile} · {document.device}{mode} · ESTIMATED: nothing was measured"]
    head = [
        "file",
        "batch",
        "precision",
        "MACs",
        "moved MB",
        "lower bound ms",
        "roofline ms",
        "bound by",
        "estimated ms",
    ]
    rows = [
        [
            row.name,
            str(row.estimate.batch),
            row.estimate.precision,
            f.compact(row.roofline.macs),
            f.mb(row.roofline.moved_bytes / 1e6),
            f"≥ {f.significant(row.estimate.floor_ms)}",
            f.significant(row.estimate.roofline_ms),
            row.estimate.bound,
            interval_text(row.estimate),
        ]
        for row in document.files
    ]
    lines += aligned([head, *rows], left=(0, 2, 7))
    for row in document.files if layers else []:
        lines += ["", f"{row.name}: estimated, layer by layer", *_layers(row.roofline)]
    lines.append("")
    counted = "operations at the peak, as few as the fastest known algorithm has"
    counted += (
        ", or bytes beyond the caches" if document.caches_known else "; bytes do not count, as no cache_mb is known"
    )
    lines += _told("lower bound", f"no run there can be faster: {counted}")
    lines += _told("roofline", ROOFLINE)
    if document.fit is not None:
        lines += _fit(document.fit)
    else:
        lines += _told("estimated", "– without results from that device: give --results FILE")
    lines += _told("datasheet", document.source)
    notes = dict.fromkeys(f"{row.name}: {note}" for row in document.files for note in row.roofline.notes)
    notes |= dict.fromkeys(document.fit.notes if document.fit else [])
    for note in notes:
        lines += _told("note", note)
    return "\n".join(lines) + "\n"


def interval_text(estimate: Estimate) -> str:
    """1.20 [0.90, 1.60]; with one network the range is not known; a dash without results from the device."""
    own = estimate.fitted
    if own is None:
        return f.NONE
    if own.high_ms is None:
        return f"{f.significant(own.ms)} [range unknown]"
    return f"{f.significant(own.ms)} [{f.significant(own.low_ms)}, {f.significant(own.high_ms)}]"


def _layers(found: Roofline) -> list[str]:
    head = ["layer", "nodes", "precision", "MACs", "weights kB", "moved kB", "compute µs", "memory µs", "bound by"]
    rows = [
        [
            layer.name,
            layer.ops,
            layer.precision,
            f.compact(layer.macs),
            f.significant(layer.weight_bytes / 1e3),
            f.significant(layer.moved_bytes / 1e3),
            f.significant(1e3 * layer.compute_ms),
            f.significant(1e3 * layer.memory_ms),
            layer.bound,
        ]
        for layer in found.layers
    ]
    return aligned([head, *rows], left=(0, 1, 2, 8))


def _fit(fit: Fit) -> list[str]:
    lines = _told("estimated", f"roofline over the efficiency of networks that were measured on {fit.device}")
    for precision, own in fit.efficiencies.items():
        lines += _told("", f"{precision}: {_worth(own)}")
    for k in fit.known:
        left = f", {f.significant(k.left_out_ms)} ms estimated from the others" if k.left_out_ms is not None else ""
        lines += _told("", f"{k.name}, {k.precision}: {f.significant(k.measured_ms)} ms measured{left}")
    return lines


def _worth(own: Efficiency) -> str:
    if own.off_by is None:
        return f"{f.percent(own.value)} of the roofline, from one network: its range is not known"
    inside = (own.networks - 1) / (own.networks + 1)
    return (
        f"{f.percent(own.value)} [{f.percent(own.low)}, {f.percent(own.high)}] of the roofline, from {own.networks} "
        f"networks; off by up to {f.times(own.off_by)} where each was left out in turn; "
        f"{f.percent(inside, 0)} of like networks lie inside the interval"
    )


def _told(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{title:<12} ", subsequent_indent=" " * 13)
