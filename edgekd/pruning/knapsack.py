"""Which steps to take so that the least harm is done within a budget.

A multiple-choice knapsack, as HALP has it (Shen et al. 2022, Structural Pruning via Latency-Saliency Knapsack): each
group of channels chooses how many of them go, each block whether it stays, and what lies in a block that goes costs and
harms nothing of its own. Harm adds up over choices. Cost does not quite: what a layer costs depends on both its sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .costs import Predicted
from .search import Candidate, Positions

__all__ = ["Knapsack", "uniform"]

#: The budget is divided into so many parts; costs are rounded up to whole ones.
PARTS = 4000
SWEEPS, HALVINGS, REFINEMENTS = 8, 40, 4


class Knapsack:
    """Candidates with the harm of each of their steps, and what any setting of them is predicted to cost."""

    def __init__(
        self, candidates: Sequence[Candidate], harm: Mapping[str, Sequence[float]], predicted: Predicted
    ) -> None:
        self.steps = {c.name: len(c.steps) for c in candidates}
        self.harm, self.predicted = harm, predicted
        blocks = [c.name for c in candidates if not c.sizes]
        self.members: dict[str, list[str]] = {block: [] for block in blocks}
        self.free: list[str] = []
        for c in candidates:
            if c.sizes:
                homes = [b for b in blocks if all(path.startswith(f"{b}.") for path in c.group.layers)]
                (self.members[homes[0]] if homes else self.free).append(c.name)

    def solve(self, budget: float) -> dict[str, int] | None:
        """How far each candidate goes; None where even the cheapest setting is predicted above the budget.

        First a Lagrangian: for a price of cost each candidate in turn takes the step of least harm + price x cost, and
        the lowest price that meets the budget is found by bisection. This is right about layers that two groups share,
        and leaves some of the budget. Then dynamic programming over all candidates, with the cost of each step as it is
        beside that setting, spends it, as long as that is an improvement. Deterministic.
        """
        best = self._priced(budget)
        if best is None:
            return None
        for _ in range(REFINEMENTS):
            other = self._spent(best, budget)
            if other is None or self.predicted.total(other) > budget or self.loss(other) >= self.loss(best):
                break
            best = other
        return self._taken_back(best, budget)

    def loss(self, positions: Positions) -> float:
        """The sum of the harm, without that of groups whose block is gone."""
        moot = {name for block, names in self.members.items() if positions[block] for name in names}
        return math.fsum(self.harm[name][position] for name, position in positions.items() if name not in moot)

    def least(self) -> dict[str, int]:
        """Everything that can go is gone."""
        return {name: count - 1 for name, count in self.steps.items()}

    def _priced(self, budget: float) -> dict[str, int] | None:
        nothing = dict.fromkeys(self.steps, 0)
        if self.predicted.total(nothing) <= budget:
            return nothing
        if self.predicted.total(self._cheapest) > budget:
            return None
        low, high = 0.0, min(1e-9, self._highest)
        while self.predicted.total(found := self._at(high)) > budget:
            if high >= self._highest:  # what lies between no price prefers
                return dict(self._cheapest)
            low, high = high, 8 * high
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high) if low else high / 2
            other = self._at(middle)
            if self.predicted.total(other) <= budget:
                high, found = middle, other
            else:
                low = middle
            if low and high / low < 1.001:
                break
        return found

    @cached_property
    def _highest(self) -> float:
        """A price beside which harm does not count, whatever the unit of cost."""
        worst = max((abs(value) for harm in self.harm.values() for value in harm), default=0.0)
        return 1e9 * (1 + worst) / (self.predicted.total({}) or 1.0)

    @cached_property
    def _cheapest(self) -> dict[str, int]:
        """Not always with everything gone: of measured times, some grow where channels go."""
        return min((self.least(), self._at(self._highest)), key=self.predicted.total)

    def _at(self, price: float) -> dict[str, int]:
        now = dict.fromkeys(self.steps, 0)
        for _ in range(SWEEPS):
            before = dict(now)
            for name in self.free:
                self._choose(name, now, price)
            for block, names in self.members.items():
                now[block] = 0
                for name in names:
                    self._choose(name, now, price)
                kept = math.fsum(self.harm[name][now[name]] for name in names)
                kept += price * self.predicted.part(block, now)
                now[block] = 1
                gone = self.harm[block][1] + price * self.predicted.part(block, now)
                now[block] = int(gone < kept)
            if now == before:
                break
        return now

    def _choose(self, name: str, now: dict[str, int], price: float) -> None:
        def value(position: int) -> float:
            return self.harm[name][position] + price * self.predicted.part(name, {**now, name: position})

        now[name] = min(range(self.steps[name]), key=value)

    def _spent(self, around: Positions, budget: float) -> dict[str, int] | None:
        """The best setting by costs as they are around one, with every block in place."""
        base = {**around, **dict.fromkeys(self.members, 0)}
        extra = {name: self._extra(name, base) for name in [*self.free, *(n for m in self.members.values() for n in m)]}
        least = {name: float(costs.min()) for name, costs in extra.items()}
        removal = {b: self.predicted.part(b, {**base, b: 1}) - self.predicted.part(b, base) for b in self.members}
        kept = {b: math.fsum(least[n] for n in names) for b, names in self.members.items()}
        floor = math.fsum(least[n] for n in self.free) + math.fsum(min(removal[b], kept[b]) for b in self.members)
        room = budget - self.predicted.total(base) - floor
        if room < 0:
            return None
        part = room / PARTS or 1.0
        value = np.zeros(PARTS + 1)
        choices: dict[str, NDArray[np.int64]] = {}

        def chosen(name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
            rows = [
                _shifted(value, (costs - least[name]) / part) + harm
                for costs, harm in zip(extra[name].tolist(), self.harm[name], strict=True)
            ]
            choices[name] = np.argmin(rows, axis=0)
            return np.asarray(np.min(rows, axis=0))

        for name in self.free:
            value = chosen(name, value)
        for block, names in self.members.items():
            cheapest = min(removal[block], kept[block])
            stays = _shifted(value, (kept[block] - cheapest) / part)
            for name in names:
                stays = chosen(name, stays)
            goes = _shifted(value, (removal[block] - cheapest) / part) + self.harm[block][1]
            choices[block] = (goes < stays).astype(np.int64)
            value = np.minimum(stays, goes)
        if not math.isfinite(value[-1]):
            return None
        found, left = dict(base), PARTS
        for block, names in reversed(self.members.items()):
            cheapest = min(removal[block], kept[block])
            found[block] = int(choices[block][left])
            if found[block]:
                left -= _parts((removal[block] - cheapest) / part)
                continue
            for name in reversed(names):
                found[name] = int(choices[name][left])
                left -= _parts((extra[name][found[name]] - least[name]) / part)
            left -= _parts((kept[block] - cheapest) / part)
        for name in reversed(self.free):
            found[name] = int(choices[name][left])
            left -= _parts((extra[name][found[name]] - least[name]) / part)
        return found

    def _extra(self, name: str, base: Positions) -> NDArray[np.float64]:
        costs = [self.predicted.part(name, {**base, name: position}) for position in range(self.steps[name])]
        return np.array(costs) - self.predicted.part(name, base)

    def _taken_back(self, positions: dict[str, int], budget: float) -> dict[str, int]:
        """With every step undone that fits, those that harm most first."""
        for name in sorted(positions, key=lambda n: -self.harm[n][positions[n]]):
            while positions[name] and self.predicted.total(back := {**positions, name: positions[name] - 1}) <= budget:
                positions = back
        return positions


def _parts(cost: float) -> int:
    return math.ceil(cost - 1e-9)


def _shifted(value: NDArray[np.float64], cost: float) -> NDArray[np.float64]:
    """What is left of each budget's value after paying a cost, in parts."""
    paid = _parts(cost)
    result = np.full_like(value, np.inf)
    if paid <= PARTS:
        result[paid:] = value[: PARTS + 1 - paid]
    return result


def uniform(candidates: Sequence[Candidate], predicted: Predicted, budget: float) -> dict[str, int] | None:
    """Every group of channels loses the same share, rounded to its steps: the least that meets the budget, or None."""
    groups = [c for c in candidates if c.sizes]
    nothing = dict.fromkeys((c.name for c in candidates), 0)
    for share in sorted({step / len(c.group.units) for c in groups for step in c.steps}):
        wanted = {c.name: share * len(c.group.units) for c in groups}
        positions = {
            c.name: min(range(len(c.steps)), key=lambda p, c=c: abs(c.steps[p] - wanted[c.name]))  # type: ignore[misc]
            for c in groups
        }
        if predicted.total({**nothing, **positions}) <= budget:
            return {**nothing, **positions}
    return None
