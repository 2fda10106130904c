"""Images changed to mislead a student: against the closed form of a linear network, and within what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import Array, divergence, normal, softmax
from pydantic import ValidationError
from torch import Tensor, nn

from edgekd.attack import Attack, AttackSpec

MEAN, STD = [0.4, 0.3], [0.25, 0.5]
CHANNEL = np.array(STD).reshape(1, 2, 1, 1)
EPS = 0.03


class Network(nn.Module):
    """Linear, or with something to find: [N, 2, 3, 3] -> 4 classes."""

    def __init__(self, curved: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = [nn.Linear(18, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4)]
        self.layers = nn.Sequential(nn.Flatten(), *(inner if curved else [nn.Linear(18, 4)]))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(image)}


def pixels(image: Tensor) -> Array:
    """Back to [0, 1]."""
    found: Array = image.double().numpy() * CHANNEL + np.array(MEAN).reshape(1, 2, 1, 1)
    return found


def images(n: int = 6, low: float = 0.2, high: float = 0.8) -> Tensor:
    raw = np.random.default_rng(0).uniform(low, high, (n, 2, 3, 3))
    return torch.tensor((raw - np.array(MEAN).reshape(1, 2, 1, 1)) / CHANNEL).float()


def attack(use: Any, **more: Any) -> Attack:
    return Attack(AttackSpec(use=use, eps=EPS, **more), MEAN, STD)


def gap(network: nn.Module, image: Tensor, teacher: Tensor) -> float:
    with torch.no_grad():
        said = network.eval()(image)["logits"].double().numpy()
    return float(divergence(softmax(teacher.double().numpy()), softmax(said)).mean())


@pytest.mark.parametrize(("taught", "against"), [(True, "teacher"), (True, "label"), (False, "label"), (False, None)])
def test_fgsm_of_a_linear_network(taught: bool, against: str | None) -> None:
    """Goodfellow et al., section 3: x + eps sign(W' (q - p)), with p the teacher's probabilities or the label."""
    network, x = Network(), images()
    teacher, label = torch.tensor(normal(6, 4, seed=1, scale=2.0)).float(), torch.tensor([0, 1, 2, 3, -1, 1])
    w, b = (p.detach().double().numpy() for p in network.layers[1].parameters())
    q = softmax(x.double().numpy().reshape(6, -1) @ w.T + b)
    said, known = softmax(teacher.double().numpy()), (label.numpy() >= 0)[:, None]
    p = said if against == "teacher" else np.where(known, np.eye(4)[label], said)
    push = np.sign((q - p) @ w).reshape(x.shape)
    if not taught:
        push[4] = 0  # nothing is known of this one
    more = {} if against is None else {"against": against}
    changed = attack("fgsm", **more)(network, x, teacher if taught else None, label)
    np.testing.assert_allclose(pixels(changed) - pixels(x), EPS * push, rtol=0, atol=1e-6)
    assert not changed.requires_grad


@pytest.mark.parametrize("use", ["fgsm", "pgd"])
def test_pixels_stay_within_eps_and_within_the_range_of_images(use: str) -> None:
    x = images(20, low=0.0, high=1.0)
    teacher = torch.tensor(normal(20, 4, seed=1)).float()
    changed = attack(use, **({"step": 0.5} if use == "pgd" else {}))(Network(), x, teacher, torch.zeros(20).long())
    moved = np.abs(pixels(changed) - pixels(x))
    assert moved.max() <= EPS + 1e-6
    assert moved.max() > EPS - 1e-6  # in every channel's own units
    assert (moved.max(axis=(0, 2, 3)) > EPS - 1e-6).all()
    assert pixels(changed).min() >= -1e-6
    assert pixels(changed).max() <= 1 + 1e-6
    assert pixels(x).min() < EPS / 2  # some were at the border


def test_pgd_misleads_more_than_one_step_and_that_more_than_noise() -> None:
    network, x = Network(curved=True), images(32)
    with torch.no_grad():
        teacher = network.eval()(x)["logits"] + 0.1 * torch.tensor(normal(32, 4)).float()
    network.train()
    made = {use: attack(use)(network, x, teacher, torch.zeros(32).long()) for use in ("fgsm", "pgd")}
    assert network.training  # left as it was found
    noise = x + torch.tensor(EPS * np.sign(normal(*x.shape)) / CHANNEL).float()
    clean, random, one, several = (gap(network, y, teacher) for y in (x, noise, made["fgsm"], made["pgd"]))
    assert random < 2 * one / 3
    assert clean < one
    assert one <= several * 1.001


def test_a_change_against_the_label_raises_its_cross_entropy_and_one_against_the_teacher_does_not() -> None:
    """ARD (Goldblum et al.) looks at the label alone, RSLAD (Zi et al.) at the teacher alone."""
    network, x, label = Network(curved=True), images(32), torch.arange(32) % 4
    teacher = 4.0 * F.one_hot((label + 1) % 4, 4).float()  # sure of something else

    def loss(changed: Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(network.eval()(changed)["logits"], label))

    by_label, by_teacher = (attack("pgd", against=a)(network, x, teacher, label) for a in ("label", "teacher"))
    assert loss(by_label) > loss(x) * 1.02
    assert loss(by_label) > loss(by_teacher)
    assert gap(network, by_teacher, teacher) > gap(network, by_label, teacher)


def test_no_dropout_and_no_gradient_of_the_network_while_the_change_is_sought() -> None:
    network, x = Network(curved=True).train(), images()
    teacher, label = torch.zeros(6, 4), torch.zeros(6).long()
    first, second = (attack("fgsm")(network, x, teacher, label) for _ in range(2))
    assert torch.equal(first, second)
    assert all(p.grad is None for p in network.parameters())


def test_the_default_step_may_cross_the_whole_ball() -> None:
    """2.5 eps / steps (Madry et al., appendix), of which two are enough from anywhere on a linear network."""
    network, x = Network(), images()
    teacher = torch.tensor(normal(6, 4, seed=1, scale=2.0)).float()
    label = torch.zeros(6).long()
    one, two = attack("fgsm")(network, x, teacher, label), attack("pgd", steps=2)(network, x, teacher, label)
    assert (np.abs(pixels(two) - pixels(x)) > EPS - 1e-6).mean() > 0.9
    assert gap(network, two, teacher) == pytest.approx(gap(network, one, teacher), rel=0.02)


@pytest.mark.parametrize(
    "given", [{"eps": 0}, {"eps": 1.5}, {"steps": 0}, {"step": -1}, {"use": "cw"}, {"against": "me"}]
)
def test_what_an_attack_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AttackSpec.model_validate(given)
