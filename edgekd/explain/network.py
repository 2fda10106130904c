"""The error that quantization makes in each layer of a fake-quantized network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from .. import quant
from ..artifact import Artifact
from ..data import Dataset
from ..quant.fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from ..quant.graph import MATRIX, attribute, operation, users
from ..stages.export import normalised
from ..stages.workspace import load_prepared

__all__ = ["LayerError", "errors_of", "output_sqnr"]

IMAGES, BATCH = 256, 64
WEIGHTED = MATRIX | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
#: Between a layer and the Q that its output has in integers.
FOLLOWING = {"batch_norm", "relu", "relu6", "hardtanh", "clamp"}


@dataclass(frozen=True)
class LayerError:
    """One product of the network. SQNR in dB; None where nothing is quantized, or there are no images."""

    path: str
    operation: str
    weighted: bool
    reason: str
    weight_sqnr_db: float | None
    output_sqnr_db: float | None

    @property
    def products(self) -> int:
        """Matrix products that an exported file has in its place."""
        return 2 if self.operation == "scaled_dot_product_attention" else 1


def errors_of(artifact: Artifact, data: Dataset | None) -> list[LayerError]:
    """Every product of a `quantize` artifact in the order of execution. Raises ArtifactError or StageError."""
    prepared = load_prepared(artifact).eval()
    placed = quant.placements(prepared)
    found: dict[Node, float | None] = {}
    if data is not None:
        images = normalised(data.train.images[:IMAGES], data)
        found = output_sqnr(prepared, [p.node for p in placed], images)
    return [
        LayerError(
            p.path, p.operation, p.operation in WEIGHTED, p.reason, _weight_sqnr(prepared, p.node), found.get(p.node)
        )
        for p in placed
    ]


def output_sqnr(prepared: nn.Module, layers: Sequence[Node], images: Tensor) -> dict[Node, float | None]:
    """SQNR in dB of each layer's output behind its batch norm, ReLU and Q, with all layers quantized against none.

    10 log10(sum f^2 / sum (f - q)^2) over images [N, C, H, W], with the same weights in both. None without noise.
    """
    module: Any = prepared
    graph = module.network
    points = {layer: _point(graph, layer) for layer in layers}
    signal: dict[Node, float] = defaultdict(float)
    noise: dict[Node, float] = defaultdict(float)
    quantizers = [m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize | WeightPerChannelFakeQuantize)]
    before = [m.quantizes for m in quantizers]
    prepared.eval()
    try:
        for batch in images.split(BATCH):
            for m in quantizers:
                m.enable_fake_quant(False)
            reference = _values(graph, set(points.values()), batch)
            for m, old in zip(quantizers, before, strict=True):
                m.enable_fake_quant(old)
            values = _values(graph, set(points.values()), batch)
            for layer, point in points.items():
                signal[layer] += reference[point].double().square().sum().item()
                noise[layer] += (reference[point].double() - values[point].double()).square().sum().item()
    finally:
        for m, old in zip(quantizers, before, strict=True):
            m.enable_fake_quant(old)
    return {x: 10 * math.log10(signal[x] / noise[x]) if signal[x] > 0 and noise[x] > 0 else None for x in layers}


def _values(graph: Any, wanted: set[Node], batch: Tensor) -> dict[Node, Tensor]:
    found: dict[Node, Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node in wanted:
                found[node] = value
            return value

    with torch.no_grad():
        Recorder(graph).run(batch)
    return found


def _point(graph: Any, layer: Node) -> Node:
    """Where a layer's output is looked at: behind what the runtime computes with it, and its Q if it has one."""
    node = layer
    for following in _chain(layer):
        node = following
    quantizer = next((u for u in users(node) if u.op == "call_module" and _observes(graph, u)), None)
    return quantizer if quantizer is not None else node


def _chain(node: Node) -> Iterator[Node]:
    while len(following := users(node)) == 1 and operation(following[0]) in FOLLOWING:
        node = following[0]
        yield node


def _observes(graph: Any, node: Node) -> bool:
    return isinstance(graph.get_submodule(str(node.target)), ActivationFakeQuantize)


def _weight_sqnr(prepared: nn.Module, node: Node) -> float | None:
    module: Any = prepared
    weight = node.args[1] if operation(node) in MATRIX else None
    if not isinstance(weight, Node) or weight.op != "call_module":
        return None
    value = attribute(module.network, weight.args[0]).detach()
    with torch.no_grad():
        error = (value - module.network.get_submodule(str(weight.target))(value)).double().square().sum().item()
    signal = value.double().square().sum().item()
    return 10 * math.log10(signal / error) if signal > 0 and error > 0 else None
