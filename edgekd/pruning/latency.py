"""A table of what layers take on a profile: measured at some channel counts, interpolated between, kept on disk."""

from __future__ import annotations

import bisect
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..artifact import digest, write_atomically
from ..bench import others_busy
from ..bench.cache import cache_directory, holds_for
from ..bench.env import BUSY
from ..profile import Profile
from .costs import Layer, proportional
from .one_layer import Precision, Shape, measure_layers
from .search import Candidate

__all__ = ["LatencyTable", "timed_layers"]

#: Channel counts at which a layer is measured, along each of its two sides.
ANCHORS = 5
#: Raised when what is measured, or how, changes.
VERSION = 3
#: Seconds for which the machine is looked at before it is called quiet.
LOOK_S = 0.3

Measure = Callable[[Sequence[Shape], Profile, Precision], list[float]]


class _Entry(BaseModel):
    """A layer's time. busy: cores that other programs kept busy while it was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ms: float = Field(gt=0, allow_inf_nan=False)
    measured: str
    busy: float


class LatencyTable:
    """Milliseconds of layers on a profile, measured when they are first asked for.

    One file per machine, versions, precision and what of the profile changes times. What was measured while the machine
    was busy is measured again when it is asked for on a quiet one. A file that cannot be read is measured again; one
    that cannot be written is not kept.
    """

    def __init__(
        self,
        profile: Profile,
        precision: Precision = "fp32",
        *,
        directory: Path | None = None,
        measure: Measure = measure_layers,
    ) -> None:
        self.profile, self.precision, self._measure = profile, precision, measure
        self.about = _about(profile, precision)
        name = f"{profile.runtime}-{precision}-{digest(self.about)[:12]}.json"
        self.file = (directory or cache_directory() / "latency") / name
        self._known = self._read()

    def get(self, shapes: Iterable[Shape]) -> dict[Shape, float]:
        """Milliseconds of each; those that are not known are measured, together."""
        wanted = list(dict.fromkeys(shapes))
        missing = [shape for shape in wanted if str(shape) not in self._known]
        doubtful = [s for s in wanted if s not in missing and self._known[str(s)].busy > BUSY]
        if doubtful and _quiet():
            missing += doubtful
        if missing:
            since = others_busy()
            found = self._measure(missing, self.profile, self.precision)
            about = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "busy": since() or 0.0}
            self._known |= {str(s): _Entry(ms=ms, **about) for s, ms in zip(missing, found, strict=True)}
            self._write()
        return {shape: self._known[str(shape)].ms for shape in wanted}

    def _read(self) -> dict[str, _Entry]:
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            return {str(shape): _Entry.model_validate(entry) for shape, entry in stored["layers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        layers = {shape: entry.model_dump() for shape, entry in {**self._read(), **self._known}.items()}
        content = json.dumps({"about": self.about, "layers": layers}, indent=1, sort_keys=True)
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, content + "\n")


def _about(profile: Profile, precision: Precision) -> dict[str, Any]:
    about = holds_for(profile)
    if precision == "fp32":
        about["profile"]["scheme"] = None
    return {"version": VERSION, "precision": precision, **about}


def _quiet() -> bool:
    since = others_busy()
    time.sleep(LOOK_S)
    return (since() or 0.0) <= BUSY


@dataclass(frozen=True)
class _Seen:
    """A matrix layer in the network: its shape, how often it ran, and the numbers that it gives for one image."""

    shape: Shape
    calls: int
    gives: int


def timed_layers(
    network: nn.Module,
    example: Tensor,
    candidates: Sequence[Candidate],
    table: LatencyTable,
    whole_ms: float,
    multiple: int = 1,
) -> list[Layer]:
    """Every matrix layer of a network by the table, and what the network takes beyond them: `whole_ms` in all.

    The rest (elementwise work, calls, reordering) is shared among the layers by the numbers they give, and shrinks with
    their output channels. Where the table says more than the whole takes, all layers are scaled down to it.
    network: in evaluation mode. multiple: channel counts that the kernels like; there layers are measured.
    """
    seen = _seen(network, example)
    axes = {path: _axes(f"{path}.weight", one.shape, candidates, multiple) for path, one in seen.items()}
    grids = {path: _grid(one.shape, *axes[path]) for path, one in seen.items()}
    ms = table.get(shape for grid in grids.values() for shape in grid.values())
    own = {path: one.calls * ms[grids[path][one.shape.inputs, one.shape.outputs]] for path, one in seen.items()}
    total = sum(own.values())
    scale = min(1.0, whole_ms / total) if total else 1.0
    rest = max(0.0, whole_ms - total)
    given = sum(one.calls * one.gives for one in seen.values()) or 1
    layers = []
    for path, one in seen.items():
        values = {point: one.calls * scale * ms[shape] for point, shape in grids[path].items()}
        share = rest * one.calls * one.gives / given
        layers.append(Layer(f"{path}.weight", _cost(one.shape, axes[path], values, share)))
    if not layers:
        layers.append(Layer("", proportional(whole_ms)))
    return layers


def _seen(network: nn.Module, example: Tensor) -> dict[str, _Seen]:
    found: dict[str, _Seen] = {}

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            earlier = found.get(path)
            gives = int(result[0].numel())
            found[path] = _Seen(_shape(module, args[0]), earlier.calls + 1 if earlier else 1, gives)

        return hook

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    handles = [m.register_forward_hook(look(path)) for path, m in network.named_modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            network(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shape(module: nn.Module, x: Tensor) -> Shape:
    if isinstance(module, nn.Linear):
        return Shape("linear", module.in_features, module.out_features, tuple(x.shape[1:-1]))
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    kernel = tuple(module.kernel_size)
    padding = module.padding
    if isinstance(padding, str):
        padding = tuple(
            0 if padding == "valid" else d * (k - 1) // 2 for k, d in zip(kernel, module.dilation, strict=True)
        )
    return Shape(
        "conv",
        module.in_channels,
        module.out_channels,
        tuple(x.shape[2:]),
        kernel,
        tuple(module.stride),
        tuple(padding),
        tuple(module.dilation),
        module.groups,
    )


def _axes(tensor: str, shape: Shape, candidates: Sequence[Candidate], multiple: int) -> tuple[list[int], list[int]]:
    """Input and output counts at which to measure, ascending: from the fewest that may remain to all."""
    lost = {0: 0.0, 1: 0.0}
    for c in candidates:
        for (name, dim), share in c.sizes.items():
            if name == tensor and dim in lost:
                lost[dim] += share * c.steps[-1]
    outputs = _anchors(shape.outputs, lost[0], multiple)
    if shape.groups > 1:  # depthwise: both sides are one
        return outputs, outputs
    return _anchors(shape.inputs, lost[1], multiple), outputs


def _anchors(whole: int, lost: float, multiple: int) -> list[int]:
    least = max(1, round(whole * (1 - lost)))
    if least >= whole:
        return [whole]
    points = {least, whole}
    for i in range(1, ANCHORS - 1):
        point = round((least + (whole - least) * i / (ANCHORS - 1)) / multiple) * multiple
        if least < point < whole:
            points.add(point)
    return sorted(points)


def _grid(shape: Shape, inputs: Sequence[int], outputs: Sequence[int]) -> dict[tuple[int, int], Shape]:
    if shape.groups == 1:
        return {(i, o): replace(shape, inputs=i, outputs=o) for i in inputs for o in outputs}
    if shape.groups == shape.inputs == shape.outputs:
        return {(n, n): replace(shape, inputs=n, outputs=n, groups=n) for n in outputs}
    return {(shape.inputs, shape.outputs): shape}


def _cost(
    shape: Shape, axes: tuple[list[int], list[int]], values: Mapping[tuple[int, int], float], rest: float
) -> Callable[[Mapping[int, float]], float]:
    def cost(left: Mapping[int, float]) -> float:
        low, high, at = _between(axes[1], shape.outputs * left.get(0, 1.0))
        if len(values) == 1:
            (taken,) = values.values()
        elif shape.groups > 1:
            taken = (1 - at) * values[low, low] + at * values[high, high]
        else:
            under, over, up = _between(axes[0], shape.inputs * left.get(1, 1.0))
            taken = (1 - up) * ((1 - at) * values[under, low] + at * values[under, high])
            taken += up * ((1 - at) * values[over, low] + at * values[over, high])
        return taken + rest * left.get(0, 1.0)

    return cost


def _between(points: Sequence[int], x: float) -> tuple[int, int, float]:
    """The two neighbours of x among the points, and where between them it lies."""
    place = bisect.bisect_left(points, x - 1e-6)
    if place == 0:
        return points[0], points[0], 0.0
    if place == len(points):
        return points[-1], points[-1], 0.0
    low, high = points[place - 1], points[place]
    return low, high, (x - low) / (high - low)
