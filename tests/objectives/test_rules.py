"""Numbers that change: weights and temperatures by rule, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from formulas import Array, divergence, holds, normal, softmax
from torch import Tensor, nn

from edgekd.errors import RecipeError, UsageError
from edgekd.learner import parse_objectives
from edgekd.objectives import Objectives
from edgekd.objectives.logit import Correlations, ProbabilitySquares, SoftTargets
from edgekd.objectives.rules import Cosine, Curriculum, Disagreement, Linear, TeacherConfidence, rule
from edgekd.recipe import Component

S, T, LABEL = normal(4, 5, scale=3.0), normal(4, 5, seed=1, scale=3.0), np.array([3, -1, 0, 3])
STUDENT, TEACHER = {"logits": torch.tensor(S)}, {"logits": torch.tensor(T)}
BATCH = {"label": torch.tensor(LABEL)}


def at(made: nn.Module, epoch: float, epochs: int = 10) -> float:
    return float(made({}, {}, {"epoch": epoch, "epochs": epochs}))


@pytest.mark.parametrize(("epoch", "expected"), [(0.0, 2.0), (2.5, 1.625), (10.0, 0.5), (12.0, 0.5)])
def test_linear(epoch: float, expected: float) -> None:
    assert at(Linear(2.0, 0.5), epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("epoch", "share"), [(0.0, 0.0), (3.0, 0.0), (4.0, 0.25), (7.0, 1.0), (9.0, 1.0)])
@pytest.mark.parametrize("made", [Linear, Cosine])
def test_courses_begin_later_and_end_sooner(made: Any, epoch: float, share: float) -> None:
    way = share if made is Linear else 0.5 * (1 - math.cos(math.pi * share))
    assert at(made(4.0, 1.0, epochs=4, after=3), epoch) == pytest.approx(4 - 3 * way, rel=1e-12)


@pytest.mark.parametrize("epoch", [0.0, 2.5, 5.0, 10.0])
def test_cosine(epoch: float) -> None:
    assert at(Cosine(2.0, 0.5), epoch) == pytest.approx(1.25 + 0.75 * math.cos(math.pi * epoch / 10), rel=1e-12)


def test_teacher_confidence() -> None:
    p = softmax(T)
    expected = [p[0, 3], p[1].max(), p[2, 0], p[3, 3]]
    np.testing.assert_allclose(TeacherConfidence(0.5)(STUDENT, TEACHER, BATCH), 0.5 * np.array(expected), rtol=1e-12)


def test_disagreement() -> None:
    """Total variation: what one would have to move to make the distributions equal."""
    moved = np.maximum(softmax(S) - softmax(T), 0).sum(axis=1)
    live = {"logits": STUDENT["logits"].clone().requires_grad_()}
    found = Disagreement(2.0)(live, TEACHER, BATCH)
    np.testing.assert_allclose(found, 2 * moved, rtol=1e-12)
    assert not found.requires_grad
    assert (Disagreement()(TEACHER, TEACHER, BATCH) == 0).all()


@pytest.mark.parametrize("use", ["teacher-confidence", "disagreement"])
def test_a_weight_per_image(use: str) -> None:
    p, q = softmax(T), softmax(S)
    own = [p[0, 3], p[1].max(), p[2, 0], p[3, 3]]
    weights = np.array(own) if use == "teacher-confidence" else np.abs(p - q).sum(axis=1) / 2
    objectives = Objectives(parse_objectives([{"use": "mse-logits", "weight": {"use": use}}]))
    live = {"logits": STUDENT["logits"].clone().requires_grad_()}
    loss = objectives(live, TEACHER, BATCH)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx((weights * ((S - T) ** 2).mean(axis=1)).mean(), rel=1e-9)
    assert live["logits"].grad is not None
    # The weight is a number to the gradient, not something that the student could lower.
    np.testing.assert_allclose(live["logits"].grad, 2 * weights[:, None] * (S - T) / S.size, rtol=1e-9)


def test_rules_by_the_teacher_ask_for_one() -> None:
    assert Objectives(parse_objectives([{"use": "ce", "weight": {"use": "disagreement"}}])).needs_teacher
    assert not Objectives(parse_objectives([{"use": "ce", "weight": {"use": "linear"}}])).needs_teacher


def test_a_weight_per_image_does_not_fit_a_scalar() -> None:
    objectives = Objectives(parse_objectives([{"use": "dist", "weight": {"use": "disagreement"}}]))
    with pytest.raises(UsageError) as raised:
        objectives(STUDENT, TEACHER, BATCH)
    assert raised.value.problem.where == "objectives[0].weight"


class PerImage(nn.Module):
    """A temperature of its own for every row."""

    def __init__(self, taus: list[float]) -> None:
        super().__init__()
        self.taus = torch.tensor(taus)

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        return self.taus


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("made", [SoftTargets, ProbabilitySquares, Correlations])
def test_a_temperature_per_image(made: Any, standardize: bool) -> None:
    taus = np.array([1.0, 2.0, 4.0, 8.0])[:, None]
    objective = made(standardize=standardize)
    objective.tempered.rule = PerImage(taus[:, 0].tolist())

    def tempered(x: Array) -> Array:
        return softmax((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) / taus if standardize else x / taus)

    def expected(x: dict[str, Array]) -> float:
        q, p = tempered(x["logits"]), tempered(T)
        if made is SoftTargets:
            return float((taus[:, 0] ** 2 * divergence(p, q)).mean())
        if made is ProbabilitySquares:
            return float((taus**2 * (q - p) ** 2).sum() / 4)
        rows, columns = ([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)] for x, y in ((q, p), (q.T, p.T)))
        return float((2 - np.mean(rows) - np.mean(columns)) * (taus**2).mean())

    holds(objective, expected, {"logits": S}, {"logits": T})


@pytest.mark.parametrize(("epoch", "force"), [(0.0, 0.0), (2.5, 0.25), (5.0, 1.0), (9.0, 1.0)])
def test_curriculum(epoch: float, force: float) -> None:
    """Li et al., eq. 3, 6 and 7: tau = low + span * sigmoid(theta), moved by -lambda times the loss's slope."""
    made = Curriculum(low=2.0, high=12.0, start=5.0, strength=3.0, epochs=5).double()
    batch = {"epoch": epoch, "epochs": 10}
    objective = SoftTargets(4.0)
    objective.tempered.rule = made
    value = objective(STUDENT, TEACHER, batch).mean()
    value.backward()

    def loss(theta: float) -> float:
        tau = 2 + 10 / (1 + math.exp(-theta))
        return float(tau**2 * divergence(softmax(T / tau), softmax(S / tau)).mean())

    theta = made.theta.item()
    strength = 3.0 * (1 - math.cos(math.pi * min(epoch / 5, 1))) / 2
    assert 2 + 10 / (1 + math.exp(-theta)) == pytest.approx(5.0, rel=1e-6)
    assert value.item() == pytest.approx(loss(theta), rel=1e-9)
    slope = (loss(theta + 1e-5) - loss(theta - 1e-5)) / 2e-5
    assert made.theta.grad is not None
    assert made.theta.grad.item() == pytest.approx(-strength * slope, rel=1e-5, abs=1e-12)
    assert (strength > 0) == (force > 0)


def test_curriculum_makes_it_harder_while_the_student_learns() -> None:
    made = Curriculum(strength=1.0)
    objective = SoftTargets(4.0)
    objective.tempered.rule = made
    losses = []
    for _ in range(5):
        value = objective(STUDENT, TEACHER, {"epoch": 10, "epochs": 10}).mean()
        (slope,) = torch.autograd.grad(value, made.theta)
        with torch.no_grad():
            made.theta -= 0.5 * slope  # a step of descent, as any optimizer takes
        losses.append(value.item())
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


def test_what_a_temperature_cannot_be() -> None:
    with pytest.raises(UsageError, match="can become 0"):
        rule(Component(use="linear", start=4.0, end=0.0), "tau")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="low < start < high"):
        Curriculum(low=4.0, high=8.0, start=4.0)
    with pytest.raises(RecipeError) as raised:
        rule(Component(use="cosine", begin=1.0), "tau")  # type: ignore[call-arg]
    assert raised.value.problems[0].where == "tau.begin"
    assert at(rule(Component(use="linear", start=8.0, end=2.0), "tau"), 5) == 5.0  # type: ignore[call-arg]
