"""Meeting a budget that is measured with a solver that predicts: solve, measure, correct, until they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .search import Positions

__all__ = ["Met", "meet"]

#: So many results may turn out too slow when they are measured again, each with more room than the one before.
MISSES = 5
_Tried = dict[tuple[tuple[str, int], ...], float]


@dataclass
class Met:
    """A setting whose measured share of the cost is within the budget; None where none is.

    tried: what was measured, in order: (predicted share, measured share).
    """

    positions: dict[str, int] | None
    share: float
    tried: list[tuple[float, float]] = field(default_factory=list)


def meet(
    budget: float,
    solve: Callable[[float], dict[str, int] | None],
    least: Positions,
    predicted: Callable[[Positions], float],
    measured: Callable[[Positions], float],
    *,
    near: float,
    tries: int,
    twice: bool = False,
) -> Met:
    """The setting with the largest measured share that is at most `budget`, among those that the solver gives.

    All costs are shares of the whole network's. solve: a predicted share -> a setting that keeps it. least: the setting
    in which everything is gone, the last resort; if it is above the budget the result has no positions, and its share.
    Ends when a measured share lies less than `near` (a share of the budget) below the budget, when the predictions that
    are too slow and fast enough have met, or after `tries` measurements, once one was within the budget.
    twice: what is found is measured once more, and that share is the result's, as the largest of several that seemed to
    be within a budget is the luckiest; where it is above the budget after all, the search goes on.
    """
    tried: _Tried = {}
    history: list[tuple[float, float]] = []

    def measure(positions: Positions) -> float:
        share = measured(positions)
        history.append((predicted(positions), share))
        tried[_key(positions)] = share
        return share

    for missed in range(MISSES):
        room = near * (2**missed - 1)
        found = _search((1 - room) * budget, solve, least, predicted, measure, tried, near, tries + 2 * missed)
        if found is None and not missed:
            return Met(None, min(tried.values()), history)
        positions = dict(least) if found is None else found
        share = measure(positions) if twice else tried[_key(positions)]
        if share <= budget:
            return Met(positions, share, history)
        if found is None:
            break
    return Met(None, min(tried.values()), history)


def _key(positions: Positions) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(positions.items()))


def _search(
    budget: float,
    solve: Callable[[float], dict[str, int] | None],
    least: Positions,
    predicted: Callable[[Positions], float],
    measure: Callable[[Positions], float],
    tried: _Tried,
    near: float,
    tries: int,
) -> dict[str, int] | None:
    best: tuple[float, dict[str, int]] | None = None
    aim, good, bad = budget, 0.0, float("inf")
    for _ in range(4 * tries):
        found = solve(aim)
        last = found is None
        positions = dict(least) if found is None else found
        if _key(positions) not in tried:
            if len(tried) >= tries and best is not None:
                break
            measure(positions)
        share = tried[_key(positions)]
        if share <= budget:
            good = max(good, aim)
            if best is None or share > best[0]:
                best = share, positions
            if share >= (1 - near) * budget:
                break
        elif last:
            if best is None:
                return None
            bad = min(bad, aim)
        else:
            bad = min(bad, aim)
        if bad - good < 1e-3 * budget:
            break
        aim = min(aim, predicted(positions)) * budget / share if share > budget else aim * budget / share
        if not good < aim < bad:
            aim = (good + bad) / 2 if bad < float("inf") else 1.1 * good
        if best is None and len(tried) >= tries:
            aim = 0.0  # time to be sure
    return best[1] if best is not None else None
