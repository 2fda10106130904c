"""The confusion matrix as a drawing: mistakes are what one looks for, so they have a scale of their own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .svg import label, shorten, text

__all__ = ["heat_map"]

#: More classes have no room for names.
NAMED = 20


def heat_map(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Rows are true classes, columns answers. The diagonal is tinted by recall, the rest by its share of the row.

    The darkest mistake is the largest one; up to 20 classes cells have numbers and names.
    """
    k = len(confusion)
    named = k <= NAMED
    cell = max(30.0 if named else 560.0 / k, 5.0) if k else 0.0
    left, top = (104.0, 84.0) if named else (4.0, 4.0)
    width, height = left + cell * k + 4, top + cell * k + 4
    totals = [sum(row) or 1 for row in confusion]
    worst = max((confusion[i][j] / totals[i] for i in range(k) for j in range(k) if i != j), default=0.0) or 1.0
    parts = []
    for i, row in enumerate(confusion):
        y = top + i * cell
        if named:
            parts.append(text(left - 8, y + cell / 2 + 4, shorten(names[i], 13), "tick", "end"))
            corner = f"{left + (i + 0.5) * cell + 4:.1f} {top - 8:.1f}"
            place = corner.replace(" ", '" y="')
            turned = f'<text x="{place}" class="tick" transform="rotate(-45 {corner})">'
            parts.append(f"{turned}{escape(shorten(names[i], 13))}</text>")
        for j, count in enumerate(row):
            if not count:
                continue
            share = count / totals[i]
            css, shade = ("hit", share) if i == j else ("miss", 0.12 + 0.88 * share / worst)
            x = left + j * cell
            place = f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}"'
            title = f"<title>{escape(names[i])} taken for {escape(names[j])}: {count:,}</title>"
            parts.append(f'<rect {place} class="{css}" fill-opacity="{shade:.2f}">{title}</rect>')
            if named:
                strong = " strong" if shade > 0.55 else ""
                parts.append(text(x + cell / 2, y + cell / 2 + 4, str(count), f"count{strong}", "middle"))
    frame = f'<rect x="{left}" y="{top}" width="{cell * k:.1f}" height="{cell * k:.1f}" class="frame"/>'
    told = label(f"confusion matrix of {k} classes")
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px"'
    return f'<svg {size} role="img" aria-label="{told}">{frame}{"".join(parts)}</svg>'
