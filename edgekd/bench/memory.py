"""`python -m edgekd.bench.memory FILE THREADS NAME=DTYPE:SHAPE...` prints what a process with only this file needs.

One JSON document: `peak_memory_mb`, in 10^6 bytes, and `load_ms`, one figure for each time the file was opened.

The process that `footprint.peak_memory_mb` starts: nothing here may import torch.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from ..errors import EdgekdError
from ..runtimes import Feed, Session, open_session

CALLS = 3
LOADS = 7


def main(arguments: list[str]) -> int:
    file, threads, *inputs = arguments
    loads: list[float] = []
    try:
        session = open_session(Path(file), threads=int(threads))  # not timed: it imports the runtime
        call = session.bound(_feed(inputs))
        for _ in range(CALLS):
            call()
        peak = _peak_bytes() / 1e6
        session.close()
        while len(loads) < LOADS:
            _opened(Path(file), int(threads), loads).close()
    except EdgekdError as error:
        sys.stderr.write(f"{error.problem.what}\n")
        return error.exit_code
    sys.stdout.write(json.dumps({"peak_memory_mb": peak, "load_ms": loads}) + "\n")
    return 0


def _opened(file: Path, threads: int, loads: list[float]) -> Session:
    start = time.perf_counter()
    session = open_session(file, threads=threads)
    loads.append((time.perf_counter() - start) * 1e3)
    return session


def _feed(inputs: list[str]) -> Feed:
    feed = {}
    for text in inputs:
        name, _, described = text.rpartition("=")
        dtype, _, shape = described.partition(":")
        # Ones, for pages of zeros are not resident before they are written to.
        feed[name] = np.ones([int(size) for size in shape.split("x") if size], dtype)
    return feed


def _peak_bytes() -> int:
    """Linux carries ru_maxrss over from the process that started this one, which holds torch: VmHWM is our own."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
