"""`python -m edgekd.bench.memory FILE THREADS NAME=DTYPE:SHAPE...` prints a process's peak memory in 10^6 bytes.

The process that `footprint.peak_memory_mb` starts: nothing here may import torch.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np

from ..errors import EdgekdError
from ..runtimes import Feed, open_session

CALLS = 3


def main(arguments: list[str]) -> int:
    file, threads, *inputs = arguments
    try:
        session = open_session(Path(file), threads=int(threads))
        call = session.bound(_feed(inputs))
        for _ in range(CALLS):
            call()
    except EdgekdError as error:
        sys.stderr.write(f"{error.problem.what}\n")
        return error.exit_code
    sys.stdout.write(f"{_peak_bytes() / 1e6}\n")
    return 0


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
