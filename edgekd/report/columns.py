"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["aligned"]


def aligned(table: Sequence[Sequence[str]], left: Collection[int] | None = None) -> list[str]:
    """A line a row, columns padded to their widest cell: to the left those of `left` (default: all), others right."""
    if not table:
        return []
    columns = range(len(table[0]))
    widths = [max(len(row[i]) for row in table) for i in columns]
    to_the_left = columns if left is None else left
    return [
        "  ".join(row[i].ljust(widths[i]) if i in to_the_left else row[i].rjust(widths[i]) for i in columns).rstrip()
        for row in table
    ]
