"""The command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def environ() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "120", "NO_COLOR": "1"}


def spawn(*args: str, cwd: Path, prefix: str = "") -> Outcome:
    """`python -m edgekd ARGS` as a process, behind a shell `prefix` such as `ulimit -f 100;`."""
    command = ["bash", "-c", f'{prefix} exec "$0" -m edgekd "$@"', sys.executable, *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environ(), timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)
