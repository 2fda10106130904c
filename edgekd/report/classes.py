"""What a variant does with each class: rows for tables, and the pairs that it confuses most."""

from __future__ import annotations

from dataclasses import dataclass

from ..bench.results import Variant
from . import figures as f

__all__ = ["ClassRow", "class_rows", "most_confused"]

PAIRS = 10


@dataclass(frozen=True)
class ClassRow:
    """One class as shown; `share` is its recall, for a bar."""

    name: str
    recall: str
    precision: str
    images: int
    share: float


def class_rows(variant: Variant) -> list[ClassRow]:
    """Classes with images, that of the lowest recall first."""
    known = [c for c in variant.classes if c.recall is not None]
    return [
        ClassRow(
            name=c.name,
            recall=f.percent(c.recall or 0.0),
            precision=f.NONE if c.precision is None else f.percent(c.precision),
            images=c.images,
            share=c.recall or 0.0,
        )
        for c in sorted(known, key=lambda c: c.recall or 0.0)
    ]


def most_confused(variant: Variant) -> list[tuple[str, str, int]]:
    """(true class, answer, images) of the largest cells beside the diagonal."""
    cells = [
        (count, i, j) for i, row in enumerate(variant.confusion) for j, count in enumerate(row) if i != j and count
    ]
    names = [c.name for c in variant.classes]
    return [(names[i], names[j], count) for count, i, j in sorted(cells, key=lambda c: (-c[0], c[1:]))[:PAIRS]]
