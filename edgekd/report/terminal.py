"""The table of variants as plain text for a terminal."""

from __future__ import annotations

from .columns import aligned
from .model import Page, ProfileView

__all__ = ["terminal"]

COLUMNS = (
    "quality", "drop", "p50", "p95", "p99", "compute", "transfers", "estimate", "speedup", "macs_ratio", "size",
    "layers", "scheme",
)  # fmt: skip


def terminal(page: Page) -> str:
    """One block a profile: how it was measured, then a line a variant."""
    return "\n\n".join(_profile(profile) for profile in page.profiles) + "\n"


def _profile(p: ProfileView) -> str:
    columns = [c for _, group in p.groups for c in group if c[0] in COLUMNS]
    table = [["stage"] + [f"{name} {unit}".strip() for _, name, unit in columns]]
    for row in p.rows:
        cells = [row.cells[key] for key, _, _ in columns]
        table.append([row.name] + [f"{c.text} {c.under}".strip() for c in cells])
    lines = aligned(table, left=(0,))
    file = [f"its file: {p.file}"] if p.file else []
    estimated = [p.estimated] if p.estimated else []
    return "\n".join([f"{p.profile} · {p.measured}", *lines, *estimated, p.sentence, *file])
