"""What one layer takes in a runtime: files with a single matrix layer, timed against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..bench.measure import pinned, quiet
from ..bench.side_by_side import noise
from ..profile import Profile
from ..quant.scheme import scheme_named
from ..runtimes import open_for

__all__ = ["Precision", "Shape", "layer_file", "measure_layers"]

Precision = Literal["fp32", "int8"]
#: A layer's time is what so many copies on one input take beyond one of them, by copy: calls, and the reordering of
#: inputs and outputs, which a layer within a network does not pay, fall out.
COPIES = 3
ROUNDS, BLOCK_S, MIN_CALLS = 7, 0.002, 5
#: So many files are open at a time, and measured interleaved.
TOGETHER = 64


@dataclass(frozen=True)
class Shape:
    """A matrix layer with its channels. size: [H, W] of a convolution's input, the tokens of a linear layer's ([] for
    one row an image). groups: those of the convolution; a depthwise one has as many as channels."""

    kind: Literal["conv", "linear"]
    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __str__(self) -> str:
        size = "x".join(map(str, self.size)) or "1"
        if self.kind == "linear":
            return f"linear {size} {self.inputs}>{self.outputs}"
        kernel, stride, padding, dilation = (
            "x".join(map(str, v)) for v in (self.kernel, self.stride, self.padding, self.dilation)
        )
        return f"conv {size} {self.inputs}>{self.outputs} k{kernel} s{stride} p{padding} d{dilation} g{self.groups}"


def measure_layers(shapes: Sequence[Shape], profile: Profile, precision: Precision) -> list[float]:
    """Milliseconds of each layer in the profile's runtime, for its batch: medians over rounds, interleaved.

    Raises UsageError or StageError where the runtime does not take a file.
    """
    found: list[float] = []
    for start in range(0, len(shapes), TOGETHER // 2):
        found += _measured(shapes[start : start + TOGETHER // 2], profile, precision)
    return found


def _measured(shapes: Sequence[Shape], profile: Profile, precision: Precision) -> list[float]:
    calls: list[tuple[Callable[[], None], Callable[[], None]]] = []
    sessions = []
    where = f"profile {profile.name}: affinity"
    with TemporaryDirectory() as directory, pinned(profile.affinity, where), quiet():
        try:
            for i, shape in enumerate(shapes):
                pair = []
                for copies in (1, COPIES):
                    file = Path(directory) / f"{i}-{copies}.onnx"
                    file.write_bytes(layer_file(shape, copies, profile, precision).SerializeToString())
                    session = open_for(file, profile)
                    sessions.append(session)
                    pair.append(session.bound(noise(session, profile.protocol.batch)))
                calls.append((pair[0], pair[1]))
            counts = [max(MIN_CALLS, round(BLOCK_S / max(_once(many), 1e-7))) for _, many in calls]
            rounds = []
            for _ in range(ROUNDS):
                rounds.append([_block(b, n) - _block(a, n) for (a, b), n in zip(calls, counts, strict=True)])
        finally:
            for session in sessions:
                session.close()
    # Below a tenth of a microsecond it is noise.
    return [max(float(ms) / (COPIES - 1), 1e-4) for ms in np.median(rounds, axis=0)]


def _once(call: Callable[[], None]) -> float:
    taken = []
    for _ in range(4):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _block(call: Callable[[], None], count: int) -> float:
    """The median of consecutive calls, in ms, after a few that refill the caches."""
    for _ in range(2):
        call()
    taken = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - begin)
    return float(np.median(taken)) / 1e6


def layer_file(shape: Shape, copies: int, profile: Profile, precision: Precision) -> onnx.ModelProto:
    """`copies` of the layer on one input, added up. Both files of a pair have the same additions, except for those
    that a float convolution absorbs."""
    graph = _Graph(profile if precision == "int8" else None)
    batch = "batch"  # left open, as in an exported file: what the runtime fuses depends on it
    if shape.kind == "conv":
        dims = [batch, shape.inputs, *shape.size]
        weight = (shape.outputs, shape.inputs // shape.groups, *shape.kernel)
    else:
        dims = [batch, *shape.size, shape.inputs]
        weight = (shape.outputs, shape.inputs)
    x = graph.activation("image")
    parts = [_layer(graph, shape, x, weight, i) for i in range(copies)]
    absorbed = precision == "fp32" and shape.kind == "conv"
    total = parts[0]
    for i in range(1, copies if absorbed else COPIES):
        total = graph.add("Add", total, parts[i] if i < copies else total, quantized=shape.kind == "conv")
    graph.nodes.append(helper.make_node("Identity", [total], ["out"]))
    made = helper.make_graph(
        graph.nodes,
        "layer",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        graph.tensors,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", profile.opset)])
    model.ir_version = 10
    return model


def _layer(graph: _Graph, shape: Shape, x: str, weight: tuple[int, ...], copy: int) -> str:
    if shape.kind == "linear":
        # As the exporter writes them: what the runtime fuses depends on it.
        w = graph.weight(weight, copy)
        if not shape.size:
            return graph.add("Gemm", x, w, graph.bias(shape.outputs), quantized=False, transB=1)
        product = graph.add("MatMul", x, graph.add("Transpose", w, quantized=False, perm=[1, 0]), quantized=False)
        return graph.add("Add", product, graph.tensor(np.zeros(shape.outputs, np.float32)), quantized=False)
    settings = {
        "kernel_shape": list(shape.kernel),
        "strides": list(shape.stride),
        "pads": list(shape.padding) * 2,
        "dilations": list(shape.dilation),
        "group": shape.groups,
    }
    return graph.add("Conv", x, graph.weight(weight, copy), quantized=True, **settings)


class _Graph:
    """Nodes and tensors of a file; with a profile, quantized as its scheme wants it."""

    def __init__(self, profile: Profile | None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.scheme = scheme_named(profile.scheme, "profile.scheme") if profile is not None else None

    def name(self) -> str:
        return f"v{len(self.nodes)}_{len(self.tensors)}"

    def tensor(self, values: np.ndarray) -> str:  # type: ignore[type-arg]
        name = f"{self.name()}c"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, dims: tuple[int, ...], seed: int) -> str:
        """Weights of one copy, outputs first; other ones for each, or the runtime would compute them once."""
        rng = np.random.default_rng(seed)
        if self.scheme is None:
            return self.tensor((rng.standard_normal(dims) / max(dims)).astype(np.float32))
        values = self.tensor(rng.integers(-64, 64, dims).astype(np.int8))
        scales = rng.uniform(1e-3, 2e-3, dims[0]).astype(np.float32)
        return self._dequantized(values, scales, np.int8)

    def bias(self, count: int) -> str:
        """Zeros, in the integers of a product where there is a scheme."""
        if self.scheme is None:
            return self.tensor(np.zeros(count, np.float32))
        return self._dequantized(self.tensor(np.zeros(count, np.int32)), np.full(count, 1e-5, np.float32), np.int32)

    def _dequantized(self, values: str, scales: np.ndarray, dtype: type) -> str:  # type: ignore[type-arg]
        parts = [values, self.tensor(scales), self.tensor(np.zeros(len(scales), dtype))]
        self.nodes.append(helper.make_node("DequantizeLinear", parts, [out := self.name()], axis=0))
        return out

    def activation(self, value: str) -> str:
        """The value through a Q/DQ pair where there is a scheme."""
        if self.scheme is None:
            return value
        unsigned = self.scheme.activation_dtype == "uint8"
        zero = self.tensor(np.array(128 if unsigned else 0, np.uint8 if unsigned else np.int8))
        scale = self.tensor(np.array(0.02, np.float32))
        self.nodes.append(helper.make_node("QuantizeLinear", [value, scale, zero], [quantized := self.name()]))
        self.nodes.append(helper.make_node("DequantizeLinear", [quantized, scale, zero], [out := self.name()]))
        return out

    def add(self, kind: str, *inputs: str, quantized: bool, **settings: object) -> str:
        """A node; its output is quantized where the scheme quantizes outputs."""
        self.nodes.append(helper.make_node(kind, list(inputs), [out := self.name()], **settings))
        wanted = quantized and self.scheme is not None and self.scheme.placement == "onnxruntime"
        return self.activation(out) if wanted else out
