"""Latencies of a family's members on a profile: measured beside one reference, and kept for this machine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from .. import quant
from ..artifact import ModelSpec, Preprocessing, digest, write_atomically
from ..bench import Interval, environment, not_here, others_busy, side_by_side
from ..bench.cache import cache_directory, holds_for
from ..bench.stats import bootstrap_median, paired_ratio
from ..errors import UsageError
from ..models import Tapped, build, count
from ..onnx_file import export_onnx
from ..profile import Profile
from ..quant.scheme import scheme_named
from ..registry import resolve
from .families import default_network

__all__ = ["Entry", "Table", "Wanted", "check_here", "entry_key", "table_of"]

#: A network and the precision to measure it in, `fp32` or `int8`.
Wanted = tuple[ModelSpec, str]
Progress = Callable[[int, int], None]

#: Files of one session beside the reference: few enough that they share what else the machine does.
BESIDE = 8
ROUNDS, CAP_S = 5, 12.0
#: Random images that set the ranges of int8 networks: their latency depends on where Q/DQ stands, not on the ranges.
CALIBRATION = 16


class Entry(BaseModel):
    """One network in one precision. `ratio` is its median latency over the reference's, round by round.

    `busy`: cores that other programs kept busy meanwhile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    measured: str
    busy: float
    parameters: int
    macs: int
    size_mb: float
    ratio: Interval
    rounds: int


class Table(BaseModel):
    """What was measured of a family on one machine. `reference_ms` are medians of rounds, of all sessions."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    holds_for: dict[str, Any]
    reference: str
    reference_ms: list[float] = []
    entries: dict[str, Entry] = {}

    @property
    def reference_p50(self) -> Interval:
        """Milliseconds, over all sessions."""
        return bootstrap_median(self.reference_ms)

    def busy(self, keys: Iterable[str]) -> float:
        """Cores that other programs kept busy while these entries were measured, in the worst session."""
        return max(self.entries[key].busy for key in keys)

    def measured(self, keys: Iterable[str]) -> str:
        """When the oldest of these entries was."""
        return min(self.entries[key].measured for key in keys)

    def p50(self, key: str) -> Interval:
        """Milliseconds of an entry: its ratio times the reference, and both intervals in one."""
        ratio, reference = self.entries[key].ratio, self.reference_p50
        low, high = ratio.low * reference.low, ratio.high * reference.high
        return Interval(value=ratio.value * reference.value, low=low, high=high)


def entry_key(spec: ModelSpec, precision: str) -> str:
    """An entry's name in its table."""
    return f"{precision} {digest(spec.model_dump(mode='json'))[:16]}"


def table_of(
    family: str,
    profile: Profile,
    size: list[int],
    classes: int,
    wanted: Sequence[Wanted],
    *,
    again: bool = False,
    progress: Progress | None = None,
) -> tuple[Table, Path]:
    """The table with at least the networks that are `wanted`, and its file; what it lacks (`again`: all) is measured.

    The weights are fresh ones, and int8 networks are calibrated on noise: neither changes a latency.
    `progress(done, files)` is called as files are written and measured. Raises UsageError (the profile is another
    machine's) or StageError (a network cannot be exported, a runtime failed).
    """
    holds = {"family": family, "size": size, "classes": classes, **holds_for(profile)}
    file = cache_directory() / f"students-{family}-{digest(holds)[:12]}.json"
    table = None if again else _read(file)
    missing = {entry_key(spec, precision): (spec, precision) for spec, precision in wanted}
    for key in table.entries if table is not None else ():
        missing.pop(key, None)
    if table is not None and not missing:
        return table, file
    check_here(profile)
    reference = default_network(family, size, classes)
    table = table or Table(holds_for=holds, reference=f"{reference.name} fp32")
    names = list(missing)
    with tempfile.TemporaryDirectory() as directory, torch.random.fork_rng(devices=[]):
        place = Path(directory)
        first = _write(reference.spec, "fp32", place / "reference.onnx", profile, size, classes)
        for start in range(0, len(names), BESIDE):
            files = {}
            for i, key in enumerate(names[start : start + BESIDE], start):
                files[key] = _write(*missing[key], place / f"{i}.onnx", profile, size, classes)
                if progress is not None:
                    progress(i + 1, len(names))
            since = others_busy()
            found = compared(first, files, profile)
            busy = since() or 0.0
            figures = {key: (*count(build(missing[key][0]), size), files[key].stat().st_size / 1e6) for key in files}
            _add(table, found, figures, busy)
            _keep(table, file)
    return table, file


def check_here(profile: Profile) -> None:
    """Raises UsageError where the profile's device or runtime is not this machine's: nothing can be measured then."""
    resolve("runtimes", profile.runtime, f"profile {profile.name}: runtime")
    why = not_here(profile, environment())
    if why is not None:
        raise UsageError(
            f"latencies on {profile.name} cannot be measured here: {why}",
            hint="run `edgekd students` on the device, and name the network that you choose from its front",
        )


def compared(reference: Path, files: dict[str, Path], profile: Profile) -> dict[str, list[float]]:
    """Medians of the rounds in ms, by name; those of `reference` under that word. Measured in one session."""
    measured = side_by_side({"reference": reference, **files}, profile, rounds=ROUNDS, cap_s=CAP_S)
    return {name: latency.round_p50 for name, latency in measured.latencies.items()}


def _add(table: Table, rounds: dict[str, list[float]], figures: dict[str, tuple[int, int, float]], busy: float) -> None:
    table.reference_ms.extend(rounds["reference"])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for key, (parameters, macs, size_mb) in figures.items():
        table.entries[key] = Entry(
            measured=now,
            busy=busy,
            parameters=parameters,
            macs=macs,
            size_mb=size_mb,
            ratio=paired_ratio(rounds[key], rounds["reference"]),
            rounds=len(rounds[key]),
        )


def _write(spec: ModelSpec, precision: str, path: Path, profile: Profile, size: list[int], classes: int) -> Path:
    """A network with fresh weights as a file, int8 as edgekd places it for the profile."""
    torch.manual_seed(0)
    network: nn.Module = build(spec).eval()
    if precision == "int8":
        scheme = scheme_named(profile.scheme, f"profile {profile.name}: scheme")
        images = torch.randn(CALIBRATION, *size)
        prepared = quant.prepare(Tapped(network, []), images[:2], scheme, qat=False)
        quant.calibrate(prepared, [images])
        quant.enable_fake_quant(prepared)
        quant.freeze(prepared)
        network = quant.convert(prepared)
    names = [str(i) for i in range(classes)]
    plain = Preprocessing(size=size, mean=[0.0] * size[0], std=[1.0] * size[0])
    export_onnx(network, path, size=size, opset=profile.opset, classes=names, preprocessing=plain)
    return path


def _read(file: Path) -> Table | None:
    """None where there is none, or a damaged one: it is only a memory."""
    try:
        return Table.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _keep(table: Table, file: Path) -> None:
    """What another process has measured meanwhile stays. A home that cannot be written to costs time, nothing else."""
    other = _read(file)
    if other is not None and (more := other.entries.keys() - table.entries.keys()):
        table.entries |= {key: other.entries[key] for key in more}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, table.model_dump_json(indent=1) + "\n")
