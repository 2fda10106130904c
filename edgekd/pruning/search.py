"""What may be removed of a network, step by step, and what remains when some of it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models import count
from .blocks import Block
from .clone import clone
from .graph import ChannelGroup, Edit, apply, merged, slices

__all__ = [
    "Candidate",
    "Positions",
    "block_candidate",
    "count_bytes",
    "count_macs",
    "count_parameters",
    "prunable",
    "removed_channels",
    "surgery",
    "without",
]

#: How far each candidate has gone in its steps, by name.
Positions = Mapping[str, int]


@dataclass
class Candidate:
    """A group or block that may be pruned, with its units from the least to the most important.

    steps: how many units may be gone: 0, then whatever leaves a multiple; of a block 0 and 1.
    sizes: (tensor, dimension) -> the share of its length that goes with one unit.
    """

    group: ChannelGroup | Block
    order: list[int]
    steps: list[int]
    sizes: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.group.name


def count_macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image's forward pass, those of attention included. example: [N, C, H, W]."""
    return count(network, example.shape[1:])[1]


def count_parameters(network: nn.Module) -> int:
    """Numbers in all parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_bytes(network: nn.Module) -> int:
    """Bytes of all tensors that are stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def prunable(network: nn.Module, group: ChannelGroup, importance: Tensor) -> Candidate:
    """Rank a group's units and list what may be removed of them. importance: float64 [channels]."""
    units = torch.stack([importance[unit].sum() for unit in group.units])
    order = torch.argsort(units, stable=True).tolist()
    count = len(group.units)
    steps = [0, *(count - left for left in range((count - 1) // group.step * group.step, 0, -group.step))]
    sizes: dict[tuple[str, int], float] = {}
    for edit in merged(group.edits):
        for name, tensor, dim in slices(network, edit):
            sizes[name, dim] = len(edit.indices) / count / tensor.shape[dim]
    return Candidate(group, order, steps, sizes)


def block_candidate(block: Block) -> Candidate:
    """A block as what may be pruned: it stays or goes."""
    return Candidate(block, [0], [0, 1])


def removed_channels(candidate: Candidate, units: int) -> list[int]:
    """The channels, ascending, that go with the `units` least important units."""
    return sorted(channel for i in candidate.order[:units] for channel in candidate.group.units[i])


def surgery(
    candidates: Sequence[Candidate], positions: Positions
) -> tuple[list[Edit], dict[str, dict[str, Any]], list[str]]:
    """Edits, attributes and removed blocks of what is gone: the arguments of `apply`."""
    edits: list[Edit] = []
    attributes: dict[str, dict[str, Any]] = {}
    removed: list[str] = []
    for c in candidates:
        units = c.steps[positions.get(c.name, 0)]
        if units and isinstance(c.group, Block):
            removed.append(c.name)
        elif units:
            edits += c.group.edits_of(removed_channels(c, units))
            attributes |= c.group.attributes(units)
    return edits, attributes, removed


def without(network: nn.Module, candidates: Sequence[Candidate], positions: Positions) -> nn.Module:
    """A copy of the network with what is gone removed."""
    twin = clone(network)
    apply(twin, *surgery(candidates, positions))
    return twin
