"""What is told of a file's layers, as one JSON-able document."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..bench import disturbances, environment
from ..bench.layers import CALLS
from ..bench.results import LayerTime
from .constants import Graph, Integers
from .error import pair_layers, weight_sqnr
from .kernels import Ran, macs_of, run_layers
from .reading import read_model
from .reasons import CHANNELS, advice, reasons
from .stored import StoredLayer, stored_layers

__all__ = ["Explanation", "LayerRow", "Stored", "Summary", "explain_file"]

CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stored(_Record):
    """Integers in the file: their type, whether there is a scale per channel, and what they can stand for."""

    dtype: str = Field(description="u8, s8, ...")
    per_channel: bool
    scale: float | None = Field(None, description="null where there are several, or it is calculated at run time")
    zero_point: int | None = None
    low: float | None = None
    high: float | None = None


class LayerRow(_Record):
    """One matrix layer."""

    name: str = Field(description="module path where the file has it, otherwise the node's name")
    node: str
    path: str | None
    op: str
    weight: list[int] | None = Field(description="shape")
    input: list[int] | None = Field(description="shape of the first input")
    output: list[int] | None = Field(description="shape")
    parameters: int | None
    macs: int | None = Field(description="of one call")
    stored_input: Stored | None
    stored_weight: Stored | None
    stored_output: Stored | None
    bias: str
    kernel: str | None = Field(description="operator of ONNX Runtime's optimised graph")
    runs: str | None = Field(description="int8, float, w4 and the like; null where no kernel of its own is left")
    weight_sqnr_db: float | None = None
    output_sqnr_db: float | None = Field(None, description="of the fake-quantized network, on calibration images")
    ms: float | None = Field(None, description="measured, median of a call")
    float_ms: float | None = Field(None, description="of the same layer in the float network it came from")
    share: float | None = Field(None, description="of the time of all operators")
    why_float: list[str] = []


class Summary(_Record):
    """All layers together."""

    int8_layers: int
    float_layers: int
    other_layers: int = Field(description="integer weights with float products, or merged with other layers")
    parameters: int
    macs: int | None
    ms: float | None = Field(description="all operators of one call, by the profiler")
    float_parent_ms: float | None = Field(None, description="the same of the float network it came from")
    shares: dict[str, float] = Field(default={}, description="of that time: int8, float, conversion, other")
    hint: str | None = None


class Explanation(_Record):
    """One file, layer by layer."""

    file: str
    producer: str
    layers: list[LayerRow]
    summary: Summary
    measured: dict[str, Any] = Field(description="device, threads, runtime, calls; or why nothing was measured")
    against: str | None = Field(None, description="where the float weights are from")
    notes: list[str] = []


def explain_file(path: Path, *, threads: int = 1, against: Path | None = None) -> Explanation:
    """Every matrix layer of an ONNX file: as stored, as ONNX Runtime runs it here, its error and time, and why.

    `against` is a float file of the same network. Raises UsageError (no such file, not ONNX, weights missing, unknown
    operators) or StageError (ONNX Runtime cannot load it).
    """
    model = read_model(path)
    graph = Graph(model)
    layers = stored_layers(model, graph)
    ran = run_layers(path, model, graph, layers, threads)
    pairs: dict[int, StoredLayer] = {}
    notes = [f"ONNX Runtime cannot run it: {ran.problem}"] if ran.problem else []
    if against is not None:
        other = read_model(against)
        theirs = stored_layers(other, Graph(other))
        pairs = pair_layers(layers, theirs)
        if missing := sum(x.w is not None and x.index not in pairs for x in layers):
            notes.append(f"{missing} quantized layers have no counterpart in {against}: is it the same network?")
    why = [reasons(layer, graph, ran.kernels.get(layer.index)) for layer in layers]
    rows = [_row(layer, ran, pairs.get(layer.index), texts) for layer, texts in zip(layers, why, strict=True)]
    if several := [x.name for x in layers if x.x is not None and x.x.per_channel and x.w is not None]:
        notes.append(f"{', '.join(several[:4])}: {CHANNELS}")
    inner = _inside(model)
    if inner:
        notes.append(f"{inner} matrix layers inside If, Loop or Scan are not listed")
    return Explanation(
        file=str(path),
        producer=f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        layers=rows,
        summary=_summary(rows, ran.operators, advice(layers, why)),
        measured=_measured(ran, threads),
        against=str(against) if against is not None else None,
        notes=notes,
    )


def _row(layer: StoredLayer, ran: Ran, other: StoredLayer | None, why: list[str]) -> LayerRow:
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


def _summary(rows: list[LayerRow], operators: list[LayerTime], hint: str | None) -> Summary:
    total = sum(t.ms for t in operators)
    spent = {kind: sum(r.ms or 0.0 for r in rows if r.runs == kind) for kind in ("int8", "float")}
    spent["conversion"] = sum(t.ms for t in operators if t.op in CONVERSIONS)
    spent["other"] = max(0.0, total - sum(spent.values()))
    macs = [r.macs for r in rows]
    return Summary(
        int8_layers=sum(r.runs == "int8" for r in rows),
        float_layers=sum(r.runs == "float" for r in rows),
        other_layers=sum(r.runs not in ("int8", "float") for r in rows),
        parameters=sum(r.parameters or 0 for r in rows),
        macs=sum(m for m in macs if m is not None) if any(m is not None for m in macs) else None,
        ms=total or None,
        shares={kind: value / total for kind, value in spent.items()} if total else {},
        hint=hint,
    )


def _measured(ran: Ran, threads: int) -> dict[str, Any]:
    if not ran.operators:
        return {"origin": "not measured", "why": ran.problem or "nothing ran"}
    machine = environment()
    return {
        "origin": "measured",
        "cpu": machine["cpu"],
        "threads": threads,
        "runtime": f"ONNX Runtime {machine['versions'].get('onnxruntime', '')}".strip(),
        "how": f"ONNX Runtime's profiler, median of {CALLS} calls of one image without the first fifth",
        "warnings": disturbances(machine),
    }


def _inside(model: Any) -> int:
    def count(graph: Any) -> int:
        inner = [g for n in graph.node for a in n.attribute for g in [*([a.g] if a.HasField("g") else []), *a.graphs]]
        return sum(
            sum(n.op_type in {"Conv", "Gemm", "MatMul", "ConvTranspose"} for n in g.node) + count(g) for g in inner
        )

    return count(model.graph)
