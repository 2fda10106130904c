"""The solver: the least harm within a budget, against brute force over every setting."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest

from edgekd.pruning.blocks import Block
from edgekd.pruning.budget import meet
from edgekd.pruning.costs import Layer, Predicted, proportional
from edgekd.pruning.graph import ChannelGroup
from edgekd.pruning.knapsack import Knapsack, uniform
from edgekd.pruning.search import Candidate, block_candidate


def group(name: str, units: int, *sizes: tuple[str, int]) -> Candidate:
    """A group whose every unit can go but one, in tensors of `units` along the given dimensions."""
    made = ChannelGroup(name, units, (), lambda channels: (), [[i] for i in range(units)], 1)
    made.__dict__["edits"] = tuple(_Edit(tensor.rpartition(".")[0]) for tensor, _ in sizes)
    return Candidate(made, list(range(units)), list(range(units)), dict.fromkeys(sizes, 1 / units))


class _Edit:
    def __init__(self, path: str) -> None:
        self.path = path


def problem(seed: int) -> tuple[list[Candidate], dict[str, list[float]], Predicted]:
    """Two residual blocks with an inner width each, behind two layers that share a width."""
    rng = random.Random(seed)
    candidates = [
        group("a", 4, ("a.weight", 0), ("b.weight", 1)),
        group("b", 3, ("b.weight", 0)),
        group("one.x", 4, ("one.x.weight", 0), ("one.y.weight", 1)),
        group("two.x", 4, ("two.x.weight", 0), ("two.y.weight", 1)),
        block_candidate(Block("one")),
        block_candidate(Block("two")),
    ]
    harm = {c.name: [0.0, *sorted(rng.random() for _ in c.steps[1:])] for c in candidates}
    tensors = ["a", "b", "one.x", "one.y", "two.x", "two.y", "stem"]
    layers = [Layer(f"{name}.weight", proportional(rng.uniform(1, 10))) for name in tensors]
    return candidates, harm, Predicted(layers, candidates)


def every(candidates: list[Candidate]) -> list[dict[str, int]]:
    names = [c.name for c in candidates]
    return [dict(zip(names, p, strict=True)) for p in itertools.product(*(range(len(c.steps)) for c in candidates))]


def harm_of(setting: Mapping[str, int], harm: dict[str, list[float]]) -> float:
    return sum(
        harm[n][p]
        for n, p in setting.items()
        if not (n.endswith(".x") and setting[n.removesuffix(".x")]) or "." not in n
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_solution_keeps_the_budget_and_is_as_good_as_brute_force_or_nearly(seed: int) -> None:
    candidates, harm, predicted = problem(seed)
    knapsack = Knapsack(candidates, harm, predicted)
    whole = predicted.total({})
    for share in (0.9, 0.75, 0.6, 0.45, 0.3):
        found = knapsack.solve(share * whole)
        fitting = [s for s in every(candidates) if predicted.total(s) <= share * whole]
        if found is None:
            assert not fitting
            continue
        assert predicted.total(found) <= share * whole
        best = min(harm_of(s, harm) for s in fitting)
        # Exact but for rounding to parts of the budget, and for a and b, which share a layer.
        assert harm_of(found, harm) <= 1.1 * best + 1e-9


def test_a_block_that_goes_takes_the_harm_and_cost_of_its_inside_with_it() -> None:
    candidates = [group("one.x", 4, ("one.x.weight", 0)), block_candidate(Block("one"))]
    predicted = Predicted(
        [Layer("one.x.weight", proportional(8.0)), Layer("head.weight", proportional(2.0))], candidates
    )
    harm = {"one.x": [0.0, 1.0, 2.0, 3.0], "one": [0.0, 2.5]}
    knapsack = Knapsack(candidates, harm, predicted)
    assert predicted.total({"one": 1, "one.x": 2}) == 2.0
    assert predicted.total({"one.x": 2}) == 6.0
    assert knapsack.solve(10.0) == {"one.x": 0, "one": 0}
    assert knapsack.solve(8.0) == {"one.x": 1, "one": 0}
    assert knapsack.solve(6.0) == {"one.x": 2, "one": 0}
    found = knapsack.solve(5.0)  # three channels harm 3.0, the block 2.5
    assert found is not None
    assert found["one"] == 1
    assert knapsack.solve(1.9) is None


def test_a_budget_below_all_that_can_be_had_has_no_solution_whatever_its_size() -> None:
    candidates, harm, predicted = problem(0)
    knapsack = Knapsack(candidates, harm, predicted)
    cheapest = min(predicted.total(setting) for setting in every(candidates))
    assert predicted.total(knapsack.solve(cheapest) or {}) == cheapest
    for budget in (cheapest * (1 - 1e-9), 1e-12, 0.0, -1.0):
        assert knapsack.solve(budget) is None


def test_what_is_cheapest_is_found_where_fewer_channels_take_longer() -> None:
    candidates = [group("a", 4, ("a.weight", 0))]
    times = {4: 8.0, 3: 6.0, 2: 3.0, 1: 5.0}
    predicted = Predicted([Layer("a.weight", lambda left: times[round(4 * left.get(0, 1.0))])], candidates)
    knapsack = Knapsack(candidates, {"a": [0.0, 0.1, 0.2, 0.3]}, predicted)
    assert knapsack.solve(4.0) == {"a": 2}
    assert knapsack.solve(2.9) is None


def test_a_machine_that_always_misses_ends_the_search() -> None:
    """Every setting is measured at 0.51 of the whole, the budget is 0.5, and all is tried."""
    candidates, harm, predicted = problem(1)
    knapsack = Knapsack(candidates, harm, predicted)
    whole = predicted.total({})
    calls = []

    def measured(positions: Mapping[str, int]) -> float:
        calls.append(dict(positions))
        return 0.51

    def solve(share: float) -> dict[str, int] | None:
        return knapsack.solve(share * whole)

    met = meet(0.5, solve, knapsack.least(), lambda p: predicted.total(p) / whole, measured, near=0.02, tries=6)
    assert met.positions is None
    assert met.share == 0.51
    assert len(calls) <= 7
    assert calls[-1] == knapsack.least()


def test_uniform_takes_the_same_share_of_every_group_and_no_block() -> None:
    candidates, _, predicted = problem(0)
    found = uniform(candidates, predicted, 0.5 * predicted.total({}))
    assert found is not None
    assert found["one"] == found["two"] == 0
    assert found["a"] == found["one.x"] == found["two.x"]
    assert predicted.total(found) <= 0.5 * predicted.total({})
    assert uniform(candidates, predicted, 0.01 * predicted.total({})) is None


def test_predictions_that_are_wrong_are_corrected_by_measuring() -> None:
    """A thing of a hundred steps of one per cent each, which save only 0.8 of what is predicted."""
    seen: list[int] = []

    def solve(share: float) -> dict[str, int] | None:
        gone = next((n for n in range(101) if 1 - n / 100 <= share + 1e-12), None)
        return None if gone is None or gone > 90 else {"x": gone}

    def predicted(positions: Mapping[str, int]) -> float:
        return 1 - positions["x"] / 100

    def measured(positions: Mapping[str, int]) -> float:
        seen.append(positions["x"])
        return 1 - 0.8 * positions["x"] / 100

    met = meet(0.5, solve, {"x": 90}, predicted, measured, near=0.02, tries=6)
    assert met.positions is not None
    assert met.share == measured(met.positions) <= 0.5
    assert met.share >= 0.98 * 0.5
    assert len(seen) <= 7
    assert met.tried == [(predicted({"x": n}), 1 - 0.8 * n / 100) for n in seen[:-1]]
    unmet = meet(0.2, solve, {"x": 90}, predicted, measured, near=0.02, tries=6)
    assert unmet.positions is None
    assert unmet.share == pytest.approx(1 - 0.8 * 0.9)


def test_measurements_end_even_where_no_setting_lies_near_the_budget() -> None:
    calls = []

    def measured(positions: Mapping[str, int]) -> float:
        calls.append(positions["x"])
        return 1 - positions["x"] * 0.4

    def solve(share: float) -> dict[str, int] | None:
        return next(({"x": n} for n in range(3) if 1 - n * 0.4 <= share), None)

    met = meet(0.5, solve, {"x": 2}, lambda p: 1 - p["x"] * 0.4, measured, near=0.02, tries=6)
    assert met.positions == {"x": 2}
    assert len(calls) <= 3
