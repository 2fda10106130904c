"""Latencies by a formula instead of a clock, where what is decided from them is tested."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekd.students import table

#: Milliseconds of one image from (model arguments, precision).
Formula = Callable[[dict[str, Any], str], float]


def by_sixteens(args: dict[str, Any], precision: str) -> float:
    """int8 kernels take 16 channels at a time, float ones any number; each layer costs the same."""
    width = 16 * math.ceil(args["width"] / 16) / 2 if precision == "int8" else args["width"]
    return args["depth"] * width / 1000


class Clock:
    """What stands in for export and measurement. `sessions` are the names of the files that were measured at once."""

    def __init__(self) -> None:
        self.formula: Formula = by_sixteens
        self.sessions: list[list[str]] = []

    def write(self, spec: Any, precision: str, path: Path, *_: Any) -> Path:
        path.write_text(json.dumps([spec.args, precision]))
        return path

    def compared(self, reference: Path, files: dict[str, Path], profile: Any) -> dict[str, list[float]]:
        self.sessions.append(list(files))
        drift = 1 + len(self.sessions) / 10  # the machine is slower in each session than in the one before
        times = {
            name: self.formula(*json.loads(p.read_text())) for name, p in {"reference": reference, **files}.items()
        }
        return {name: [drift * ms * (1 + i / 50) for i in range(5)] for name, ms in times.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """A formula for a clock, and a cache directory of the test's own."""
    made = Clock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "_write", made.write)
    monkeypatch.setattr(table, "compared", made.compared)
    return made
