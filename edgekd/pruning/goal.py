"""A target as something that can be predicted, measured and met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

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
#: Of how many candidates it is timed what each saved: a network must be exported for each.
MOST_SAVINGS = 16

Solve = Callable[[float], dict[str, int] | None]


@dataclass(frozen=True)
class Compared:
    """Milliseconds of a call before and after, and before / after, paired by round.

    busy: cores that other programs kept busy meanwhile; None where the system does not tell.
    """

    before: Interval
    after: Interval
    speedup: Interval
    rounds: int = 0
    busy: float | None = None


@dataclass(frozen=True)
class Timing:
    """How latency on a profile is predicted and measured.

    layers: every matrix layer of a network (in evaluation mode) in ms, given its candidates and an example.
    compare: the original and a pruned network, measured side by side.
    savings: ms by which networks, by name, take longer than a pruned one, all measured side by side.
    device: the processor, runtime: its name and version, threads: of a call.
    """

    profile: str
    layers: Callable[[nn.Module, Tensor, Sequence[Candidate]], list[Layer]]
    compare: Callable[[nn.Module, nn.Module], Compared]
    savings: Callable[[nn.Module, Mapping[str, nn.Module]], dict[str, Interval]]
    device: str = ""
    runtime: str = ""
    threads: int = 0


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
    """A budget, a share of the reference's cost. predicted: the cost of settings of the candidates at hand.

    start: the share that the network had at first, as measured. floor: that with everything gone, once it is measured.
    """

    def __init__(self, task: Task, layers: Sequence[Layer]) -> None:
        self.task, self.layers = task, list(layers)
        self.network, self.candidates = task.network, task.candidates
        self.predicted = Predicted(self.layers, self.candidates)
        self.whole_cost = self.predicted.total({})
        self.start, self.floor = 1.0, 0.0

    def go_on(self, network: nn.Module, candidates: Sequence[Candidate], removed: Sequence[str]) -> None:
        """From here on it is about what is left of the network, without the removed blocks."""
        self.network, self.candidates = network, candidates
        self.layers = [x for x in self.layers if not any(x.tensor.startswith(f"{block}.") for block in removed)]
        self.predicted = Predicted(self.layers, candidates)

    def cost(self, share: float) -> float:
        """The predicted cost that stands for a share of the reference."""
        return share / self.start * self.whole_cost

    def predicted_share(self, positions: Positions) -> float:
        """The share of the reference that a setting is predicted to have."""
        return self.start * self.predicted.total(positions) / self.whole_cost


class Counted(_Goal):
    """A share of MACs, parameters or bytes."""

    def __init__(self, task: Task, target: Target) -> None:
        super().__init__(task, counted_layers(task.network, task.example, target.measure))
        self.target = target
        self.whole = self._count(task.reference)
        self.start = self._count(task.network) / self.whole

    def budget(self, least: Positions) -> float | None:
        """The share to come to; None where the target is out of reach, which nothing is searched for."""
        self.floor = self.measured(least)
        if self.floor > self.target.share:
            return None
        return self.target.share**self.task.part

    def meet(self, budget: float, solve: Solve, least: Positions) -> Met:
        """The setting that comes nearest."""
        return meet(budget, solve, least, self.predicted_share, self.measured, near=NEAR_COUNTED, tries=MOST_COUNTS)

    def taken_back(self, budget: float, candidates: Sequence[Candidate], positions: dict[str, int]) -> dict[str, int]:
        """With every step of the network at first undone that fits."""
        for name in positions:
            while positions[name]:
                back = {**positions, name: positions[name] - 1}
                if self._count(without(self.task.network, candidates, back)) / self.whole > budget:
                    break
                positions = back
        return positions

    def unreachable(self, met: Met, prunable: str, hint: str) -> UsageError:
        """What is the nearest."""
        measure = self.target.measure
        # Rounded up, so that asking for the number that is shown succeeds.
        least = math.ceil(max(met.share, self.floor) * 1e4) / 1e4
        return UsageError(
            f"{self.target.share:g} cannot be reached: at least {least:.4f} of the {measure} remain "
            f"when everything that can be pruned is ({prunable})",
            where=f"target.{measure}",
            hint=hint,
        )

    def savings(
        self, candidates: Sequence[Candidate], positions: Positions, undone: Mapping[str, Positions]
    ) -> dict[str, Interval]:
        """What each removal saves, given the positions with it undone: counted on the two networks."""
        network = self.task.network
        now = self._count(without(network, candidates, positions))
        counted = {name: self._count(without(network, candidates, back)) - now for name, back in undone.items()}
        return {name: Interval(value=value, low=value, high=value) for name, value in counted.items()}

    def latency(self) -> None:
        """Nothing was timed."""

    def measured(self, positions: Positions) -> float:
        """The share of the reference that is left."""
        return self._count(without(self.network, self.candidates, positions)) / self.whole

    def _count(self, network: nn.Module) -> int:
        if self.target.measure == "macs":
            return count_macs(network, self.task.example)
        return count_parameters(network) if self.target.measure == "parameters" else count_bytes(network)


class Timed(_Goal):
    """A latency. The table says what layers take; what is between them is the rest of the whole network's time."""

    def __init__(self, task: Task, target: LatencyTarget, timing: Timing) -> None:
        super().__init__(task, timing.layers(task.network, task.example, task.candidates))
        self.target, self.timing = target, timing
        self.compared: list[Compared] = []
        self.met: tuple[Compared, float] | None = None
        self.tried: list[tuple[float, float]] = []
        self.wanted = target.speedup or 0.0

    def budget(self, least: Positions) -> float | None:
        """The share to come to, `start` or more where it is fast enough; None where the target is out of reach."""
        if self.task.network is not self.task.reference or self.target.p50_ms is not None:
            self.start = self.measured(dict.fromkeys(least, 0))
            if self.target.p50_ms is not None:
                self.wanted = self.compared[-1].before.value / self.target.p50_ms
        if self.wanted * self.start > 1:
            self.floor = self.measured(least)
            if self.floor > 1 / self.wanted:
                return None
        return 1 / self.wanted**self.task.part

    def meet(self, budget: float, solve: Solve, least: Positions) -> Met:
        """The slowest setting that is measured to be fast enough, twice."""
        networks: dict[tuple[tuple[str, int], ...], nn.Module] = {}
        at: dict[tuple[tuple[str, int], ...], Compared] = {}

        def measured(positions: Positions) -> float:
            key = tuple(sorted(positions.items()))
            if key not in networks:
                networks[key] = without(self.network, self.candidates, positions)
            share = self._share(networks[key])
            at[key] = self.compared[-1]
            return share

        near, tries = NEAR_TIMED, MOST_TIMINGS
        met = meet(budget, solve, least, self.predicted_share, measured, near=near, tries=tries, twice=True)
        self.tried = [(1 / predicted, 1 / share) for predicted, share in met.tried]
        if met.positions is not None:
            self.met = at[tuple(sorted(met.positions.items()))], self.predicted_share(met.positions)
        return met

    def taken_back(self, budget: float, candidates: Sequence[Candidate], positions: dict[str, int]) -> dict[str, int]:
        """What was measured stays."""
        return positions

    def unreachable(self, met: Met, prunable: str, hint: str) -> UsageError:
        """What is the nearest: with everything gone, or the fastest of the search."""
        gone = self.floor * self.wanted > 1
        fastest = self.compared[-1] if gone else max(self.compared, key=lambda c: c.speedup.value)
        at = f"target.latency.{'speedup' if self.target.speedup is not None else 'p50_ms'}"
        speedup = math.floor(fastest.speedup.value * 100) / 100
        got = f"{speedup:.2f}x ({fastest.after.value:.3f} ms instead of {fastest.before.value:.3f})"
        asked = f"{self.target.speedup:g}x" if self.target.speedup is not None else f"{self.target.p50_ms:g} ms"
        how = f"with everything gone that can be pruned ({prunable}), {got} is measured"
        if not gone:
            how = f"of what was measured, {got} is the fastest ({prunable} can be pruned)"
        what = f"{asked} cannot be reached on {self.timing.profile}: {how}"
        return UsageError(what, where=at, hint=hint)

    def savings(
        self, candidates: Sequence[Candidate], positions: Positions, undone: Mapping[str, Positions]
    ) -> dict[str, Interval]:
        """What each removal saves, given the positions with it undone: ms, of the first `MOST_SAVINGS`."""
        network, first = self.task.network, islice(undone.items(), MOST_SAVINGS)
        longer = {name: without(network, candidates, back) for name, back in first}
        if not longer:
            return {}
        return self.timing.savings(without(network, candidates, positions), longer)

    def latency(self) -> LatencyPlan:
        """What was predicted and measured of the result of `meet`."""
        compared, share = self.met or (self.compared[0], self.start)
        return LatencyPlan(
            profile=self.timing.profile,
            precision=self.target.precision,
            wanted_speedup=self.wanted,
            predicted_ms_before=compared.before.value,
            predicted_ms_after=compared.before.value * share,
            measured_ms_before=compared.before,
            measured_ms_after=compared.after,
            speedup=compared.speedup,
            measurements=self.tried,
            rounds=compared.rounds,
            busy=compared.busy,
            device=self.timing.device,
            runtime=self.timing.runtime,
            threads=self.timing.threads,
        )

    def measured(self, positions: Positions) -> float:
        """The share of the reference's time, measured side by side."""
        return self._share(without(self.network, self.candidates, positions))

    def _share(self, pruned: nn.Module) -> float:
        self.compared.append(self.timing.compare(self.task.reference, pruned))
        return 1 / self.compared[-1].speedup.value


Goal = Counted | Timed


def goal_of(task: Task, target: Target, timing: Timing | None) -> Goal:
    """The goal that a target stands for. Raises UsageError: a latency without `timing`."""
    if target.latency is None:
        return Counted(task, target)
    if timing is None:
        raise UsageError("nothing to measure latency with", where="target.latency")
    return Timed(task, target.latency, timing)
