"""Time per operator, from ONNX Runtime's own profiler."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from ..runtimes import Feed
from ..runtimes.onnxruntime import open_onnxruntime
from .results import LayerTime

__all__ = ["CALLS", "layer_times", "operator_times"]

CALLS = 50
SHOWN = 20


def layer_times(file: Path, feed: Feed, threads: int) -> list[LayerTime]:
    """The slowest operators of the optimised graph: milliseconds of a usual call and share of all, slowest first.

    Measured apart from latency, for profiling itself takes time. Raises UsageError or StageError.
    """
    return operator_times(file, feed, threads)[:SHOWN]


def operator_times(file: Path, feed: Feed, threads: int) -> list[LayerTime]:
    """All operators of the optimised graph, as `layer_times` has the slowest of them."""
    with tempfile.TemporaryDirectory() as directory:
        session = open_onnxruntime(file, threads=threads, profile_dir=Path(directory))
        try:
            call = session.bound(feed)
            for _ in range(CALLS):
                call()
        finally:
            session.close()
        (trace,) = Path(directory).glob("*.json")
        events = json.loads(trace.read_text())
    # By index too: other tools leave nodes without a name.
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            about = event["args"]
            key = (event["name"].removesuffix("_kernel_time"), about.get("op_name", ""), about.get("node_index", ""))
            times[key].append(event["dur"])
    # Microseconds; the first calls, which fill caches, are left out.
    usual = {key: _middle(all_[len(all_) // 5 :]) / 1e3 for key, all_ in times.items()}
    total = sum(usual.values()) or 1.0
    slowest = sorted(usual.items(), key=lambda item: -item[1])
    return [LayerTime(name=name, op=op, ms=ms, share=ms / total) for (name, op, _), ms in slowest]


def _middle(values: list[float]) -> float:
    """The mean of the middle half: interrupted calls do not count, and it is finer than whole microseconds."""
    quarter = len(values) // 4
    return fmean(sorted(values)[quarter : len(values) - quarter])
