"""What TensorRT makes of a file, as text: a table of its matrix layers, what is wrong with it, and the verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from ..trt.findings import summarised
from ..trt.verification import MatrixLayer, Verification
from .columns import aligned

__all__ = ["verdict", "verification_text"]

WIDTH = 100
#: Layers that the verdict names.
NAMED = 3


def verification_text(v: Verification) -> str:
    """How it was judged, a line a matrix layer, the findings by rule, and the verdict as the last line."""
    lines = [f"{v.file} · {v.profile}, TensorRT {v.tensorrt} · {_judge(v)}"]
    lines += _table(v.layers, v.compiled is True)
    lines += [line for r in v.refused for line in _wrapped("refused", f"{r.op} {r.node}: {r.what} [the parser]")]
    lines += _findings(v)
    for why in dict.fromkeys(layer.why for layer in v.layers if layer.why):
        names = [layer.name for layer in v.layers if layer.why == why]
        lines += _wrapped("float", f"{_first(names)}: {why}")
    lines += [line for text in v.notes for line in _wrapped("note", text)]
    return "\n".join([*lines, verdict(v)]) + "\n"


def verdict(v: Verification) -> str:
    """One sentence."""
    wanted = sum(layer.wanted == "int8" for layer in v.layers)
    if v.compiled is False:
        return f"refused: {v.why}"
    if v.compiled:
        if v.silently_float:
            names = _first([layer.name for layer in v.silently_float])
            return f"compiles, but {len(v.silently_float)} of {wanted} layers that should be int8 are not: {names}"
        if not v.ok:
            return f"compiles, but by the rules above the device {_judged(v)}"
        as_wanted = f", all {wanted} int8 that should be" if wanted else ""
        return f"ok: compiles, {_counted(v.got)} matrix layers{as_wanted}"
    told = "ok" if v.ok else f"the device {_judged(v)},"
    return f"{told} by the rules alone; the file wants {_counted(v.wanted)} matrix layers"


def _counted(precisions: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {precision or 'unknown'}" for precision, count in precisions.items()) or "no"


def _judged(v: Verification) -> str:
    refused = any(finding.severity == "refused" for finding in v.findings)
    return "does not take it" if refused else "runs layers in float that should be int8"


def _judge(v: Verification) -> str:
    if v.origin == "static":
        return "judged by rules alone"
    return f"{'compiled' if v.compiled else 'tried'} for {v.compiled_for} with {v.compiler} in {v.seconds:.1f} s"


def _table(layers: Sequence[MatrixLayer], compiled: bool) -> list[str]:
    if not layers:
        return ["no matrix layers"]
    head = ["layer", "op", "wants", "is", "writes", "fused with"] if compiled else ["layer", "op", "wants"]
    table = [head]
    for layer in layers:
        got = [layer.got or "merged", layer.output or "", " ".join(f.op for f in layer.fused)] if compiled else []
        table.append([layer.name, layer.op, layer.wanted or "?", *got])
    return aligned(table)


def _findings(v: Verification) -> list[str]:
    """Those of one rule together."""
    lines = []
    for finding in summarised(v.findings):
        where = finding.path or finding.node
        lines += _wrapped(finding.severity, f"{where + ': ' if where else ''}{finding.what} [{finding.rule}]")
        lines += _wrapped("", f"hint: {finding.hint}") if finding.hint else []
    return lines


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _wrapped(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{title:<8} ", subsequent_indent=" " * 9)
