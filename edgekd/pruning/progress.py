"""Going down to a budget in parts, so that harm is measured beside what is gone already.

Ten blocks of a stage may each be dispensable, and not all ten: the harm of one grows with what else is gone. So a
part of the way is gone at a time (a sixth of the cost), and harm is measured anew for the next (as HALP, and
Molchanov et al. 2019, Importance Estimation, prune a few channels between measurements).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from .blocks import Block
from .budget import Met
from .goal import Goal
from .graph import Edit, merged
from .knapsack import Knapsack
from .search import Candidate, Positions, surgery, without
from .sensitivity import harm

__all__ = ["Progress", "Spent", "spend"]

#: The factor in cost between two measurements of harm, and how many there are at most.
FACTOR, MOST_PARTS = 1.2, 12
#: Steps of a group whose harm is measured each time; those between are interpolated.
POINTS = 6
#: Harm ranks candidates; the order changes little with more images, and each costs a forward pass per candidate.
IMAGES = 128


#: What is being done, how much of it is, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass
class Spent:
    """positions: of the candidates as they were at first. harm: by name, what removal added, or would add in the end.

    met: how the last part ended; no positions where the budget cannot be met.
    """

    met: Met
    positions: dict[str, int]
    harm: dict[str, float] = field(default_factory=dict)


def spend(
    goal: Goal, budget: float, images: Sequence[Tensor], progress: Progress = lambda what, done, total: None
) -> Spent:
    """Take away what harms least, part by part by prediction, and the last one by measurement.

    goal: about the whole network; it is moved along. budget: the share of the reference's cost to come to. progress:
    told what is going on, and how much of it is done.
    """
    whole, first = goal.network, list(goal.candidates)
    at = {c.name: 0 for c in first}
    spent: dict[str, float] = {}
    images = _first(images, IMAGES)
    parts = max(1, min(MOST_PARTS, math.ceil(math.log(max(goal.start / budget, 1.0)) / math.log(FACTOR) - 1e-9)))

    def harms(i: int) -> dict[str, list[float]]:
        told = partial(progress, f"harm, part {i} of {parts}")
        return harm(goal.network, goal.candidates, images, reference=whole, points=POINTS, progress=told)

    for i in range(1, parts):
        measured = harms(i)
        knapsack = Knapsack(goal.candidates, measured, goal.predicted)
        found = knapsack.solve(goal.cost(goal.start * (budget / goal.start) ** (i / parts)))
        if found is None:
            break
        _add(at, spent, found, measured)
        blocks = [c.name for c in first if isinstance(c.group, Block) and at[c.name]]
        goal.go_on(without(whole, first, at), left(first, at), blocks)
    measured = harms(parts)
    knapsack = Knapsack(goal.candidates, measured, goal.predicted)
    met = goal.meet(budget, lambda share: knapsack.solve(goal.cost(share)), knapsack.least())
    if met.positions is not None:
        _add(at, spent, met.positions, measured)
        at = goal.taken_back(budget, first, at)
    for name, values in measured.items():
        spent.setdefault(name, values[-1])
    return Spent(met, at, spent)


def _first(batches: Sequence[Tensor], images: int) -> list[Tensor]:
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch[: images - sum(map(len, found))])
    return [batch for batch in found if len(batch)]


def _add(at: dict[str, int], spent: dict[str, float], found: Positions, harm: Mapping[str, Sequence[float]]) -> None:
    for name, position in found.items():
        if position:
            at[name] += position
            spent[name] = spent.get(name, 0.0) + harm[name][position]


def left(candidates: Sequence[Candidate], positions: Positions) -> list[Candidate]:
    """What may still go of a network from which `positions` of its candidates are gone, as candidates of that one.

    Steps count all units that are gone, those from before too, which are the first step.
    """
    edits, _, removed = surgery(candidates, positions)
    gone: dict[tuple[str, str, object], set[int]] = {}
    for edit in merged(edits):
        gone.setdefault(_place(edit), set()).update(edit.indices)

    def within(path: str) -> bool:
        return any(path == block or path.startswith(f"{block}.") for block in removed)

    def now(edits_of: Callable[[Sequence[int]], tuple[Edit, ...]]) -> Callable[[Sequence[int]], tuple[Edit, ...]]:
        return lambda channels: tuple(
            shifted
            for edit in edits_of(channels)
            if not within(edit.path) and (shifted := _shifted(edit, gone.get(_place(edit), set()))).indices
        )

    found = []
    for c in candidates:
        if isinstance(c.group, Block):
            if c.name not in removed:
                found.append(c)
        elif not all(within(path) for path in c.group.layers):
            group = replace(c.group, edits_of=now(c.group.edits_of))
            found.append(Candidate(group, c.order, c.steps[positions[c.name] :], c.sizes))
    return found


def _place(edit: Edit) -> tuple[str, str, object]:
    return edit.path, edit.handler.__name__, edit.dim


def _shifted(edit: Edit, gone: set[int]) -> Edit:
    """The edit on a tensor of which some slices have gone: those are left out, and later ones have moved up."""
    pairs = [(i - sum(j < i for j in gone), r) for i, r in zip(edit.indices, edit.roots, strict=True) if i not in gone]
    return replace(edit, indices=tuple(i for i, _ in pairs), roots=tuple(r for _, r in pairs))
