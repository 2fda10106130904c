"""Verdicts: how they are shown, what exit code they mean, and gate.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..artifact import write_atomically
from ..errors import ArtifactError, UsageError

__all__ = ["OnInconclusive", "Unit", "Verdict", "bare", "exit_code", "lines", "read", "text", "write_gate"]

SCHEMA = 1
Unit = Literal["points", "percent", "change", "ms", "x", "MB", "mJ", "count", "number"]
OnInconclusive = Literal["inconclusive", "pass", "fail"]
#: unit -> scale, digits, suffix
UNITS: dict[Unit, tuple[float, int, str]] = {
    "points": (100.0, 2, " points"),
    "percent": (100.0, 2, " %"),
    "change": (100.0, 1, " %"),
    "ms": (1.0, 3, " ms"),
    "x": (1.0, 2, "x"),
    "MB": (1.0, 2, " MB"),
    "mJ": (1.0, 3, " mJ"),
    "count": (1.0, 0, ""),
    "number": (1.0, 4, ""),
}


class Verdict(BaseModel):
    """What a rule says about one variant. `found`, `low`, `high` and `limit` are in the units of results.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    profile: str
    variant: str
    rule: str = Field(description="for example `latency.p50 speedup`")
    verdict: Literal["pass", "fail", "inconclusive"]
    origin: Literal["measured", "compiled", "estimated"] = Field("measured", description="of what was found")
    limit: float
    allowed: str = Field(description="the limit as shown: `≥ 4.00x`")
    found: float | None = Field(description="None where it is not known")
    low: float | None = Field(None, description="of the 95 % interval")
    high: float | None = None
    shown: str = Field(description="what was found as shown: `4.31x [4.28, 4.35]`")
    hint: str | None = None


def text(unit: Unit, values: Sequence[float]) -> list[str]:
    """Values with their unit; with more digits where rounding would hide that one differs from the first, the limit."""
    scale, digits, suffix = UNITS[unit]
    scaled = [v * scale for v in values]
    while digits < 6 and any(
        f"{v:.{digits}f}" == f"{scaled[0]:.{digits}f}" and not math.isclose(v, scaled[0], abs_tol=1e-7) for v in scaled
    ):
        digits += 1
    sign = "+" if unit == "change" else ""
    # Rounded first and 0 added: what is shown as nothing has no minus.
    return [f"{round(v, digits) + 0.0:{sign},.{digits}f}{suffix}" for v in scaled]


def bare(shown: str) -> str:
    """The number alone."""
    return shown.removesuffix("x").partition(" ")[0]


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The gate's lines for a terminal: one per verdict in aligned columns, then the hints."""
    marks = {"pass": "pass", "fail": "FAIL", "inconclusive": "????"}
    rule, profile, allowed = (
        max((len(getattr(v, column)) for v in verdicts), default=0) for column in ("rule", "profile", "allowed")
    )
    body = [
        f"{marks[v.verdict]}  {v.rule:<{rule}}   {v.profile:<{profile}}   "
        f"allowed {v.allowed:<{allowed}}   found {v.shown}"
        for v in verdicts
    ]
    return body + [f"hint: {hint}" for hint in dict.fromkeys(v.hint for v in verdicts if v.hint)]


def exit_code(verdicts: Sequence[Verdict], on_inconclusive: OnInconclusive = "inconclusive") -> int:
    """0 all pass, 1 some rule failed, 4 none failed but some are inconclusive, which may be taken for either."""
    found = {v.verdict for v in verdicts}
    inconclusive = {"pass": 0, "fail": 1, "inconclusive": 4}[on_inconclusive]
    return 1 if "fail" in found else inconclusive if "inconclusive" in found else 0


def write_gate(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write gate.json."""
    table = {"schema_version": SCHEMA, "verdicts": [v.model_dump() for v in verdicts]}
    write_atomically(path, json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> list[Verdict]:
    """The verdicts of a gate.json. Raises UsageError (no such file) or ArtifactError (damaged, or another schema)."""
    hint = "judge again: edgekd gate RUN"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"no verdicts at {path}", hint=hint) from error
    except ValueError as error:
        raise ArtifactError(f"not JSON: {error}", where=str(path), hint=hint) from error
    version = table.get("schema_version") if isinstance(table, dict) else None
    if version != SCHEMA:
        raise ArtifactError(f"gate schema {version}, expected {SCHEMA}", where=str(path), hint=hint)
    try:
        return [Verdict.model_validate(v) for v in table["verdicts"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise ArtifactError("damaged: not a list of verdicts", where=str(path), hint=hint) from error
