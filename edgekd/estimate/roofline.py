"""What a datasheet says of a network's latency, without running it: the roofline, and a bound that nothing beats.

Roofline (Williams, Waterman, Patterson 2009): a layer takes as long as its operations take at the device's peak, or its
bytes at the memory's full bandwidth, whichever is longer. Real networks are several times slower: no kernel reaches the
peak, and starting one takes microseconds.

A layer's data may come from a cache, and fast algorithms need fewer operations than are counted, so that a sum of
rooflines is no strict bound. `floor_ms` is one: all operations at the peak, as few as the best known algorithm has; or
all weights and images through the memory once, as far as the last cache cannot hold them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UsageError
from ..profile import Datasheet, Profile
from .fusion import MATRIX, Group, groups
from .graph import QUANTIZE, Graph, attribute, read_graph

__all__ = ["Layer", "Precision", "Roofline", "roofline"]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Bound = Literal["compute", "memory"]
FIELDS = {"fp32": "fp32_tflops", "fp16": "fp16_tflops", "bf16": "bf16_tflops", "int8": "int8_tops"}
#: The largest tiles of fast convolution in a library, F(6x6, rxr) in NNPACK; TensorRT and cuDNN have smaller ones.
#: Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks".
TILE = 6


class Layer(BaseModel):
    """One kernel: what it calculates and moves at one call, and the least time for that."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    ops: str = Field(description="the nodes in it: Conv+Relu+Add")
    precision: Precision
    macs: int
    weight_bytes: int
    read_bytes: int = Field(description="of activations")
    written_bytes: int
    compute_ms: float
    memory_ms: float
    bound: Bound

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)

    @property
    def moved_bytes(self) -> int:
        return self.weight_bytes + self.read_bytes + self.written_bytes


class Roofline(BaseModel):
    """A network on a device as its datasheet has it. Times are per call of `batch` images."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    batch: int
    precision: Precision = Field(description="in which most operations are carried out")
    macs: int
    moved_bytes: int
    ms: float = Field(description="the layers' rooflines, one after the other")
    floor_ms: float = Field(description="no run can be faster: what every quantile of a latency lies above")
    bound: Bound = Field(description="where most of `ms` goes")
    layers: list[Layer]
    notes: list[str] = []


def roofline(path: Path, profile: Profile, *, batch: int | None = None, precision: Precision | None = None) -> Roofline:
    """The roofline of an ONNX file on a profile with a datasheet.

    batch: default, as the profile's protocol has it; a file with a fixed batch keeps it. precision: what the layers
    that are 32 bit floats in the file run in (default: that, or fp16 where the runtime builds a quantized file with
    fp16 allowed).
    Raises UsageError: no datasheet, or a figure that it lacks; no ONNX file, or sizes that are not known.
    """
    sheet = profile.datasheet
    if sheet is None:
        raise UsageError(
            f"profile {profile.name} has no datasheet to estimate by",
            where="--profile",
            hint="add a table [datasheet] with int8_tops, fp16_tflops, fp32_tflops, bandwidth_gb_s and source",
        )
    graph = read_graph(path, batch or profile.protocol.batch)
    wide = precision or _default(graph, profile)
    peaks = _Peaks(sheet, profile)
    kernels = groups(graph)
    layers, least = [], 0.0
    for group in kernels:
        layer, compute = _layer(graph, group, wide, peaks)
        layers.append(layer)
        least += compute
    share = {p: sum(x.macs for x in layers if x.precision == p) for p in FIELDS}
    total = sum(x.ms for x in layers)
    memory = sum(x.ms for x in layers if x.bound == "memory")
    return Roofline(
        file=str(path),
        batch=graph.batch,
        precision=max(share, key=lambda p: share[p]) if any(share.values()) else wide,  # type: ignore[arg-type]
        macs=sum(x.macs for x in layers),
        moved_bytes=sum(x.moved_bytes for x in layers),
        ms=total,
        floor_ms=max(least, _through_memory(graph, kernels, wide, sheet)),
        bound="memory" if memory > total / 2 else "compute",
        layers=layers,
        notes=_notes(graph, profile, batch),
    )


class _Peaks:
    """Operations per millisecond by precision."""

    def __init__(self, sheet: Datasheet, profile: Profile) -> None:
        self.sheet, self.profile = sheet, profile

    def __getitem__(self, precision: Precision) -> float:
        given = getattr(self.sheet, FIELDS[precision])
        tensor_cores = float(self.profile.compute_capability or 0) >= 8
        if precision == "fp32" and tensor_cores and self.sheet.fp16_tflops:
            # Matrix layers in fp32 run in TF32 there unless they are told not to, at half of fp16's rate.
            given = max(given or 0.0, self.sheet.fp16_tflops / 2)
        if given is None:
            raise UsageError(
                f"the datasheet of {self.profile.name} has no figure for {precision}, in which this file has layers",
                where=f"profile {self.profile.name}: datasheet",
                hint=f"add {FIELDS[precision]} = ..., dense, from the maker's datasheet; or estimate another file",
            )
        return float(given) * 1e9


def _default(graph: Graph, profile: Profile) -> Precision:
    """What 32 bit floats run in. Builders that choose types themselves are given quantized files with fp16 allowed."""
    chooses = profile.tensorrt is not None and not profile.tensorrt.strongly_typed
    quantized = any(node.op_type == QUANTIZE for node in graph.nodes)
    return "fp16" if chooses and quantized and "fp16" in profile.precisions else "fp32"


def _layer(graph: Graph, group: Group, wide: Precision, peaks: _Peaks) -> tuple[Layer, float]:
    """A group's figures, and the least milliseconds that its operations take."""
    bits = 32 if wide == "fp32" else 16
    macs, compute, least = 0, 0.0, 0.0
    kinds: dict[Precision, int] = {}
    for node in group.matrices:
        own, kind = _macs(graph, node), _precision(graph, node, wide, bits)
        ms = 2 * own / peaks[kind]
        macs, compute = macs + own, compute + ms
        least += ms if kind == "int8" else ms / _fast(graph, node)
        kinds[kind] = kinds.get(kind, 0) + own
    moved = [
        sum(n * graph.bits(t, bits) // 8 for t, n in tensors.items())
        for tensors in (group.weights, group.reads, group.writes)
    ]
    memory = sum(moved) / (peaks.sheet.bandwidth_gb_s * 1e6)
    first = next(iter(group.matrices), group.nodes[0])
    layer = Layer(
        name=first.name or first.output[0],
        ops="+".join(node.op_type for node in group.nodes if node.op_type != QUANTIZE) or QUANTIZE,
        precision=max(kinds, key=lambda k: kinds[k]) if kinds else _of_output(graph, group, wide),
        macs=macs,
        weight_bytes=moved[0],
        read_bytes=moved[1],
        written_bytes=moved[2],
        compute_ms=compute,
        memory_ms=memory,
        bound="compute" if compute > memory else "memory",
    )
    return layer, least


def _macs(graph: Graph, node: Any) -> int:
    weight = MATRIX[node.op_type][1]
    if node.op_type == "ConvTranspose":
        return graph.count(node.input[0]) * math.prod(graph.shape(node.input[1])[1:])
    if "Conv" in node.op_type:
        return graph.count(node.output[0]) * math.prod(graph.shape(node.input[weight])[1:])
    given = graph.shape(node.input[0])
    return graph.count(node.output[0]) * (given[0] if attribute(node, "transA", 0) else given[-1])


def _precision(graph: Graph, node: Any, wide: Precision, bits: int) -> Precision:
    """int8 where both sides are integers of eight bits; what the file says of its floats otherwise."""
    sides = [node.input[place] for place in MATRIX[node.op_type][:2]]
    stored = [[graph.weight(s)] if s in graph.constants else graph.stored(s) for s in sides]
    if all(graph.bits(name, bits) == 8 for names in stored for name in names):
        return "int8"
    return _float(graph.element(node.output[0]), wide)


def _float(element: int, wide: Precision) -> Precision:
    kinds: dict[int, Precision] = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    return kinds.get(element, wide)


def _of_output(graph: Graph, group: Group, wide: Precision) -> Precision:
    """Of a group without a matrix layer: what it writes."""
    last = group.nodes[-1]
    return "int8" if last.op_type == QUANTIZE else _float(graph.element(last.output[0]), wide)


def _fast(graph: Graph, node: Any) -> float:
    """How many times fewer multiplications the best known algorithm of a float convolution needs."""
    kernel = graph.shape(node.input[1])[2:] if node.op_type == "Conv" else []
    steps = [*attribute(node, "strides", []), *attribute(node, "dilations", [])]
    if len(kernel) != 2 or any(s != 1 for s in steps):
        return 1.0
    return math.prod(TILE * r / (TILE + r - 1) for r in kernel)


def _through_memory(graph: Graph, kernels: list[Group], wide: Precision, sheet: Datasheet) -> float:
    """Milliseconds for what must come from memory or go there at every call; 0 where the caches are not known."""
    if sheet.cache_mb is None:
        return 0.0
    bits = 32 if wide == "fp32" else 16
    distinct = {t: n for group in kernels for t, n in group.weights.items()}  # each once, however many share it
    distinct |= {t: graph.count(t) for t in graph.ends}
    needed = sum(n * graph.bits(t, bits) // 8 for t, n in distinct.items())
    return max(0.0, needed - sheet.cache_mb * 1e6) / (sheet.bandwidth_gb_s * 1e6)


def _notes(graph: Graph, profile: Profile, batch: int | None) -> list[str]:
    wanted = batch or profile.protocol.batch
    notes = [f"made for a batch of {graph.batch}, not {wanted}"] if graph.batch != wanted else []
    inner = sorted({n.op_type for n in graph.nodes if any(a.HasField("g") or a.graphs for a in n.attribute)})
    notes += [f"what is inside {', '.join(inner)} is not counted"] if inner else []
    uncounted = sorted({n.op_type for n in graph.working()} & {"Einsum", "LSTM", "GRU", "RNN", "Attention"})
    return notes + ([f"operations of {', '.join(uncounted)} are not counted"] if uncounted else [])
