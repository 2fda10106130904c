"""Members of a family with their latencies, and which of them lie on the front of latency against capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..artifact import ModelSpec
from ..bench import Interval, disturbances, environment
from ..profile import Profile
from .families import Candidate, candidates
from .table import Progress, Table, entry_key, table_of

__all__ = ["CAPACITY", "measured_family", "on_front", "rows_of"]

CAPACITY = "multiply-accumulates: a stand-in for what a network can learn, not its accuracy, which only training tells"

Row = dict[str, Any]


def rows_of(
    members: Sequence[Candidate], table: Table, precisions: Sequence[str], base: ModelSpec | None = None
) -> list[Row]:
    """What is known of each candidate, as JSON; the fastest first, by the last of `precisions`.

    `base` is the network whose fp32 latency the speed-ups refer to; None: the table's reference.
    """
    slow = table.entries[entry_key(base, "fp32")].ratio if base is not None else Interval(value=1.0, low=1.0, high=1.0)
    rows: list[Row] = []
    for member in members:
        entries = {p: table.entries[entry_key(member.spec, p)] for p in precisions}
        first = next(iter(entries.values()))
        found = {
            precision: {
                "p50_ms": table.p50(entry_key(member.spec, precision)).model_dump(),
                "speedup": _over(slow, entry.ratio).model_dump(),
                "size_mb": entry.size_mb,
                "rounds": entry.rounds,
            }
            for precision, entry in entries.items()
        }
        shape = {"name": member.name, "args": member.args, "depth": member.depth, "width": member.width}
        rows.append({**shape, "parameters": first.parameters, "macs": first.macs, "precisions": found})
    rows.sort(key=lambda row: row["precisions"][precisions[-1]]["p50_ms"]["value"])
    for row, front in zip(rows, on_front(rows, precisions[-1]), strict=True):
        row["front"] = front
    return rows


def on_front(rows: Sequence[Row], precision: str) -> list[bool]:
    """Whether nothing beats a row: is faster with as many MACs, or has more and cannot be told to be slower.

    The second by the row's interval: of two that differ by noise alone, the larger one is the one to take.
    """
    points = [(row["precisions"][precision]["p50_ms"], row["macs"]) for row in rows]
    return [
        not any(
            (m > macs and t["value"] <= time["high"]) or (m == macs and t["value"] < time["value"]) for t, m in points
        )
        for time, macs in points
    ]


def measured_family(
    family: str,
    profile: Profile,
    size: list[int],
    classes: int,
    *,
    precisions: Sequence[str],
    depths: Sequence[int] = (),
    widths: Sequence[float] = (),
    teacher: ModelSpec | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a family on a profile, or read what was measured: one versioned document (JSON).

    Speed-ups are against `teacher` in fp32, else against the family's own default network in fp32. Raises UsageError,
    RecipeError or StageError.
    """
    members = candidates(family, profile.channel_multiple, size, classes, depths, widths)
    wanted = [(member.spec, precision) for member in members for precision in precisions]
    wanted += [(teacher, "fp32")] if teacher is not None else []
    table, file = table_of(family, profile, size, classes, wanted, again=again, progress=progress)
    here = environment()
    keys = [entry_key(*one) for one in wanted]
    busy = table.busy(keys)
    version = here["versions"].get(profile.runtime, "")
    against = table.p50(entry_key(teacher, "fp32")) if teacher is not None else table.reference_p50
    return {
        "version": 1,
        "family": family,
        "profile": profile.name,
        "size": size,
        "classes": classes,
        "precisions": list(precisions),
        "capacity": CAPACITY,
        "measured": table.measured(keys),
        "device": here["cpu"],
        "runtime": f"{profile.runtime} {version}".strip(),
        "threads": profile.threads,
        "batch": profile.protocol.batch,
        "against": {
            "name": "the teacher in fp32" if teacher is not None else table.reference,
            "p50_ms": against.model_dump(),
        },
        "candidates": rows_of(members, table, precisions, teacher),
        "cache": str(file),
        "busy": busy,
        "warnings": disturbances(here, busy),
    }


def _over(slow: Interval, fast: Interval) -> Interval:
    return Interval(value=slow.value / fast.value, low=slow.low / fast.high, high=slow.high / fast.low)
