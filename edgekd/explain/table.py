"""An explanation as plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .document import Explanation, LayerRow, Stored

__all__ = ["columns", "compact", "explanation_text", "legend", "reasons_text"]

WIDTH = 100
#: The first column's least width.
NARROWEST = 12


def explanation_text(e: Explanation) -> str:
    """A table with one row a layer, the reasons below it by letter, how it was measured, and the summary."""
    reasons: dict[str, str] = {}
    lines = columns(_cells(e.layers, reasons)) if e.layers else ["no matrix layers"]
    lines += reasons_text(reasons)
    lines += ["", *_columns_text(e.layers), *_summary(e)]
    return "\n".join(lines)


def columns(table: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Lines of a table with a header; empty columns are left out, the first is cut from the left to fit the width."""
    kept = [i for i in range(len(table[0])) if i == 0 or any(row[i] for row in table[1:])]
    widths = {i: max(len(row[i]) for row in table) for i in kept}
    rest = sum(widths[i] for i in kept if i)
    gap = 2 if widths[0] + rest + 2 * (len(kept) - 1) <= WIDTH else 1
    widths[0] = min(widths[0], max(NARROWEST, WIDTH - rest - gap * (len(kept) - 1)))
    lines = []
    for row in table:
        first = row[0] if len(row[0]) <= widths[0] else "…" + row[0][1 - widths[0] :]
        cells = [first.ljust(widths[0])]
        cells += [row[i].ljust(widths[i]) if i < left else row[i].rjust(widths[i]) for i in kept if i]
        lines.append((" " * gap).join(cells).rstrip())
    return lines


def _cells(rows: Sequence[LayerRow], reasons: dict[str, str]) -> list[list[str]]:
    head = ["layer", "op", "weight", "MACs", "stored", "runs", "range", "SQNR", "was ms", "ms", "%", "why"]
    table = [head]
    for r in rows:
        error = r.output_sqnr_db if r.output_sqnr_db is not None else r.weight_sqnr_db
        table.append(
            [
                r.name,
                r.op,
                "x".join(map(str, r.weight or [])),
                compact(r.macs),
                _stored(r),
                r.runs or "merged",
                _range(r.stored_input),
                f"{error:.1f}" if error is not None else "",
                f"{r.float_ms:.4f}" if r.float_ms is not None else "",
                f"{r.ms:.4f}" if r.ms is not None else "",
                f"{100 * r.share:.1f}" if r.share is not None else "",
                "".join(sorted(legend(reasons, text) for text in r.why_float)),
            ]
        )
    return table


def _stored(r: LayerRow) -> str:
    parts = (r.stored_input, r.stored_weight, r.stored_output)
    if not any(parts):
        return "float"
    return "/".join("f" if p is None else p.dtype + ("c" if p.per_channel else "") for p in parts)


def _range(s: Stored | None) -> str:
    if s is None or s.low is None or s.high is None:
        return ""
    return f"{s.low:.2g}..{s.high:.2g}"


def compact(value: int | None) -> str:
    """12,345,678 as 12.3M."""
    if value is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def legend(reasons: dict[str, str], text: str | None) -> str:
    """The letter that stands for a reason in the table; new ones are added to `reasons`."""
    if text is None:
        return ""
    number = len(reasons)
    return reasons.setdefault(
        text, (chr(ord("a") + number // 26 - 1) if number > 25 else "") + chr(ord("a") + number % 26)
    )


def reasons_text(reasons: dict[str, str]) -> list[str]:
    """The reasons by letter, below the table."""
    lines = []
    for reason, letter in reasons.items():
        lines += textwrap.wrap(reason, WIDTH, initial_indent=f"{letter:>3}  ", subsequent_indent=" " * 5)
    return lines


def _columns_text(rows: Sequence[LayerRow]) -> list[str]:
    told = []
    if any(r.output_sqnr_db is not None for r in rows):
        told.append("SQNR: dB, of the output, all fake-quantized, against the same weights unquantized")
    elif any(r.weight_sqnr_db is not None for r in rows):
        told.append("SQNR: dB, of the weight against the float one")
    if any(r.float_ms is not None for r in rows):
        told.append("was ms: in the float network")
    return [f"columns  {text}" if i == 0 else f"         {text}" for i, text in enumerate(told)]


def _summary(e: Explanation) -> list[str]:
    s = e.summary
    counted = f"{s.int8_layers} int8 and {s.float_layers} float matrix layers in ONNX Runtime"
    if s.other_layers:
        counted += f", {s.other_layers} others"
    lines = [f"layers   {counted}; {compact(s.parameters)} weights, {compact(s.macs) or 'unknown'} MACs"]
    if s.ms is not None:
        kinds = {
            "int8": "int8 layers",
            "float": "float layers",
            "weights": "weight-only",
            "conversion": "Q and DQ",
            "other": "the rest",
        }
        told = ", ".join(f"{kinds[k]} {100 * v:.0f} %" for k, v in s.shares.items())
        lines.append(f"time     {s.ms:.4f} ms a call: {told}")
        rest = ", ".join(f"{op} {100 * share:.0f} %" for op, share in s.rest.items())
        lines += [f"rest     {rest}"] if rest else []
        if s.float_parent_ms is not None:
            lines.append(f"float    {s.float_parent_ms:.4f} ms a call for the float network it came from")
        m = e.measured
        lines.append(f"measured {m['cpu']}, {m['threads']} thread{'s' * (m['threads'] > 1)}, {m['runtime']}")
        lines.append("         by its profiler, which takes time itself; for latency: edgekd bench")
    else:
        lines.append(f"time     not measured: {e.measured['why']}")
    lines += [f"note     {text}" for text in e.notes]
    if s.hint:
        lines.append(f"hint     {s.hint}")
    return lines
