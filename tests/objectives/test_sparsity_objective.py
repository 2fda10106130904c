"""The L1 penalty on batch norms' scales: its value, its gradient on the student, and what training with it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.learner import Learner


def student() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        *(nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    for norm in (network[1], network[4]):
        nn.init.normal_(norm.weight)
    network[4].weight.data[2] = 0.0
    return network


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(16, 3, 8, 8, generator=generator), "label": torch.arange(16) % 4}


def learner(network: nn.Module, objectives: list[object]) -> Learner:
    return Learner.of(network, objectives=objectives, example=batch()["image"][:2])


def test_value_and_gradient_are_those_of_the_l1_norm_of_every_scale() -> None:
    network = student()
    gammas = [network[i].weight.detach().numpy().astype(np.float64) for i in (1, 4)]
    parts = learner(network, [{"use": "bn-sparsity", "weight": 0.25}])(batch())
    expected = sum(float(np.abs(g).sum()) for g in gammas)
    assert parts["bn-sparsity"].item() == pytest.approx(expected, rel=1e-6)
    assert parts["loss"].item() == pytest.approx(0.25 * expected, rel=1e-6)
    parts["loss"].backward()
    for i, gamma in zip((1, 4), gammas, strict=True):
        np.testing.assert_allclose(network[i].weight.grad.numpy(), 0.25 * np.sign(gamma), atol=1e-7)
        assert not network[i].bias.grad.any()
    assert not network[0].weight.grad.any()


def test_it_follows_the_student_to_other_values_and_adds_nothing_to_what_is_trained_or_stored() -> None:
    network = student()
    made = learner(network, ["ce", {"use": "bn-sparsity", "weight": 1e-3}])
    assert len(list(made.parameters())) == len(list(network.parameters()))
    assert not any("scales" in key for key in made.state_dict())
    made.to(torch.float64)
    with torch.no_grad():
        network[1].weight.fill_(2.0)
        network[4].weight.fill_(-1.0)
    doubled = {"image": batch()["image"].double(), "label": batch()["label"]}
    assert made(doubled)["bn-sparsity"].item() == 2 * 8 + 6


def test_training_with_it_shrinks_the_scales_that_training_without_it_leaves() -> None:
    sums = []
    for weight in (0.0, 0.1):
        network = student()
        made = learner(network, ["ce", {"use": "bn-sparsity", "weight": weight}])
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            made(batch())["loss"].backward()
            optimizer.step()
        sums.append(sum(float(network[i].weight.detach().abs().sum()) for i in (1, 4)))
    assert sums[1] < 0.5 * sums[0]


def test_a_student_without_scales_is_told_at_the_objectives_place() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(RecipeError, match="no batch normalisation with a scale") as raised:
        learner(network, ["ce", "bn-sparsity"])
    assert raised.value.problems[0].where == "objectives[1]"
