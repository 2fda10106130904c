"""How much each layer suffers from int8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Node

from .fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from .placed import Placement, placements
from .prepared import Prepared, as_prepared, floating

__all__ = ["harms", "switches"]


def harms(prepared: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """By layer: how far the answers move if it alone is quantized, its input and weight and a convolution's output.

    Kullback-Leibler divergence of the class probabilities from the float network's, mean over images [N, C, H, W] of
    `batches`, in nats. `prepared` is calibrated, and left as it is.
    """
    network = as_prepared(prepared)
    found = {}
    with floating(network):
        wanted = [_log_probabilities(network, batch) for batch in batches]
        for path, switch in switches(network).items():
            switch(True)
            parts = [p.exp() * (p - _log_probabilities(network, b)) for p, b in zip(wanted, batches, strict=True)]
            switch(False)
            found[path] = max(float(torch.cat(parts).sum(1).mean()), 0.0)
    return found


def switches(prepared: nn.Module) -> dict[str, Callable[[bool], None]]:
    """By layer, in the order in which they run: what quantizes it, or not: its input and weight and a convolution's
    output."""
    network = as_prepared(prepared)
    by_path: dict[str, list[nn.Module]] = {}
    for place in placements(network):
        if place.quantized:
            by_path.setdefault(place.path, []).extend(_around(network, place))
    return {path: partial(_switch, modules) for path, modules in by_path.items()}


@torch.no_grad()
def _log_probabilities(prepared: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = prepared(images)["logits"]
    return logits.double().log_softmax(1)


def _switch(modules: Iterable[nn.Module], enabled: bool) -> None:
    for module in modules:
        module.quantizes = enabled  # type: ignore[assignment]


def _around(prepared: Prepared, place: Placement) -> list[nn.Module]:
    """The fake-quantize modules at a layer: of its input and weight, and of its output where that is quantized."""
    nodes = [argument for argument in place.node.args[:2] if isinstance(argument, Node)]
    behind = place.node
    while len(behind.users) == 1 and next(iter(behind.users)).op != "output":
        behind = next(iter(behind.users))
        if behind.op == "call_module":
            nodes += [behind] if place.operation != "linear" else []
            break
    modules = [prepared.network.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    return [m for m in modules if isinstance(m, ActivationFakeQuantize | WeightPerChannelFakeQuantize)]
