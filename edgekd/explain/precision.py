"""What a quantize stage decided by measuring, from its precision.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .table import columns, legend, reasons_text

__all__ = ["precision_text"]


def precision_text(record: Mapping[str, Any]) -> str:
    """Whether int8 was handed out and why, then layer by layer what it harms and gains. `record`: precision.json."""
    kept = record.get("kept_float")
    lines = [f"decided  {'the network stays float: ' + kept if kept else 'int8 for ' + record['scheme']}"]
    measured = record.get("measured")
    if measured is not None:
        times = measured["speedup"]
        lines.append(
            f"measured float {measured['float_ms']:.4f} ms, quantized {measured['own_ms']:.4f} ms on "
            f"{measured['profile']}: {times['value']:.2f}x [{times['low']:.2f}, {times['high']:.2f}]"
        )
        if measured.get("metric") and measured.get("own_metric") is not None:
            lines.append(
                f"         {measured['metric']} {measured['float_metric']:.4f} -> {measured['own_metric']:.4f} on "
                f"{measured['images']} {measured['split']}"
            )
    elif record.get("not_measured"):
        lines.append(f"         not measured: {record['not_measured']}")
    reasons: dict[str, str] = {}
    table = [["layer", "is", "harm nats", "gain %", "why"]]
    for layer in record.get("layers", []):
        harm, gain = layer.get("harm"), layer.get("gain")
        why = legend(reasons, layer["reason"] or None)
        told = [f"{harm:.2g}" if harm is not None else "", f"{100 * gain:.1f}" if gain is not None else ""]
        table.append([layer["path"], layer["precision"], *told, why])
    if len(table) > 1:
        lines += ["", *columns(table), *reasons_text(reasons)]
        if any(row[2] or row[3] for row in table[1:]):
            lines.append("columns  harm: of the answers, with this layer alone in int8; gain: time saved by its group")
    return "\n".join(lines)
