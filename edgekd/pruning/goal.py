"""A target as something that can be predicted, measured and met."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..bench import Interval
from ..errors import UsageError
from .budget import Met, meet
from .costs import Layer, Predicted, counted_layers
from .plan import LatencyPlan, LatencyTarget, Target
from .search import Candidate, Positions, count_bytes, count_macs, count_parameters, without

__all__ = ["Compared", "Counted", "Goal", "Task", "Timed", "Timing", "goal_of"]

#: A result is near enough to a budget of what is counted when it lies less than this share below it; of what is timed,
#: which is measured less exactly and each time at a price.
NEAR_COUNTED, NEAR_TIMED = 0.005, 0.02
MOST_COUNTS, MOST_TIMINGS = 24, 6

Solve = Callable[[float], dict[str, int] | None]


@dataclass(frozen=True)
class Compared:
    """Milliseconds of a call before and after, and before / after, paired by round."""

    before: Interval
    after: Interval
    speedup: Interval


@dataclass(frozen=True)
class Timing:
    """How latency on a profile is predicted and measured.

    layers: every matrix layer of a network (in evaluation mode) in ms, given its candidates and an example.
    compare: the original and a pruned network, measured side by side.
    """

    profile: str
    layers: Callable[[nn.Module, Tensor, Sequence[Candidate]], list[Layer]]
    compare: Callable[[nn.Module, nn.Module], Compared]


@dataclass(frozen=True)
class Task:
    """What is to be pruned. reference: the network of which the target is a share; network: what is left of it.

    part: how much of the way to the target is to be gone, geometrically, in (0, 1]: 1 is all of it.
    """

    reference: nn.Module
    network: nn.Module
    example: Tensor
    candidates: Sequence[Candidate]
    part: float


class _Goal:
    """predicted: the cost of a setting; start: the network's share of its reference, as measured."""

    def __init__(self, task: Task, layers: Sequence[Layer]) -> None:
        self.task = task
        self.predicted = Predicted(layers, task.candidates)
        self._whole = self.predicted.total({})
        self.start = 1.0

    def cost(self, share: float) -> float:
        """The predicted cost that stands for a share of the reference."""
        return share / self.start * self._whole

    def _share(self, positions: Positions) -> float:
        return self.start * self.predicted.total(positions) / self._whole

    def _within_reach(self, final: float, least: Positions, measured: Callable[[Positions], float]) -> Met | None:
        """A first part is not gone where the way leads nowhere."""
        if self.task.part < 1 and (share := measured(least)) > final:
            return Met(None, share)
        return None


class Counted(_Goal):
    """A share of MACs, parameters or bytes."""

    def __init__(self, task: Task, target: Target) -> None:
        super().__init__(task, counted_layers(task.network, task.example, target.measure))
        self.target = target
        self.whole = self._count(task.reference)
        self.start = self._count(task.network) / self.whole

    def meet(self, solve: Solve, least: Positions) -> Met:
        """The setting that comes nearest, none of whose steps could be taken back."""
        if unmet := self._within_reach(self.target.share, least, self._measured):
            return unmet
        budget = self.target.share**self.task.part
        met = meet(budget, solve, least, self._share, self._measured, near=NEAR_COUNTED, tries=MOST_COUNTS)
        if met.positions is not None:
            positions = dict(met.positions)
            for name in positions:
                while positions[name] and self._measured(back := {**positions, name: positions[name] - 1}) <= budget:
                    positions = back
            met.positions, met.share = positions, self._measured(positions)
        return met

    def unreachable(self, met: Met, prunable: str, hint: str) -> UsageError:
        """What is the nearest."""
        measure = self.target.measure
        # Rounded up, so that asking for the number that is shown succeeds.
        least = math.ceil(met.share * 1e4) / 1e4
        return UsageError(
            f"{self.target.share:g} cannot be reached: at least {least:.4f} of the {measure} remain "
            f"when everything that can be pruned is ({prunable})",
            where=f"target.{measure}",
            hint=hint,
        )

    def latency(self) -> None:
        """Nothing was timed."""

    def _measured(self, positions: Positions) -> float:
        return self._count(without(self.task.network, self.task.candidates, positions)) / self.whole

    def _count(self, network: nn.Module) -> int:
        if self.target.measure == "macs":
            return count_macs(network, self.task.example)
        return count_parameters(network) if self.target.measure == "parameters" else count_bytes(network)


class Timed(_Goal):
    """A latency. The table says what layers take; what is between them is the rest of the whole network's time."""

    def __init__(self, task: Task, target: LatencyTarget, timing: Timing) -> None:
        super().__init__(task, timing.layers(task.network, task.example, task.candidates))
        self.target, self.timing = target, timing
        self.compared: dict[tuple[int, ...], Compared] = {}
        self.wanted = target.speedup or 0.0
        self.met: Met | None = None

    def meet(self, solve: Solve, least: Positions) -> Met:
        """The slowest setting that is measured to be fast enough."""
        nothing = dict.fromkeys(least, 0)
        if self.task.network is not self.task.reference or self.target.p50_ms is not None:
            untouched = self._compare(nothing)
            self.start = 1 / untouched.speedup.value
            if self.target.p50_ms is not None:
                self.wanted = untouched.before.value / self.target.p50_ms
        if self.wanted * self.start <= 1:  # it is fast enough as it is
            self.met = Met(nothing, self.start)
            return self.met
        self.met = self._within_reach(1 / self.wanted, least, self._measured)
        if self.met is None:
            budget = 1 / self.wanted**self.task.part
            self.met = meet(budget, solve, least, self._share, self._measured, near=NEAR_TIMED, tries=MOST_TIMINGS)
        return self.met

    def unreachable(self, met: Met, prunable: str, hint: str) -> UsageError:
        """What is the nearest: the fastest that was measured."""
        fastest = min(self.compared.values(), key=lambda c: c.after.value / c.before.value)
        at = f"target.latency.{'speedup' if self.target.speedup is not None else 'p50_ms'}"
        speedup = math.floor(fastest.speedup.value * 100) / 100
        got = f"{speedup:.2f}x ({fastest.after.value:.3f} ms instead of {fastest.before.value:.3f})"
        asked = f"{self.target.speedup:g}x" if self.target.speedup is not None else f"{self.target.p50_ms:g} ms"
        return UsageError(
            f"{asked} cannot be reached on {self.timing.profile}: with everything gone that can be pruned "
            f"({prunable}), {got} is measured",
            where=at,
            hint=hint,
        )

    def latency(self) -> LatencyPlan:
        """What was predicted and measured of the result of `meet`."""
        assert self.met is not None
        assert self.met.positions is not None
        compared = self._compare(self.met.positions)
        scale = compared.before.value
        return LatencyPlan(
            profile=self.timing.profile,
            precision=self.target.precision,
            wanted_speedup=self.wanted,
            predicted_ms_before=scale,
            predicted_ms_after=scale * self._share(self.met.positions),
            measured_ms_before=compared.before,
            measured_ms_after=compared.after,
            speedup=compared.speedup,
            measurements=[(1 / share, 1 / measured) for share, measured in self.met.tried],
        )

    def _measured(self, positions: Positions) -> float:
        return 1 / self._compare(positions).speedup.value

    def _compare(self, positions: Positions) -> Compared:
        key = tuple(positions[c.name] for c in self.task.candidates)
        if key not in self.compared:
            pruned = without(self.task.network, self.task.candidates, positions)
            self.compared[key] = self.timing.compare(self.task.reference, pruned)
        return self.compared[key]


Goal = Counted | Timed


def goal_of(task: Task, target: Target, timing: Timing | None) -> Goal:
    """The goal that a target stands for. Raises UsageError: a latency without `timing`."""
    if target.latency is None:
        return Counted(task, target)
    if timing is None:
        raise UsageError("nothing to measure latency with", where="target.latency")
    return Timed(task, target.latency, timing)
