"""One ONNX file, layer by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ..bench import disturbances, environment, pinned
from ..bench.layers import CALLS
from ..bench.results import LayerTime
from ..profile import Profile
from .constants import Graph, Integers
from .document import Explanation, LayerRow, Stored, Summary
from .error import pair_layers, weight_sqnr
from .kernels import Ran, macs_of, run_layers
from .reading import read_model
from .reasons import CHANNELS, advice, reasons
from .stored import StoredLayer, stored_layers

__all__ = ["Examined", "examine", "explain", "explain_file"]

#: How many of the other operators are named.
SHOWN = 5
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


@dataclass(frozen=True)
class Examined:
    """A file's layers as stored, and what running it showed."""

    path: Path
    model: onnx.ModelProto
    graph: Graph
    layers: list[StoredLayer]
    ran: Ran
    profile: Profile


def explain_file(path: Path, profile: Profile, against: Path | None = None) -> Explanation:
    """Every matrix layer of an ONNX file: as stored, as ONNX Runtime runs it here, its error and time, and why.

    `against` is a float file of the same network. Raises UsageError (no such file, not ONNX, weights missing, unknown
    operators) or StageError (ONNX Runtime cannot load it).
    """
    return explain(examine(path, profile), examine(against, profile) if against is not None else None)


def examine(path: Path, profile: Profile) -> Examined:
    """Read a file and run it with the profile's threads. Raises UsageError or StageError."""
    model = read_model(path)
    graph = Graph(model)
    layers = stored_layers(model, graph)
    with pinned(profile.affinity, f"profile {profile.name}: affinity"):
        ran = run_layers(path, model, graph, layers, profile.threads)
    return Examined(path, model, graph, layers, ran, profile)


def explain(own: Examined, other: Examined | None = None) -> Explanation:
    """What was found of a file, beside the float file of the same network."""
    layers, ran = own.layers, own.ran
    pairs = pair_layers(layers, other.layers) if other is not None else {}
    why = [reasons(layer, own.graph, ran.kernels.get(layer.index)) for layer in layers]
    rows = []
    for layer, texts in zip(layers, why, strict=True):
        pair = pairs.get(layer.index)
        kernel = other.ran.kernels.get(pair.index) if other is not None and pair is not None else None
        rows.append(_row(layer, ran, pair, kernel.ms if kernel else None, texts))
    return Explanation(
        file=str(own.path),
        producer=f"{own.model.producer_name} {own.model.producer_version}".strip() or "unknown",
        layers=rows,
        summary=_summary(rows, ran.operators, other.ran.operators if other else [], advice(layers, why)),
        measured=_measured(own),
        against=str(other.path) if other is not None else None,
        notes=_notes(own, other, pairs),
    )


def _notes(own: Examined, other: Examined | None, pairs: dict[int, StoredLayer]) -> list[str]:
    notes = [f"ONNX Runtime cannot run it: {own.ran.problem}"] if own.ran.problem else []
    missing = (
        sum(x.w is not None and x.weight is not None and x.index not in pairs for x in own.layers)
        if other is not None
        else 0
    )
    if missing and other is not None:
        notes.append(f"{missing} quantized layers have no counterpart in {other.path}: is it the same network?")
    if several := [x.name for x in own.layers if x.x is not None and x.x.per_channel and x.w is not None]:
        notes.append(f"{', '.join(several[:4])}: {CHANNELS}")
    if inner := _inside(own.model.graph):
        notes.append(f"{inner} matrix layers inside If, Loop or Scan are not listed")
    if own.profile.runtime != "onnxruntime":
        notes.append(f"this is ONNX Runtime on this machine; profile {own.profile.name} runs {own.profile.runtime}")
    return notes


def _row(layer: StoredLayer, ran: Ran, other: StoredLayer | None, float_ms: float | None, why: list[str]) -> LayerRow:
    kernel, shapes = ran.kernels.get(layer.index), ran.shapes.get(layer.index)
    total = sum(t.ms for t in ran.operators)
    ms = kernel.ms if kernel else None
    return LayerRow(
        name=layer.name,
        node=layer.node.name,
        path=layer.path,
        op=layer.op,
        weight=layer.weight_shape,
        input=shapes[0] if shapes else None,
        output=shapes[1] if shapes else None,
        parameters=math.prod(layer.weight_shape) if layer.weight_shape else None,
        macs=macs_of(layer, shapes),
        stored_input=_stored(layer.x),
        stored_weight=_stored(layer.w),
        stored_output=_stored(layer.y),
        bias=layer.bias,
        kernel=kernel.op if kernel else None,
        runs=kernel.precision if kernel else None,
        weight_sqnr_db=weight_sqnr(layer, other),
        ms=ms,
        float_ms=float_ms,
        share=ms / total if ms is not None and total else None,
        why_float=why,
    )


def _stored(integers: Integers | None) -> Stored | None:
    if integers is None:
        return None
    bounds = integers.bounds()
    single = integers.scale is not None and integers.scale.size == 1
    zero = integers.zero_point
    return Stored(
        dtype=integers.dtype,
        per_channel=integers.per_channel,
        scale=float(integers.scale.item()) if single and integers.scale is not None else None,
        zero_point=(
            int(zero.min()) if zero is not None and (zero == zero.flat[0]).all() else None if zero is not None else 0
        ),
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
    )


def _summary(rows: list[LayerRow], operators: list[LayerTime], parent: list[LayerTime], hint: str | None) -> Summary:
    total, before = (sum(t.ms for t in times) for times in (operators, parent))
    spent = {kind: sum(r.ms or 0.0 for r in rows if r.runs == kind) for kind in ("int8", "float")}
    if weights := sum(r.ms or 0.0 for r in rows if r.runs is not None and r.runs.startswith("w")):
        spent["weights"] = weights
    spent["conversion"] = sum(t.ms for t in operators if t.op in CONVERSIONS)
    spent["other"] = max(0.0, total - sum(spent.values()))
    shares = {kind: value / total for kind, value in spent.items()} if total else {}
    if (
        hint is None
        and spent["int8"]
        and before
        and total > before
        and shares["conversion"] + shares["other"] > shares["int8"]
    ):
        hint = "int8 does not pay here: time goes into what lies between the layers; see `mixed`"
    macs = [r.macs for r in rows if r.macs is not None]
    return Summary(
        int8_layers=sum(r.runs == "int8" for r in rows),
        float_layers=sum(r.runs == "float" for r in rows),
        other_layers=sum(r.runs not in ("int8", "float") for r in rows),
        parameters=sum(r.parameters or 0 for r in rows),
        macs=sum(macs) if macs else None,
        ms=total or None,
        float_parent_ms=before or None,
        shares=shares,
        rest=_rest(rows, operators, total),
        hint=hint,
    )


def _rest(rows: list[LayerRow], operators: list[LayerTime], total: float) -> dict[str, float]:
    kernels = {r.kernel for r in rows}
    spent: dict[str, float] = defaultdict(float)
    for t in operators:
        if t.op not in kernels and t.op not in CONVERSIONS:
            spent[t.op] += t.ms / total
    slowest = sorted(spent.items(), key=lambda item: -item[1])[:SHOWN]
    return {op: share for op, share in slowest if share >= 0.01}


def _measured(own: Examined) -> dict[str, Any]:
    if not own.ran.operators:
        return {"origin": "not measured", "why": own.ran.problem or "nothing ran"}
    machine = environment()
    return {
        "origin": "measured",
        "cpu": machine["cpu"],
        "threads": own.profile.threads,
        "batch": 1,
        "runtime": f"ONNX Runtime {machine['versions'].get('onnxruntime', '')}".strip(),
        "profile": own.profile.name,
        "how": f"ONNX Runtime's profiler, mean of the middle half of {CALLS} calls without the first fifth",
        "warnings": disturbances(machine),
    }


def _inside(graph: Any) -> int:
    inner = [g for n in graph.node for a in n.attribute for g in [*([a.g] if a.HasField("g") else []), *a.graphs]]
    named = {"Conv", "Gemm", "MatMul", "ConvTranspose"}
    return sum(sum(n.op_type in named for n in g.node) + _inside(g) for g in inner)
