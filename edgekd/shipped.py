"""Where the data files that ship with edgekd lie."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError

__all__ = ["shipped"]


def shipped(name: str) -> Path:
    """The directory of shipped `profiles` or `recipes`: inside an installed wheel, or beside an editable checkout."""
    here = Path(__file__).resolve().parent
    for place in (here / "_shipped" / name, here.parent / name):
        if place.is_dir():
            return place
    raise UsageError(f"edgekd's own {name} are missing from this installation", hint="reinstall edgekd")
