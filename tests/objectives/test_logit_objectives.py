"""Objectives on logits: values and gradients against the papers' formulas in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from formulas import Array, divergence, holds, normal, softmax
from torch import nn

from edgekd.objectives.logit import (
    Correlations,
    CrossEntropy,
    Decoupled,
    LabelSmoothing,
    LogitSquares,
    ProbabilitySquares,
    SoftTargets,
    standardized,
)

SHAPES = [(1, 2), (1, 1000), (7, 10), (32, 1000)]


def logits(shape: tuple[int, int], seed: int, scale: float = 3.0) -> Array:
    return normal(*shape, seed=seed, scale=scale)


def tied(seed: int) -> Array:
    """Rows with many equal logits, two of them the same images."""
    made = np.round(logits((6, 5), seed, 1.0))
    made[4] = made[1]
    return made


def labels_of(shape: tuple[int, int]) -> Array:
    """Without the last class where that is possible."""
    return np.random.default_rng(1).integers(0, max(shape[1] - 1, 1), shape[0])


def hinton(s: Array, t: Array, tau: float) -> float:
    return tau**2 * divergence(softmax(t / tau), softmax(s / tau)).mean()


def brier(s: Array, t: Array, tau: float) -> float:
    return tau**2 * ((softmax(s / tau) - softmax(t / tau)) ** 2).sum(axis=1).mean()


def decoupled(s: Array, t: Array, label: Array, tau: float, alpha: float, beta: float) -> float:
    """Zhao et al., eq. 7: alpha KL(b^T || b^S) + beta KL(p^T || p^S among the other classes), row by row."""
    rows = []
    for i in np.flatnonzero(label >= 0):
        q, p = softmax(s[i : i + 1] / tau)[0], softmax(t[i : i + 1] / tau)[0]
        other_q, other_p = (np.delete(x, label[i]) for x in (q, p))
        b_q, b_p = (np.array([[x[label[i]], rest.sum()]]) for x, rest in ((q, other_q), (p, other_p)))
        target = divergence(b_p, b_q)[0]
        rest = divergence(other_p[None] / other_p.sum(), other_q[None] / other_q.sum())[0]
        rows.append(tau**2 * (alpha * target + beta * rest))
    return float(np.mean(rows))


def pearson(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-8))


def huang(s: Array, t: Array, tau: float, beta: float, gamma: float) -> float:
    """Huang et al., eq. 8 to 10: rows of the probabilities are relations between classes, columns within one."""
    q, p = softmax(s / tau), softmax(t / tau)
    between = np.mean([1 - pearson(q[i], p[i]) for i in range(len(q))])
    within = np.mean([1 - pearson(q[:, j], p[:, j]) for j in range(q.shape[1])])
    return float(tau**2 * (beta * between + gamma * within))


def z_scores(x: Array) -> Array:
    """Sun et al., algorithm 1."""
    return (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)


def smoothed(amount: float) -> nn.Module:
    return LabelSmoothing(amount) if amount else CrossEntropy()


def cross_entropy(x: Array, target: Array) -> float:
    return float(-(target * np.log(softmax(x))).sum() / (target.sum(axis=1) > 0).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amount", [0.0, 0.1])
def test_cross_entropy_with_labels(shape: tuple[int, int], amount: float) -> None:
    label = labels_of(shape)
    target = (1 - amount) * np.eye(shape[1])[label] + amount / shape[1]
    student = {"logits": logits(shape, 0)}
    batch = {"label": torch.tensor(label)}
    holds(smoothed(amount), lambda x: cross_entropy(x["logits"], target), student, batch=batch)


@pytest.mark.parametrize("amount", [0.0, 0.2])
def test_cross_entropy_with_soft_targets(amount: float) -> None:
    soft = np.random.default_rng(1).dirichlet(np.ones(10), 6)
    target = (1 - amount) * soft + amount / 10
    batch = {"label": torch.tensor(soft.argmax(1)), "target": torch.tensor(soft)}
    student = {"logits": logits((6, 10), 0)}
    holds(smoothed(amount), lambda x: cross_entropy(x["logits"], target), student, batch=batch)


@pytest.mark.parametrize("soft", [False, True])
def test_rows_without_a_label_count_for_nothing(soft: bool) -> None:
    label = np.array([2, -1, 0, -1, 3])
    target = np.eye(4)[label] * (label >= 0)[:, None]
    batch = {"label": torch.tensor(label)} | ({"target": torch.tensor(target)} if soft else {})
    student = {"logits": logits((5, 4), 0)}
    gradient = holds(CrossEntropy(), lambda x: cross_entropy(x["logits"], target), student, batch=batch)["logits"]
    assert (gradient[label < 0] == 0).all()


@pytest.mark.parametrize("objective", [LabelSmoothing(0.1), Decoupled()])
def test_a_batch_without_any_label_gives_zero_and_a_zero_gradient(objective: nn.Module) -> None:
    batch = {"label": torch.tensor([-1, -1, -1])}
    student, teacher = {"logits": logits((3, 4), 0)}, {"logits": logits((3, 4), 1)}
    assert (holds(objective, lambda x: 0.0, student, teacher, batch)["logits"] == 0).all()


TEMPERED = {
    "kl": (SoftTargets, lambda s, t, label, tau: hinton(s, t, tau)),
    "mse-probs": (ProbabilitySquares, lambda s, t, label, tau: brier(s, t, tau)),
    "dkd": (Decoupled, lambda s, t, label, tau: decoupled(s, t, label, tau, 1.0, 8.0)),
    "dist": (Correlations, lambda s, t, label, tau: huang(s, t, tau, 1.0, 1.0)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tau", "standardize"), [(1.0, False), (4.0, False), (2.0, True)])
@pytest.mark.parametrize("name", TEMPERED)
def test_tempered(name: str, tau: float, standardize: bool, shape: tuple[int, int]) -> None:
    made, formula = TEMPERED[name]
    s, t, label = logits(shape, 0), logits(shape, 1), labels_of(shape)

    def expected(x: dict[str, Array]) -> float:
        pair = (z_scores(x["logits"]), z_scores(t)) if standardize else (x["logits"], t)
        return float(formula(*pair, label, tau))

    objective = made(tau=tau, standardize=standardize)
    holds(objective, expected, {"logits": s}, {"logits": t}, {"label": torch.tensor(label)})


@pytest.mark.parametrize("name", TEMPERED)
def test_ties_and_equal_images(name: str) -> None:
    made, formula = TEMPERED[name]
    s, t, label = tied(0), tied(1), np.array([0, 1, 2, 3, 1, 0])
    batch = {"label": torch.tensor(label)}
    holds(made(tau=2.0), lambda x: formula(x["logits"], t, label, 2.0), {"logits": s}, {"logits": t}, batch)


def test_decoupled_with_levels_and_rows_without_a_label() -> None:
    s, t, label = logits((6, 5), 0), logits((6, 5), 1), np.array([0, -1, 4, 2, -1, 2])

    def expected(x: dict[str, Array]) -> float:
        return decoupled(x["logits"], t, label, 3.0, 0.5, 2.0)

    found = holds(Decoupled(3.0, 0.5, 2.0), expected, {"logits": s}, {"logits": t}, {"label": torch.tensor(label)})
    assert (found["logits"][label < 0] == 0).all()


def test_decoupled_is_the_divergence_when_beta_is_the_teachers_doubt() -> None:
    """Zhao et al., eq. 6."""
    s, t = logits((1, 5), 0), logits((1, 5), 1)
    doubt = 1 - softmax(t)[0, 3]
    batch = {"label": torch.tensor([3])}
    objective = Decoupled(1.0, 1.0, float(doubt))
    holds(objective, lambda x: hinton(x["logits"], t, 1.0), {"logits": s}, {"logits": t}, batch)


def test_correlations_with_levels() -> None:
    s, t = logits((4, 6), 0), logits((4, 6), 1)
    objective = Correlations(2.0, beta=3.0, gamma=0.5)
    holds(objective, lambda x: huang(x["logits"], t, 2.0, 3.0, 0.5), {"logits": s}, {"logits": t})


@pytest.mark.parametrize("name", TEMPERED)
def test_constant_rows_are_finite(name: str) -> None:
    """A classifier that begins with zeros, standardized or correlated."""
    s = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = {"logits": torch.tensor(logits((3, 4), 1))}
    for standardize in (False, True):
        value = TEMPERED[name][0](standardize=standardize)({"logits": s}, teacher, {"label": torch.tensor([0, 1, 2])})
        value.mean().backward()
        assert torch.isfinite(value).all()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert (standardized(s) == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_logits(shape: tuple[int, int]) -> None:
    s, t = logits(shape, 0), logits(shape, 1)
    holds(LogitSquares(), lambda x: float(((x["logits"] - t) ** 2).mean()), {"logits": s}, {"logits": t})


def test_soft_targets_keep_their_gradients_size_as_the_temperature_rises() -> None:
    """Hinton et al., section 2.1: for high temperatures the gradient tends to (s - t) / (N K), both zero-meaned."""
    s, t = logits((4, 10), 0, 1.0), logits((4, 10), 1, 1.0)
    s, t = s - s.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    gradient = holds(SoftTargets(100.0), lambda x: hinton(x["logits"], t, 100.0), {"logits": s}, {"logits": t})
    np.testing.assert_allclose(gradient["logits"], (s - t) / 40, rtol=0.05, atol=1e-3)


def test_soft_targets_of_extreme_logits_are_finite() -> None:
    s, t = torch.tensor(logits((3, 10), 0, 3e4)).float().requires_grad_(), logits((3, 10), 1, 3e4)
    value = SoftTargets(1.0)({"logits": s}, {"logits": torch.tensor(t).float()}, {}).mean()
    value.backward()
    x = s.detach().numpy()
    assert value.item() == pytest.approx((x.max(1) - x[np.arange(3), t.argmax(1)]).mean(), rel=1e-5)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("name", [*TEMPERED, "mse-logits"])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name: str) -> None:
    made: Any = TEMPERED[name][0] if name in TEMPERED else LogitSquares
    x = torch.tensor(logits((4, 10), 0)).requires_grad_()
    value = made()({"logits": x}, {"logits": x.detach()}, {"label": torch.tensor([0, 1, 2, 3])}).mean()
    value.backward()
    assert value.item() == pytest.approx(0, abs=2e-5)  # dist: 1e-8 over the product of deviations
    assert x.grad is not None
    assert x.grad.abs().max() < 2e-5
