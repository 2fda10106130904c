"""Which channels go, so that what remains is measured to be at most the target, and near to it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .graph import ChannelGroup, merged, slices

__all__ = ["Candidate", "choose", "count_macs", "count_parameters", "prunable", "removed_channels", "tensor_costs"]

#: A result is near enough to the budget when it lies less than this share below it.
NEAR = 0.01
#: How many combinations of steps are compared by their predicted costs, and how many of these are then measured.
SETTINGS = 60_000
TRIES = 8
#: Units removed from each candidate, by group name.
Setting = Mapping[str, int]


@dataclass
class Candidate:
    """A group that may be pruned, with its units from the least to the most important.

    steps: how many units may be gone: 0, then whatever leaves a multiple.
    retained: for each of the steps, the share of the group's importance that is left.
    weight: the number of layers that make these channels.
    sizes: (tensor, dimension) -> the share of its length that goes with one unit.
    """

    group: ChannelGroup
    order: list[int]
    steps: list[int]
    retained: list[float]
    weight: int
    sizes: dict[tuple[str, int], float]


def count_macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one forward pass in evaluation mode, as torch's flop counter sees them (2 a MAC)."""
    twin = copy.deepcopy(network).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(example)
    return int(counter.get_total_flops()) // 2


def count_parameters(network: nn.Module) -> int:
    """Numbers in all parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


def prunable(network: nn.Module, group: ChannelGroup, importance: Tensor) -> Candidate:
    """Rank a group's units and list what may be removed of them. importance: float64 [channels]."""
    units = torch.stack([importance[unit].sum() for unit in group.units])
    order = torch.argsort(units, stable=True).tolist()
    count = len(group.units)
    steps = [0, *(count - left for left in range((count - 1) // group.step * group.step, 0, -group.step))]
    cumulated = [0.0, *torch.cumsum(units[order], 0).tolist()]
    total = cumulated[-1] or 1.0
    retained = [1 - cumulated[gone] / total for gone in steps]
    sizes: dict[tuple[str, int], float] = {}
    for edit in merged(group.edits):
        for name, tensor, dim in slices(network, edit):
            sizes[name, dim] = len(edit.indices) / count / tensor.shape[dim]
    weight = len({e.path for e in group.edits if e.produces and e.pruner != "DepthwiseConvPruner"})
    return Candidate(group, order, steps, retained, weight, sizes)


def removed_channels(candidate: Candidate, units: int) -> list[int]:
    """The channels, ascending, that go with the `units` least important units."""
    return sorted(channel for i in candidate.order[:units] for channel in candidate.group.units[i])


def choose(
    candidates: Sequence[Candidate], costs: Mapping[str, float], budget: float, measure: Callable[[Setting], int]
) -> Setting | None:
    """How many units of each candidate go, or None where even the last step of all of them stays above the budget.

    Every layer that makes channels retains a share of their importance; the product of these shares is kept as high
    as a greedy walk can: every step is the one with the least loss of log(product) per cost saved, so that no layer
    is emptied while others stay whole. Where the walk ends is found by bisection on `measure`; `costs` only order it.
    Then steps that still fit are taken back, the most important first. Where the result lies more than NEAR below the
    budget, because few and large steps lead there, other combinations of steps are tried for one that comes nearer.
    So the result never exceeds the budget, and no single step of it could be taken back.
    """
    by_name = {c.group.name: c for c in candidates}
    settings = [dict.fromkeys(by_name, 0)]
    for name, position in _walk(candidates, costs):
        settings.append({**settings[-1], name: position})

    def measured(positions: Mapping[str, int]) -> int:
        return measure({name: by_name[name].steps[position] for name, position in positions.items()})

    low, high = 0, len(settings) - 1
    if measured(settings[high]) > budget:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measured(settings[middle]) <= budget else (middle, high)
    best = _taken_back(settings[high], by_name, budget, measured)
    if measured(best) < (1 - NEAR) * budget:
        best = _taken_back(_nearer(best, by_name, costs, budget, measured), by_name, budget, measured)
    return {name: by_name[name].steps[position] for name, position in best.items()}


def _taken_back(
    positions: dict[str, int], by_name: Mapping[str, Candidate], budget: float, measured: Callable[[Setting], int]
) -> dict[str, int]:
    """The positions with every step undone that fits, those that lose the most importance first."""
    for name in sorted(positions, key=lambda n: -_loss(by_name[n], positions[n] - 1, positions[n])):
        while positions[name] and measured(back := {**positions, name: positions[name] - 1}) <= budget:
            positions = back
    return positions


def _nearer(
    positions: dict[str, int],
    by_name: Mapping[str, Candidate],
    costs: Mapping[str, float],
    budget: float,
    measured: Callable[[Setting], int],
) -> dict[str, int]:
    """The least loss among settings that lie as near to the budget as any, or less than NEAR below it.

    Searched are all settings, or, where these are too many, those one step from `positions` in groups whose steps
    cost differently. Costs are predicted for all of them, and measured for the first few.
    """
    names = list(by_name)
    grid = torch.tensor(list(itertools.product(*_options(positions, by_name, costs))))
    cost = _predicted(grid, by_name, costs)
    start = _predicted(torch.tensor([[positions[name] for name in names]]), by_name, costs)
    now = measured(positions)
    cost += now - start
    loss = torch.zeros(len(grid), dtype=torch.float64)
    for column, c in enumerate(by_name.values()):
        losses = torch.tensor([_loss(c, 0, position) for position in range(len(c.steps))], dtype=torch.float64)
        loss += losses[grid[:, column]]
    fits = (cost <= budget) & (cost > now)
    if bool(fits.any()):
        near = torch.nonzero(fits & (cost >= min(float(cost[fits].max()), (1 - NEAR) * budget))).flatten()
        for row in near[loss[near].argsort(stable=True)][:TRIES].tolist():
            new = dict(zip(names, grid[row].tolist(), strict=True))
            if now < measured(new) <= budget:
                return new
    return positions


def _options(
    positions: Mapping[str, int], by_name: Mapping[str, Candidate], costs: Mapping[str, float]
) -> list[list[int]]:
    """For each candidate the positions to try, SETTINGS combinations at most."""
    everything = {name: list(range(len(c.steps))) for name, c in by_name.items()}
    if math.prod(map(len, everything.values())) <= SETTINGS:
        return list(everything.values())

    def step_cost(name: str) -> float:
        c = by_name[name]
        return c.steps[1] * sum(costs.get(tensor, 0.0) * share for (tensor, _), share in c.sizes.items())

    free = int(math.log(SETTINGS, 3))
    ranked = sorted(by_name, key=step_cost)
    varied = {ranked[i * len(ranked) // free] for i in range(free)}
    return [
        [p for p in (at - 1, at, at + 1) if p in everything[name]] if name in varied else [at]
        for name, at in positions.items()
    ]


def _predicted(grid: Tensor, by_name: Mapping[str, Candidate], costs: Mapping[str, float]) -> Tensor:
    """What the tensors that can shrink cost, each proportional to its dimensions: [settings, groups] -> [settings]."""
    left: dict[str, dict[int, Tensor]] = {}
    for column, c in enumerate(by_name.values()):
        units = torch.tensor(c.steps, dtype=torch.float64)[grid[:, column]]
        for (tensor, dim), share in c.sizes.items():
            dims = left.setdefault(tensor, {})
            dims[dim] = dims.get(dim, torch.ones_like(units)) - share * units
    total = torch.zeros(len(grid), dtype=torch.float64)
    for tensor, dims in left.items():
        total += costs.get(tensor, 0.0) * torch.stack(list(dims.values())).prod(0)
    return total


def _walk(candidates: Sequence[Candidate], costs: Mapping[str, float]) -> list[tuple[str, int]]:
    """(group name, position in its steps), from nothing removed to all that can be."""
    by_name = {c.group.name: c for c in candidates}
    position = dict.fromkeys(by_name, 0)
    left = {key: 1.0 for c in candidates for key in c.sizes}
    dims: dict[str, list[tuple[str, int]]] = {}
    touching: dict[str, set[str]] = {}
    for key in left:
        dims.setdefault(key[0], []).append(key)
    for name, c in by_name.items():
        for tensor, _ in c.sizes:
            touching.setdefault(tensor, set()).add(name)

    def shrunk(c: Candidate) -> dict[tuple[str, int], float]:
        units = c.steps[position[c.group.name] + 1] - c.steps[position[c.group.name]]
        return {key: left[key] - share * units for key, share in c.sizes.items()}

    def price(name: str) -> float:
        c = by_name[name]
        if position[name] + 1 == len(c.steps):
            return math.inf
        after = {**left, **shrunk(c)}
        saved = sum(
            costs.get(tensor, 0.0)
            * (math.prod(left[k] for k in dims[tensor]) - math.prod(after[k] for k in dims[tensor]))
            for tensor in {key[0] for key in c.sizes}
        )
        return _loss(c, position[name], position[name] + 1) / max(saved, 1e-9)

    prices = {name: price(name) for name in by_name}
    walk: list[tuple[str, int]] = []
    while prices and math.isfinite(prices[name := min(prices, key=lambda n: prices[n])]):
        c = by_name[name]
        left.update(shrunk(c))
        position[name] += 1
        walk.append((name, position[name]))
        for other in set().union(*(touching[tensor] for tensor, _ in c.sizes)):
            prices[other] = price(other)
    return walk


def _loss(candidate: Candidate, before: int, after: int) -> float:
    """What going from one position of the steps to a later one takes from the logarithm of the retained share."""
    if before < 0:
        return 0.0
    kept = (max(candidate.retained[before], 1e-12), max(candidate.retained[after], 1e-12))
    return candidate.weight * math.log(kept[0] / kept[1])


def tensor_costs(
    network: nn.Module, example: Tensor, candidates: Sequence[Candidate], measure: str
) -> dict[str, float]:
    """What each tensor that may shrink costs: its parameters, or the MACs of its layer (proportional to its weight)."""
    names = {tensor for c in candidates for tensor, _ in c.sizes}
    if measure == "parameters":
        return {name: float(p.numel()) for name, p in network.named_parameters() if name in names}
    twin = copy.deepcopy(network).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(example)
    root = type(network).__name__
    costs = {}
    for module, flops in counter.get_flop_counts().items():
        path = module.removeprefix(root).removeprefix(".")
        costs[f"{path}.weight" if path else "weight"] = sum(flops.values()) / 2
    return {name: cost for name, cost in costs.items() if name in names}
