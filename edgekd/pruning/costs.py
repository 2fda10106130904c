"""What a network costs when some of it is gone: predicted, layer by layer, from the sizes that remain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .search import Candidate, Positions

__all__ = ["Layer", "Predicted", "counted_layers", "proportional"]


@dataclass(frozen=True)
class Layer:
    """A part of the cost. tensor: that whose dimensions it depends on. cost: dimension -> share that is left -> cost.

    Dimensions that nothing shortens are missing from what `cost` gets.
    """

    tensor: str
    cost: Callable[[Mapping[int, float]], float]


class Predicted:
    """The predicted cost of every setting of some candidates: the sum over the layers that are left."""

    def __init__(self, layers: Sequence[Layer], candidates: Sequence[Candidate]) -> None:
        self.layers = list(layers)
        blocks = [c.name for c in candidates if not c.sizes]
        self._steps = {c.name: c.steps for c in candidates}
        self._within = [[b for b in blocks if layer.tensor.startswith(f"{b}.")] for layer in self.layers]
        self._shares: list[list[tuple[str, int, float]]] = [
            [(c.name, dim, s) for c in candidates for (tensor, dim), s in c.sizes.items() if tensor == layer.tensor]
            for layer in self.layers
        ]
        self._touched: dict[str, list[int]] = {c.name: [] for c in candidates}
        for i, (within, shares) in enumerate(zip(self._within, self._shares, strict=True)):
            for name in dict.fromkeys([*within, *(name for name, _, _ in shares)]):
                self._touched[name].append(i)
        self._known: dict[tuple[int, ...], float] = {}

    def total(self, positions: Positions) -> float:
        """The cost of the whole network."""
        return math.fsum(self._layer(i, positions) for i in range(len(self.layers)))

    def part(self, name: str, positions: Positions) -> float:
        """The cost of the layers that a candidate changes."""
        return math.fsum(self._layer(i, positions) for i in self._touched[name])

    def _layer(self, i: int, positions: Positions) -> float:
        if any(positions.get(block) for block in self._within[i]):
            return 0.0
        shares = self._shares[i]
        key = (i, *(positions.get(name, 0) for name, _, _ in shares))
        if key not in self._known:
            left: dict[int, float] = {}
            for name, dim, share in shares:
                left[dim] = left.get(dim, 1.0) - share * self._steps[name][positions.get(name, 0)]
            self._known[key] = self.layers[i].cost(left)
        return self._known[key]


def proportional(whole: float) -> Callable[[Mapping[int, float]], float]:
    """A cost that is proportional to each dimension."""
    return lambda left: whole * math.prod(left.values())


def counted_layers(network: nn.Module, example: Tensor, measure: str) -> list[Layer]:
    """MACs by module, or parameters or stored bytes ("size") by tensor. network: in evaluation mode."""
    if measure == "macs":
        return [Layer(name, proportional(macs)) for name, macs in _macs(network, example).items()]
    if measure == "parameters":
        return [Layer(name, proportional(float(p.numel()))) for name, p in network.named_parameters()]
    stored = network.state_dict(keep_vars=True)
    layers = []
    for name, tensor in stored.items():
        # The statistics of a norm are as long as its scale.
        scale = f"{name.rpartition('.')[0]}.weight"
        follows = scale in stored and stored[scale].shape == tensor.shape
        layers.append(Layer(scale if follows else name, proportional(float(tensor.numel() * tensor.element_size()))))
    return layers


def _macs(network: nn.Module, example: Tensor) -> dict[str, float]:
    """What each module computes by itself, under the name of its weight (which it may not have: attention)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(example)
    root = type(network).__name__
    flops = {
        name.removeprefix(root).removeprefix("."): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
    own = dict(flops)
    for path in flops:  # the counter gives each module what is within it, too
        parts = path.split(".") if path else []
        above = next((a for n in range(len(parts) - 1, -1, -1) if (a := ".".join(parts[:n])) in flops), None)
        if parts and above is not None:
            own[above] -= flops[path]
    return {f"{path}.weight".lstrip("."): count / 2 for path, count in own.items() if count}
