"""Training curves out of the lineage's per-epoch records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..bench.results import Lineage
from .figures import significant

__all__ = ["Curve", "Training", "training"]


@dataclass(frozen=True)
class Curve:
    """One series over epochs; `first` and `last` are its end values as shown."""

    name: str
    css: str
    points: list[tuple[float, float]]
    first: str
    last: str


@dataclass(frozen=True)
class Training:
    """The curves of one stage."""

    stage: str
    caption: str
    curves: list[Curve]


def training(lineage: Sequence[Lineage], headline: str, fraction: bool) -> list[Training]:
    """The validation metric and the training loss of every stage that trained for at least two epochs."""
    found = []
    for entry in lineage:
        curves = []
        for key, name, css in (
            (f"val.{headline}", f"validation {headline}", "quality"),
            ("loss", "training loss", "loss"),
        ):
            points = [
                (float(record.get("epoch", i)) + 1, float(record[key]))
                for i, record in enumerate(entry.history)
                if isinstance(record.get(key), int | float) and math.isfinite(record[key])
            ]
            if len(points) > 1:
                percent = fraction and css == "quality"
                ends = [f"{100 * p[1]:.1f} %" if percent else significant(p[1]) for p in (points[0], points[-1])]
                curves.append(Curve(name, css, points, *ends))
        if curves:
            found.append(Training(entry.stage, f"{len(entry.history)} epochs", curves))
    return found
