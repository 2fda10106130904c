"""What a pruning took away, group by group, from its plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bench.env import BUSY
from .table import columns, compact, legend, reasons_text

__all__ = ["plan_text"]

UNITS = {"latency": "ms", "macs": "MACs", "parameters": "params", "size": "bytes"}


def plan_text(plan: Mapping[str, Any]) -> str:
    """A row for each group of channels and each block: what went or why it stayed, what it saves and what it harms.

    `plan` is a PruningPlan as JSON; those of older versions, which know less, are shown as far as they go.
    """
    measure = next((name for name in UNITS if plan["target"].get(name) is not None), "macs")
    reasons: dict[str, str] = {}
    table = [["group", "channels", "gone", f"saves {UNITS[measure]}", "measured", "harm nats", "importance %", "kept"]]
    for block in plan.get("blocks", []):
        gone = "block" if block["removed"] else ""
        why = legend(reasons, block.get("reason_kept"))
        table.append([block["name"], "", gone, *_saved(block, measure), _harm(block), "", why])
    for group in plan["groups"]:
        before, after = group["channels_before"], group["channels_after"]
        gone = f"{100 * (before - after) / before:.0f} %" if after != before else ""
        within = f"went with the block {group['block']}" if group.get("block") else group.get("reason_kept")
        share = group.get("importance_removed_share", 0.0)
        told = [*_saved(group, measure), _harm(group), f"{100 * share:.1f}" if share else ""] if gone else [""] * 4
        table.append([group["name"], f"{before} -> {after}", gone, *told, legend(reasons, within)])
    lines = columns(table) if len(table) > 1 else ["nothing could be pruned"]
    lines += reasons_text(reasons)
    return "\n".join([*lines, "", *_totals(plan, measure)])


def _saved(row: Mapping[str, Any], measure: str) -> list[str]:
    """What was predicted, and what was measured."""
    saved, measured = row.get("saved"), row.get("saved_measured")
    if measure != "latency":
        return [compact(round(saved)) if saved else "", compact(round(measured["value"])) if measured else ""]
    half = (measured["high"] - measured["low"]) / 2 if measured else 0.0
    return [f"{saved:.4f}" if saved else "", f"{measured['value']:.4f} ±{half:.4f}" if measured else ""]


def _harm(row: Mapping[str, Any]) -> str:
    harm = row.get("harm")
    return f"{harm:.2g}" if harm else ""


def _totals(plan: Mapping[str, Any], measure: str) -> list[str]:
    lines = []
    for key, name in (("macs", "MACs"), ("parameters", "params"), ("bytes", "bytes")):
        before, after = plan.get(f"{key}_before"), plan.get(f"{key}_after")
        if before and after is not None:
            lines.append(f"{name:<8} {compact(before)} -> {compact(after)}, {100 * after / before:.1f} % remain")
    latency = plan.get("latency")
    if latency is not None:
        where = f"on {latency['profile']}, {latency['precision']}"
        lines.append(
            f"latency  predicted {latency['predicted_ms_before']:.4f} -> {latency['predicted_ms_after']:.4f} ms {where}"
        )
        before, after, times = (latency[k] for k in ("measured_ms_before", "measured_ms_after", "speedup"))
        lines.append(f"         measured  {_interval(before)} -> {_interval(after)} ms")
        lines.append(
            f"         speed-up  {times['value']:.2f}x [{times['low']:.2f}, {times['high']:.2f}], "
            f"wanted {latency['wanted_speedup']:.2f}x"
        )
        lines += _circumstances(latency)
    if plan.get("harm"):
        lines.append(
            f"harm     {plan['harm']:.3g} nats measured with all of it gone, before healing (KL of the answers)"
        )
    lines.append(f"columns  saves: predicted {UNITS[measure]} that this group alone saves, all else as decided;")
    if any(row.get("saved_measured") for row in [*plan.get("blocks", []), *plan["groups"]]):
        lines.append("         measured: the same, of the two networks as a whole, before healing")
    lines.append("         harm: estimated with it alone gone, measured at up to 6 numbers of its channels")
    return lines


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _circumstances(latency: Mapping[str, Any]) -> list[str]:
    """What the measurement was made with; plans of older versions do not know it."""
    if not latency.get("rounds"):
        return []
    threads = latency["threads"]
    found = [f"{latency['rounds']} rounds", latency["runtime"], f"{threads} thread{'s' if threads > 1 else ''}"]
    lines = ["         " + ", ".join([*found, latency["device"]])]
    if (latency["busy"] or 0.0) > BUSY:
        lines.append(f"         other programs kept {latency['busy']:.1f} cores busy meanwhile")
    return lines
