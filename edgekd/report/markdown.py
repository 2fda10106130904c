"""The report as Markdown: for a pull request's comment or a job's summary."""

from __future__ import annotations

import re
from collections.abc import Sequence

from . import figures as f
from .model import Page, ProfileView

__all__ = ["markdown"]

STATUS = {"pass": "✅ gate passes", "fail": "❌ gate fails", "inconclusive": "❔ gate inconclusive"}
MARKS = {"pass": "✅ pass", "fail": "❌ **fail**", "inconclusive": "❔ inconclusive"}
COLUMNS = (
    "quality", "drop", "p50", "p95", "p99", "compute", "transfers", "estimate", "speedup", "macs_ratio", "size",
    "layers", "scheme",
)  # fmt: skip
#: What CI finds its own comment by.
WORST = 10
MARKER = "<!-- edgekd -->"


def markdown(page: Page) -> str:
    """The same figures as the HTML page, without the drawings."""
    status = f" · {STATUS[page.status]}" if page.status in STATUS else ""
    parts = [MARKER, f"## {escape(page.results.name)}{status}"]
    for profile in page.profiles:
        parts += _profile(profile, titled=len(page.profiles) > 1)
    facts = [("data", page.data), *page.environment]
    if page.results.seed is not None:
        facts.insert(1, ("seed", str(page.results.seed)))
    lineage = [
        [
            escape(e.stage),
            code(e.key[:12]),
            ", ".join(f"{escape(n)} {code(k[:12])}" for n, k in e.parents.items()) or f.NONE,
        ]
        for e in page.lineage
    ]
    details = [_table(["environment", ""], [[escape(k), escape(v)] for k, v in facts], "ll")]
    if lineage:
        details.append(_table(["stage", "key", "from"], lineage, "lll"))
    parts.append(f"Reproduce: {code(page.results.command)}")
    parts.append("<details><summary>Environment and lineage</summary>\n\n" + "\n\n".join(details) + "\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _profile(p: ProfileView, titled: bool) -> list[str]:
    parts = [f"### {escape(p.profile)}"] if titled else []
    parts.append(f"**{escape(p.sentence)}**  \n{escape(p.profile)} · {escape(p.measured)}")
    columns = [c for _, group in p.groups for c in group if c[0] in COLUMNS]
    header = ["variant"] + [escape(f"{name} {unit}".strip()) for _, name, unit in columns]
    rows = []
    for row in p.rows:
        cells = [escape(f"{row.cells[key].text} {row.cells[key].under}".strip()) for key, _, _ in columns]
        name = f"{escape(row.name)} ({escape(row.tags[0])})"
        rows.append([f"**{name}**" if row.final else name, *cells])
    parts += [f"> ⚠️ {escape(text)}" for text in p.warnings]
    parts.append(_table(header, rows, "l" + "r" * len(columns)))
    parts += [escape(p.estimated)] if p.estimated else []
    parts += [f"Its file: {escape(p.file)}"] if p.file else []
    if p.verdicts:
        gate = [[MARKS[v.verdict], escape(v.rule), escape(v.allowed), escape(v.shown)] for v in p.verdicts]
        parts.append(_table(["gate", "rule", "allowed", "found"], gate, "llll"))
        hints = dict.fromkeys(v.hint for v in p.verdicts if v.hint)
        parts += ["\n".join(f"- hint: {escape(hint)}" for hint in hints)] if hints else []
    if p.classes:
        worst = [[escape(c.name), c.recall, c.precision, str(c.images)] for c in p.classes[:WORST]]
        table = _table(["class", "recall", "precision", "images"], worst, "lrrr")
        pairs = "; ".join(f"{escape(true)} taken for {escape(answer)}: {n}" for true, answer, n in p.confused[:5])
        title = f"Classes of {escape(p.rows[-1].name)}, worst first"
        text = "\n\n".join(filter(None, (table, f"Most confused: {pairs}" if pairs else "")))
        parts.append(f"<details><summary>{title}</summary>\n\n{text}\n\n</details>")
    return parts


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    rule = ["---:" if a == "r" else "---" for a in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def escape(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def code(text: str) -> str:
    """Inline code, with a fence longer than any inside; a bar would end a table's cell."""
    text = " ".join(text.split()).replace("|", "¦")
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"
