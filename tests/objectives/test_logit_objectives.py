"""Objectives on logits: values and gradients against float64 formulas written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.objectives.logit import CrossEntropy, LabelSmoothing, LogitSquares, SoftTargets

Array = NDArray[np.float64]
SHAPES = [(1, 2), (1, 1000), (7, 10), (32, 1000)]


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def logits(shape: tuple[int, int], seed: int, scale: float = 3.0) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32).astype(np.float64)


def evaluated(objective: nn.Module, student: Array, teacher: Array | None, **batch: Tensor) -> tuple[float, Array]:
    """The objective's value in float32 and its gradient with respect to the student's logits."""
    s = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    t = {} if teacher is None else {"logits": torch.tensor(teacher, dtype=torch.float32)}
    rows = objective({"logits": s}, t, batch)
    assert rows.shape == (len(student),)
    value = rows.mean()
    value.backward()
    assert s.grad is not None
    return value.item(), s.grad.double().numpy()


def smoothed(amount: float) -> nn.Module:
    return LabelSmoothing(amount) if amount else CrossEntropy()


def close(found: tuple[float, Array], value: float, gradient: Array) -> None:
    assert found[0] == pytest.approx(value, rel=2e-5, abs=2e-6)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-4, atol=2e-6 * max(1e-3, np.abs(gradient).max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_labels(shape: tuple[int, int], smoothing: float) -> None:
    n, k = shape
    x = logits(shape, 0)
    labels = np.random.default_rng(1).integers(0, k, n)
    target = np.full(shape, smoothing / k)
    target[np.arange(n), labels] += 1 - smoothing
    expected = -(target * log_softmax(x)).sum(axis=1).mean()
    gradient = (np.exp(log_softmax(x)) - target) / n
    close(evaluated(smoothed(smoothing), x, None, label=torch.tensor(labels)), expected, gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_with_soft_targets(smoothing: float) -> None:
    x = logits((6, 10), 0)
    soft = np.random.default_rng(1).dirichlet(np.ones(10), 6).astype(np.float32).astype(np.float64)
    target = (1 - smoothing) * soft + smoothing / 10
    found = evaluated(
        smoothed(smoothing),
        x,
        None,
        label=torch.tensor(soft.argmax(1)),
        target=torch.tensor(soft, dtype=torch.float32),
    )
    expected = -(target * log_softmax(x)).sum(axis=1).mean()
    close(found, expected, (np.exp(log_softmax(x)) - target) / 6)


@pytest.mark.parametrize("soft", [False, True])
def test_unlabelled_rows_count_for_nothing(soft: bool) -> None:
    x = logits((5, 4), 0)
    labels = np.array([2, -1, 0, -1, 3])
    rows = labels >= 0
    target = np.eye(4)[labels] * rows[:, None]
    batch = {"label": torch.tensor(labels)} | ({"target": torch.tensor(target, dtype=torch.float32)} if soft else {})
    expected = -(target * log_softmax(x)).sum() / rows.sum()
    gradient = (np.exp(log_softmax(x)) - target) * rows[:, None] / rows.sum()
    found = evaluated(CrossEntropy(), x, None, **batch)
    close(found, expected, gradient)
    assert (found[1][~rows] == 0).all()


def test_a_batch_without_any_label_gives_zero_and_a_zero_gradient() -> None:
    value, gradient = evaluated(LabelSmoothing(0.1), logits((3, 4), 0), None, label=torch.tensor([-1, -1, -1]))
    assert value == 0.0
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_soft_targets(shape: tuple[int, int], tau: float) -> None:
    s, t = logits(shape, 0), logits(shape, 1)
    log_q, log_p = log_softmax(s / tau), log_softmax(t / tau)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean() * tau**2
    gradient = tau * (np.exp(log_q) - np.exp(log_p)) / shape[0]
    close(evaluated(SoftTargets(tau), s, t), expected, gradient)


def test_soft_targets_keep_their_gradients_size_as_the_temperature_rises() -> None:
    """Hinton et al., section 2.1: for high temperatures the gradient tends to (s - t) / (N K), both zero-meaned."""
    s, t = logits((4, 10), 0, 1.0), logits((4, 10), 1, 1.0)
    s, t = s - s.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    _, gradient = evaluated(SoftTargets(100.0), s, t)
    np.testing.assert_allclose(gradient, (s - t) / 40, rtol=0.05, atol=1e-3)


def test_soft_targets_of_extreme_logits_are_finite() -> None:
    s, t = logits((3, 10), 0, 3e4), logits((3, 10), 1, 3e4)
    value, gradient = evaluated(SoftTargets(1.0), s, t)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert value == pytest.approx((s.max(1) - s[np.arange(3), t.argmax(1)]).mean(), rel=1e-5)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    x = logits((4, 10), 0)
    for objective in (SoftTargets(), LogitSquares()):
        value, gradient = evaluated(objective, x, x)
        assert value == pytest.approx(0, abs=1e-6)
        assert np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_logits(shape: tuple[int, int]) -> None:
    s, t = logits(shape, 0), logits(shape, 1)
    close(evaluated(LogitSquares(), s, t), ((s - t) ** 2).mean(), 2 * (s - t) / s.size)


def test_gradients_agree_with_differences_of_the_value() -> None:
    """Not by formula: a step along a direction changes the value by the gradient's share of it."""
    s, t, direction = logits((3, 5), 0), logits((3, 5), 1), logits((3, 5), 2, 1.0)
    labels = torch.tensor([1, -1, 4])
    objectives: list[Any] = [LabelSmoothing(0.1), SoftTargets(2.0), LogitSquares()]
    for objective in objectives:
        _, gradient = evaluated(objective, s, t, label=labels)

        def at(step: float, objective: Any = objective) -> float:
            x = {"logits": torch.tensor(s + step * direction)}
            return objective(x, {"logits": torch.tensor(t)}, {"label": labels}).mean().item()

        assert (at(1e-5) - at(-1e-5)) / 2e-5 == pytest.approx((gradient * direction).sum(), rel=1e-4)
