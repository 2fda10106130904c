"""Learning rates, parameter groups and averaged weights, against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.optim import Averaged, learning_rate, make_optimizer
from edgekd.recipe import Training


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize("progress", [0.25, 0.3, 0.5, 0.75, 0.999, 1.0])
def test_schedules_after_the_warm_up(progress: float) -> None:
    rest = (progress - 0.25) / 0.75
    expected = {
        "one-cycle": 0.4 * (1 - rest),
        "cosine": 0.2 * (1 + math.cos(math.pi * rest)),
        "constant": 0.4,
    }
    for schedule, rate in expected.items():
        settings = Training(lr=0.4, warmup=0.25, schedule=schedule)  # type: ignore[arg-type]
        assert learning_rate(settings, progress) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_all_schedules_rise_in_a_straight_line(schedule: str) -> None:
    settings = Training(lr=0.4, warmup=0.2, schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate(settings, p) for p in (0.0, 0.05, 0.1, 0.2)] == pytest.approx([0.0, 0.1, 0.2, 0.4])
    without = Training(lr=0.4, warmup=0.0, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(without, 0.0) == 0.4


def test_weight_decay_is_for_matrices_and_kernels_only() -> None:
    network = Net()
    optimizer = make_optimizer(network, Training(weight_decay=0.01))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decays.get(id(p)) for name, p in network.named_parameters()}
    assert found == {
        "conv.weight": 0.01,
        "conv.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.01,
        "head.bias": 0.0,
        "frozen.weight": None,
        "frozen.bias": None,
    }


def test_the_optimizers_are_those_of_the_settings() -> None:
    sgd = make_optimizer(Net(), Training(lr=0.3, momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD)
    assert {(g["lr"], g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.3, 0.8, True)}
    plain = make_optimizer(Net(), Training(momentum=0.0))
    assert {g["nesterov"] for g in plain.param_groups} == {False}
    adamw = make_optimizer(Net(), Training(optimizer="adamw", lr=0.001, weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]


def test_a_network_of_matrices_only_has_one_group() -> None:
    assert len(make_optimizer(nn.Linear(2, 2, bias=False), Training()).param_groups) == 1


def changed(network: nn.Module, seed: int) -> None:
    """What a training step does: new values in place, statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))


def test_the_average_is_an_exponential_one_whose_decay_warms_up() -> None:
    network = Net()
    average = Averaged(network, 0.5)
    names = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]
    names += ["norm.running_mean", "norm.running_var"]
    assert sorted(average.tensors) == sorted(names)  # neither frozen parameters nor the count of batches
    state = network.state_dict()
    expected = {name: state[name].double().numpy().copy() for name in names}
    decays = []
    for step in range(12):
        changed(network, step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        decays.append(decay)
        expected = {n: decay * expected[n] + (1 - decay) * network.state_dict()[n].double().numpy() for n in names}
    assert decays[0] == 0.1
    assert decays[-1] == 0.5
    for name in names:
        np.testing.assert_allclose(average.tensors[name].double().numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_swapping_shows_the_average_and_swapping_again_changes_nothing() -> None:
    network = Net()
    average = Averaged(network, 0.9)
    changed(network, 0)
    average.update(0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kept = {name: value.clone() for name, value in average.tensors.items()}
    average.swap()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in kept.items())
    assert torch.equal(network.state_dict()["frozen.weight"], before["frozen.weight"])
    average.swap()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(average.tensors[name], value) for name, value in kept.items())


def test_the_average_of_frozen_values_is_their_value() -> None:
    network = Net()
    average = Averaged(network, 0.9)
    for step in range(20):
        average.update(step)
    assert all(torch.equal(average.tensors[name], network.state_dict()[name]) for name in average.tensors)


def test_a_stored_average_goes_on_where_it_was() -> None:
    network = Net()
    average = Averaged(network, 0.9)
    changed(network, 0)
    average.update(0)
    stored = {name: value.clone() for name, value in average.tensors.items()}
    other = Averaged(network, 0.9)
    other.load(stored)
    changed(network, 1)
    average.update(1)
    other.update(1)
    assert all(torch.equal(average.tensors[name], other.tensors[name]) for name in stored)
