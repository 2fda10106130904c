"""What ONNX Runtime makes of each matrix layer on this machine: the kernel, its time, and the shapes that pass it."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from ..bench import noise
from ..bench.layers import operator_times
from ..bench.results import LayerTime
from ..errors import EdgekdError, StageError
from ..runtimes import Feed, open_session
from ..runtimes.optimised import FLOAT_KERNELS, INTEGER_KERNELS, optimised_graph
from .constants import Graph, attribute
from .reading import tag, tagged
from .stored import StoredLayer

__all__ = ["Kernel", "Ran", "macs_of", "run_layers"]

WEIGHT_ONLY = {"MatMulNBits"}
#: How far behind a layer the operator may stand whose name its kernel gets.
FARTHEST = 8


@dataclass(frozen=True)
class Kernel:
    """What runs in a layer's place. precision: int8, float, or wN: weights of N bits, multiplied in float."""

    op: str
    precision: str
    ms: float | None = None


@dataclass
class Ran:
    """Kernels and output shapes by the layer's index in the graph, and the time of every operator."""

    kernels: dict[int, Kernel] = field(default_factory=dict)
    shapes: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    operators: list[LayerTime] = field(default_factory=list)
    problem: str | None = None


def run_layers(path: Path, model: onnx.ModelProto, graph: Graph, layers: Sequence[StoredLayer], threads: int) -> Ran:
    """Optimise, match and time, on random inputs with one image. What cannot run has the runtime's words in `problem`.

    Raises StageError when ONNX Runtime cannot load the file.
    """
    with tempfile.TemporaryDirectory() as directory:
        named = Path(directory) / "tagged.onnx"
        file = named if tagged(model, named) else path
        ran = Ran()
        try:
            optimised = optimised_graph(file).node
        except StageError as error:
            raise StageError(_readable(error.problem.what, graph, named, path), where=str(path)) from error
        kernels = [n for n in optimised if n.op_type in INTEGER_KERNELS | FLOAT_KERNELS | WEIGHT_ONLY]
        matched = _matched(kernels, graph, layers)
        try:
            session = open_session(file, threads=threads)
            feed = noise(session, 1)
            session.close()
            ran.operators = operator_times(file, feed, threads)
            ran.shapes = _shapes(file, feed, layers)
        except EdgekdError as error:
            ran.problem = _readable(error.problem.what, graph, named, path)
    times = {(t.name, t.op): t.ms for t in ran.operators}
    for index, nodes in matched.items():
        ms = [times[n.name, n.op_type] for n in nodes if (n.name, n.op_type) in times]
        ran.kernels[index] = Kernel(nodes[0].op_type, _precision(nodes), sum(ms) if ms else None)
    return ran


def _readable(text: str, graph: Graph, named: Path, path: Path) -> str:
    """The runtime's words with the file's own names."""

    def own(found: re.Match[str]) -> str:
        node = graph.nodes[int(found[1])]
        return str(node.name or node.op_type)

    return re.sub(r"edgekd(\d{6})node(?:_token_\d+)?", own, text.replace(str(named), str(path)))


def _precision(nodes: Sequence[Any]) -> str:
    kinds = {n.op_type for n in nodes}
    if kinds & WEIGHT_ONLY:
        return f"w{attribute(nodes[0], 'bits', 4)}"
    return "int8" if kinds <= INTEGER_KERNELS else "float"


def _matched(kernels: Sequence[Any], graph: Graph, layers: Sequence[StoredLayer]) -> dict[int, list[Any]]:
    """Layer index -> its kernels: by number in the kernel's name, or by the tensor that it gives."""
    ours = {layer.index: layer for layer in layers}
    numbers = {id(node): index for index, node in enumerate(graph.nodes)}
    names = {tag(index): index for index in ours} | {layer.node.name: i for i, layer in ours.items() if layer.node.name}
    found: dict[int, list[Any]] = {}
    late = []
    for kernel in kernels:
        hit = re.search(r"edgekd\d{6}node", kernel.name)
        index = names.get(hit[0] if hit else re.sub(r"_token_\d+$", "", kernel.name))
        if index is None:
            late.append(kernel)
        else:
            found.setdefault(index, []).append(kernel)
    for kernel in late:
        tensors = [re.sub(r"_nchwc(_token_\d+)?$", "", kernel.name), *kernel.output]
        index = next((i for t in tensors if (i := _behind(t, graph, numbers, ours, found)) is not None), None)
        if index is not None:
            found.setdefault(index, []).append(kernel)
    return found


def _behind(
    tensor: str, graph: Graph, numbers: dict[int, int], ours: dict[int, StoredLayer], taken: dict[int, list[Any]]
) -> int | None:
    """The nearest layer in front of a tensor that has no kernel yet."""
    front, seen = [tensor], {tensor}
    for _ in range(FARTHEST):
        nodes = [graph.producer[name] for name in front if name in graph.producer]
        for node in nodes:
            if numbers[id(node)] in ours and numbers[id(node)] not in taken:
                return numbers[id(node)]
        front = [i for n in nodes if numbers[id(n)] not in ours for i in n.input if i and i not in seen]
        seen.update(front)
    return None


def _shapes(file: Path, feed: Feed, layers: Sequence[StoredLayer]) -> dict[int, tuple[list[int], list[int]]]:
    """(shape of the first input, of the first output) of each layer, seen in one call of the graph as it is stored."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory) / "shapes")
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        except Exception:  # shapes are an extra: what is wrong was said where the file was timed
            return {}
    found = {}
    by_name = {tag(layer.index): layer.index for layer in layers} | {x.node.name: x.index for x in layers}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"] and name in by_name:
            shapes = [next(iter(event["args"][key][0].values())) for key in ("input_type_shape", "output_type_shape")]
            found[by_name[name]] = (shapes[0], shapes[1])
    return found


def macs_of(layer: StoredLayer, shapes: tuple[list[int], list[int]] | None) -> int | None:
    """Multiply-accumulates of one call; None where shapes are not known, or the operator is more than a product."""
    if shapes is None:
        return None
    given, made = shapes
    if layer.op == "ConvTranspose" and layer.weight_shape:
        return math.prod(given) * math.prod(layer.weight_shape[1:])
    if "Conv" in layer.op and layer.weight_shape:
        return math.prod(made) * math.prod(layer.weight_shape[1:])
    if "MatMul" in layer.op or "Gemm" in layer.op:
        return math.prod(made) * (given[0] if attribute(layer.node, "transA", 0) else given[-1])
    return None
