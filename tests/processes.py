"""The command line as a process of its own, and what tests share of its runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PROFILE = """\
extends = "cpu-x86"
description = "as little measuring as can be"
[protocol]
rounds = 3
precision = 10.0
block_s = 0.01
warmup_s = 0.01
batches = [1]
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Finished(NamedTuple):
    """A run of RECIPE in `project`/runs/tiny, and what the command said. Tests copy it before they change it."""

    directory: Path
    outcome: Outcome

    def copy(self, destination: Path) -> Path:
        shutil.copytree(self.directory, destination)
        return destination


def environ() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "120", "NO_COLOR": "1"}


def spawn(*args: str, cwd: Path, prefix: str = "") -> Outcome:
    """`python -m edgekd ARGS` as a process, behind a shell `prefix` such as `ulimit -f 100;`."""
    command = ["bash", "-c", f'{prefix} exec "$0" -m edgekd "$@"', sys.executable, *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environ(), timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)
