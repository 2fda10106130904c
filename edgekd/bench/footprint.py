"""Peak memory of a model file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..errors import StageError, UsageError
from ..runtimes import Feed

__all__ = ["peak_memory_mb"]

TIMEOUT_S = 300.0


def peak_memory_mb(file: Path, feed: Feed, threads: int) -> float:
    """Largest resident memory, in 10^6 bytes, of a process that opens only this file and calls it a few times.

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
        return float(child.stdout)
    last = (child.stderr.strip().splitlines() or [f"the process ended with status {child.returncode}"])[-1]
    if child.returncode == UsageError.exit_code:
        raise UsageError(last, where=str(file))
    raise StageError(f"measuring memory failed: {last}", where=str(file))
