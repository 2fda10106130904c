"""Latency targets: predicted by a table, met by measuring. Times are made up here, so that they are known exactly."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from edgekd.bench import Interval
from edgekd.errors import UsageError
from edgekd.models import build, specify
from edgekd.profile import load_profile
from edgekd.pruning import Compared, PruningPlan, Target, Timing, carry_out, count_macs, merged, prune
from edgekd.pruning.costs import Layer
from edgekd.pruning.latency import LatencyTable, timed_layers
from edgekd.pruning.search import Candidate
from edgekd.registry import validation_problems

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CPU = load_profile("cpu-x86")


def known(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


class Machine:
    """A device on which a network takes 0.05 ms and 1 ms per 10 million MACs, and a table that says something else."""

    def __init__(self, directory: Path, wrong: float) -> None:
        self.directory, self.wrong = directory, wrong
        self.compared = 0

    def ms(self, network: nn.Module) -> float:
        return 0.05 + count_macs(network, IMAGE) / 1e7

    def layers(self, network: nn.Module, example: Tensor, candidates: Sequence[Candidate]) -> list[Layer]:
        def measure(shapes, profile, precision):
            macs = [s.inputs * s.outputs / s.groups * 9 * s.size[0] * s.size[-1] if s.size else 640 for s in shapes]
            return [self.wrong * m / 1e7 + 1e-3 for m in macs]

        table = LatencyTable(CPU, directory=self.directory, measure=measure)
        return timed_layers(network, example, candidates, table, self.ms(network), 4)

    def compare(self, original: nn.Module, pruned: nn.Module) -> Compared:
        self.compared += 1
        before, after = self.ms(original), self.ms(pruned)
        return Compared(known(before), known(after), known(before / after))

    def savings(self, pruned: nn.Module, longer: Mapping[str, nn.Module]) -> dict[str, Interval]:
        return {name: known(self.ms(network) - self.ms(pruned)) for name, network in longer.items()}

    @property
    def timing(self) -> Timing:
        return Timing("bench", self.layers, self.compare, self.savings)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build(specify("cifar-resnet", {"depth": 14, "width": 16}, classes=10, size=[3, 32, 32], where="m")).eval()


def pruned(network: nn.Module, machine: Machine, options: dict[str, object] | None = None, **latency: object):
    settings = {"importance": "magnitude", "channel_multiple": 4, "keep_outputs": 10, **(options or {})}
    return prune(network, IMAGE, target=Target(latency=latency), timing=machine.timing, **settings)


@pytest.mark.parametrize("wrong", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("strategy", ["knapsack", "uniform"])
def test_the_measured_speedup_meets_the_target_though_the_table_is_wrong(tmp_path: Path, wrong, strategy) -> None:
    network, machine = resnet(), Machine(tmp_path, wrong)
    before = machine.ms(network)
    plan = pruned(network, machine, {"strategy": strategy}, speedup=1.6)
    found = before / machine.ms(network)
    assert 1.6 <= found <= 1.6 * (1.1 if strategy == "knapsack" else 1.35)
    assert machine.compared <= 10
    assert plan.latency is not None
    assert plan.latency.speedup.value == pytest.approx(found)
    assert plan.achieved == pytest.approx(1 / found)
    assert plan.latency.measured_ms_after.value == pytest.approx(machine.ms(network))
    assert plan.latency.wanted_speedup == 1.6
    assert len(plan.latency.measurements) == machine.compared - 1  # all but that of everything gone
    assert plan.latency.measurements[-1][1] == pytest.approx(found)
    widths = {g.channels_after / g.channels_before for g in plan.removed()}
    if strategy == "uniform":
        assert plan.blocks == []
        assert max(widths) - min(widths) <= 4 / 16  # rounded to multiples of 4
    assert all(g.saved > 0 for g in plan.removed())
    assert all(b.saved > 0 for b in plan.blocks if b.removed)


def test_a_median_in_ms_is_met_and_one_that_is_met_already_changes_nothing(tmp_path: Path) -> None:
    network, machine = resnet(), Machine(tmp_path, 0.8)
    plan = pruned(network, machine, p50_ms=0.7 * machine.ms(network))
    assert plan.latency is not None
    assert 0.6 * machine.ms(resnet()) < machine.ms(network) <= 0.7 * machine.ms(resnet())
    assert plan.latency.wanted_speedup == pytest.approx(1 / 0.7)
    network = resnet()
    plan = pruned(network, machine, p50_ms=1.1 * machine.ms(network))
    assert not plan.removed()
    assert not any(block.removed for block in plan.blocks)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), resnet().state_dict().values(), strict=True)
    )
    assert {g.reason_kept for g in plan.groups} >= {"the target was met without it"}


def test_a_speedup_out_of_reach_names_the_nearest_which_can_be_had(tmp_path: Path) -> None:
    network, machine = resnet(), Machine(tmp_path, 1.0)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UsageError) as error:
        pruned(network, machine, speedup=50.0)
    said = str(error.value)
    assert said.startswith("target.latency.speedup: 50x cannot be reached on bench: with everything gone")
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values(), strict=True))
    nearest = float(said.split("), ")[1].split("x ")[0])
    assert pruned(network, machine, speedup=nearest).latency.speedup.value >= nearest
    with pytest.raises(UsageError, match=r"target\.latency\.p50_ms: 0\.01 ms cannot be reached"):
        pruned(resnet(), machine, p50_ms=0.01)
    with pytest.raises(UsageError, match="cannot be reached"):
        pruned(resnet(), machine, {"part": 0.5}, speedup=50.0)


def test_what_is_out_of_reach_is_told_after_one_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, 1.0)
    monkeypatch.setattr("edgekd.pruning.spend", lambda *_: pytest.fail("nothing is to be searched for"))
    with pytest.raises(UsageError, match="with everything gone"):
        pruned(resnet(), machine, speedup=50.0)
    assert machine.compared == 1
    with pytest.raises(UsageError, match=r"target\.macs: 0\.0001 cannot be reached: at least"):
        prune(resnet(), IMAGE, target=Target(macs=1e-4), importance="magnitude", channel_multiple=4, keep_outputs=10)


class Lucky(Machine):
    """It measures each network as `luck` times faster than it is when it sees it first."""

    def __init__(self, directory: Path, luck: float) -> None:
        super().__init__(directory, 1.0)
        self.luck, self.seen = luck, set[int]()

    def compare(self, original: nn.Module, pruned: nn.Module) -> Compared:
        found = super().compare(original, pruned)
        macs = count_macs(pruned, IMAGE)
        luck = 1.0 if macs in self.seen else self.luck
        self.seen.add(macs)
        after, times = found.after.value / luck, found.speedup.value * luck
        return Compared(found.before, known(after), known(times), rounds=7, busy=0.5)

    @property
    def timing(self) -> Timing:
        return Timing("bench", self.layers, self.compare, self.savings, device="a machine", runtime="r 1.0", threads=3)


@pytest.mark.parametrize("luck", [1.0, 1.04, 1.15])
def test_what_was_lucky_when_it_was_chosen_is_found_out_by_measuring_again(tmp_path: Path, luck: float) -> None:
    network, machine = resnet(), Lucky(tmp_path, luck)
    before = machine.ms(network)
    plan = pruned(network, machine, speedup=1.6)
    found = before / machine.ms(network)
    assert 1.6 <= found <= 1.6 * 1.25
    assert plan.latency is not None
    assert plan.latency.speedup.value == pytest.approx(found), "as measured the second time"
    assert plan.latency.measurements[-1][1] == pytest.approx(found)
    about = plan.latency.model_dump(include={"rounds", "busy", "device", "runtime", "threads"})
    assert about == {"rounds": 7, "busy": 0.5, "device": "a machine", "runtime": "r 1.0", "threads": 3}


def test_rounds_come_to_the_target_by_equal_factors_and_are_told_as_one(tmp_path: Path) -> None:
    network, machine = resnet(), Machine(tmp_path, 0.9)
    original = copy.deepcopy(network)
    plans: list[PruningPlan] = []
    for part in (0.5, 1.0):
        options = {"part": part, "reference": original}
        plans.append(pruned(network, machine, options, speedup=1.96))
        found = machine.ms(original) / machine.ms(network)
        assert 1.96**part <= found <= 1.15 * 1.96**part
    whole = merged(plans)
    assert whole.macs_before == count_macs(original, IMAGE)
    assert whole.macs_after == count_macs(network, IMAGE)
    for group in whole.groups:
        if group.block is None:
            assert group.channels_before - len(group.removed) == group.channels_after
            assert group.channels_after == network.get_submodule(group.name).weight.shape[0]
            kept = [i for i in range(group.channels_before) if i not in group.removed]
            made = original.get_submodule(group.name).weight[kept]
            if group.name.endswith("conv1") and "." in group.name:
                assert torch.equal(network.get_submodule(group.name).weight, made)
    again = copy.deepcopy(original)
    carry_out(again, whole, IMAGE)
    assert torch.equal(again(IMAGE), network(IMAGE))


def test_what_each_saves_is_measured_on_the_network_with_that_one_whole(tmp_path: Path) -> None:
    network, machine = resnet(), Machine(tmp_path, 1.3)  # a table that is wrong does not matter to it
    original = copy.deepcopy(network)
    plan = pruned(network, machine, speedup=1.8)
    rows = [*plan.blocks, *(group for group in plan.groups if group.block is None)]
    measured = {row.name: row.saved_measured for row in rows if row.saved_measured is not None}
    gone = {row.name: row.saved for row in rows if row.saved}
    assert measured.keys() == gone.keys()
    assert 3 <= len(gone) <= 16
    for name, saved in measured.items():
        groups = [g.model_copy(update={"removed": [], "attributes": {}}) if g.name == name else g for g in plan.groups]
        blocks = [b.model_copy(update={"removed": b.removed and b.name != name}) for b in plan.blocks]
        without_it = copy.deepcopy(original)
        carry_out(without_it, plan.model_copy(update={"groups": groups, "blocks": blocks}), IMAGE)
        assert saved.value == pytest.approx(machine.ms(without_it) - machine.ms(network), rel=1e-6)
        assert saved.value != pytest.approx(gone[name], rel=0.02), "predicted by the table that is wrong"
    assert all(row.saved_measured is None for row in rows if row.name not in gone)


def test_of_many_the_savings_of_those_that_save_most_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.pruning.goal.MOST_SAVINGS", 2)
    plan = pruned(resnet(), Machine(tmp_path, 1.0), speedup=1.8)
    rows = sorted((*plan.blocks, *plan.groups), key=lambda row: -row.saved)
    assert rows[2].saved > 0
    assert [row.saved_measured is not None for row in rows] == [True, True, *[False] * (len(rows) - 2)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"speedup": 1.0}, "t.latency.speedup: must be above 1, got 1.0"),
        ({"speedup": float("nan")}, "t.latency.speedup: must be above 1, got nan"),
        ({"p50_ms": 0}, "t.latency.p50_ms: must be above 0, got 0"),
        ({}, "t.latency: give exactly one of speedup and p50_ms, got {}"),
        ({"speedup": 2.0, "p50_ms": 1.0}, "t.latency: give exactly one of speedup and p50_ms"),
        ({"speedup": 2.0, "precision": "fp64"}, "t.latency.precision"),
        ({"speed": 2.0}, "t.latency.speed: unknown key\n  hint: did you mean 'speedup'?"),
    ],
)
def test_bad_latency_targets_are_explained(table, message) -> None:
    with pytest.raises(ValidationError) as error:
        Target.model_validate({"latency": table})
    problems = validation_problems(error.value, "t", Target)
    assert any(str(problem).startswith(message) for problem in problems), problems


def test_a_share_of_the_stored_bytes_is_kept() -> None:
    network = resnet()
    before = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    plan = prune(network, IMAGE, target=Target(size=0.5), importance="magnitude", channel_multiple=4, keep_outputs=10)
    after = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    assert (plan.bytes_before, plan.bytes_after) == (before, after)
    assert 0.4 < plan.achieved == after / before <= 0.5
