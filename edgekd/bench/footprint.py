"""Peak memory and load time of a model file, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ..errors import StageError, UsageError
from ..runtimes import Feed
from .results import Interval
from .stats import bootstrap_median

__all__ = ["Footprint", "footprint_of"]

TIMEOUT_S = 300.0


class Footprint(NamedTuple):
    """What a process that opens only one file needs."""

    peak_memory_mb: float
    load_ms: Interval


def footprint_of(file: Path, feed: Feed, threads: int) -> Footprint:
    """Largest resident memory, in 10^6 bytes, of a process that opens only this file and calls it a few times.

    And the median of the milliseconds that opening the file takes there, once the runtime itself is loaded.

    Python, NumPy and ONNX Runtime are in the figure (some 70 MB) and nothing is subtracted: it is what such a process
    needs. Only the shapes and dtypes of `feed` matter. Raises UsageError (no model) or StageError (the process failed).
    """
    inputs = [f"{name}={array.dtype.name}:{'x'.join(map(str, array.shape))}" for name, array in feed.items()]
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "edgekd.bench.memory", str(Path(file).resolve()), str(threads), *inputs]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired as error:
        raise StageError(f"measuring memory did not end within {TIMEOUT_S:.0f} s", where=str(file)) from error
    if child.returncode == 0:
        found = json.loads(child.stdout)
        return Footprint(found["peak_memory_mb"], bootstrap_median(found["load_ms"]))
    last = (child.stderr.strip().splitlines() or [f"the process ended with status {child.returncode}"])[-1]
    if child.returncode == UsageError.exit_code:
        raise UsageError(last, where=str(file))
    raise StageError(f"measuring memory failed: {last}", where=str(file))
