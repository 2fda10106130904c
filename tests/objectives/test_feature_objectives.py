"""The hint on features: adapters, sizes, values and gradients against NumPy, and taps that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgekd.errors import UsageError
from edgekd.objectives.feature import Hint

Array = NDArray[np.float64]


def hint(student: Array, teacher: Array) -> tuple[Hint, float, Array, Array, Array]:
    """The fitted objective, its value, gradients of features and adapter, and the adapter's matrix [out, in]."""
    torch.manual_seed(0)
    objective = Hint("a", "b")
    s = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    t = torch.tensor(teacher, dtype=torch.float32)
    objective.fit({"a": s}, {"b": t})
    value = objective({"a": s}, {"b": t}, {}).mean()
    value.backward()
    weight = next(objective.parameters())
    assert s.grad is not None
    assert weight.grad is not None
    matrix = weight.detach().double().numpy().reshape(weight.shape[:2])
    return objective, value.item(), s.grad.double().numpy(), weight.grad.double().numpy().reshape(matrix.shape), matrix


def features(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def interpolation(inputs: int, outputs: int) -> Array:
    """[outputs, inputs]: linear interpolation between pixel centres, with the border repeated."""
    matrix = np.zeros((outputs, inputs))
    for row in range(outputs):
        position = min(max((row + 0.5) * inputs / outputs - 0.5, 0), inputs - 1)
        low = int(position)
        high = min(low + 1, inputs - 1)
        matrix[row, low] += 1 - (position - low)
        matrix[row, high] += position - low
    return matrix


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 6, 6), (8, 6, 6)), ((8, 5, 7), (3, 10, 7)), ((2, 8, 8), (2, 4, 4))]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_maps(batch: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    s, t = features(batch, *student), features(batch, *teacher, seed=1)
    objective, value, to_features, to_adapter, w = hint(s, t)
    assert isinstance(objective.adapter, nn.Conv2d)
    assert objective.adapter.bias is None
    rows, columns = interpolation(student[1], teacher[1]), interpolation(student[2], teacher[2])
    adapted = np.einsum("oc,nchw->nohw", w, s)
    difference = np.einsum("ih,jw,nohw->noij", rows, columns, adapted) - t
    assert value == pytest.approx((difference**2).mean(), rel=1e-5)
    back = np.einsum("ih,jw,noij->nohw", rows, columns, 2 * difference / difference.size)
    np.testing.assert_allclose(to_features, np.einsum("oc,nohw->nchw", w, back), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(to_adapter, np.einsum("nohw,nchw->oc", back, s), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("student", "teacher"), [((1, 6), (1, 9)), ((5, 4), (5, 4)), ((2, 7, 6), (2, 7, 3))])
def test_vectors_and_sequences(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    s, t = features(*student), features(*teacher, seed=1)
    objective, value, to_features, to_adapter, w = hint(s, t)
    assert isinstance(objective.adapter, nn.Linear)
    difference = s @ w.T - t
    assert value == pytest.approx((difference**2).mean(), rel=1e-5)
    np.testing.assert_allclose(to_features, 2 * difference / difference.size @ w, rtol=1e-4, atol=1e-7)
    flat, rest = (2 * difference / difference.size).reshape(-1, teacher[-1]), s.reshape(-1, student[-1])
    np.testing.assert_allclose(to_adapter, flat.T @ rest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 4, 6, 6), (2, 4)), ((2, 9, 4), (2, 4)), ((2, 9, 4), (2, 16, 4)), ((2, 3, 4, 4, 4), (2, 3, 4, 4, 4))],
)
def test_features_of_other_kinds_are_refused(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="tap layers of the same kind") as raised:
        Hint("a", "b").fit({"a": torch.zeros(student)}, {"b": torch.zeros(teacher)})
    assert str(list(student)) in raised.value.problem.what
    assert str(list(teacher)) in raised.value.problem.what
