"""Objectives on features: values and gradients against the papers' formulas in float64 NumPy, and taps that misfit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from formulas import Array, fitted, holds, interpolating, normal, pooled_to_smaller, resized, rows_to_unit, weight
from torch import nn

from edgekd.errors import UsageError
from edgekd.objectives.feature import Attention, Hidden, Hint
from edgekd.objectives.reuse import ClassifierReuse

MAPS = [((4, 6, 6), (8, 6, 6)), ((8, 5, 7), (3, 10, 7)), ((2, 8, 8), (2, 4, 4))]
LOGITS = normal(1, 10)


def squares(gap: Array) -> float:
    return float((gap**2).mean())


@pytest.mark.parametrize(("student", "teacher"), MAPS)
@pytest.mark.parametrize("batch", [1, 3])
def test_hint_of_maps(batch: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    s, t = {"a": normal(batch, *student)}, {"b": normal(batch, *teacher, seed=1)}
    objective = fitted(Hint("a", "b"), s, t)
    assert isinstance(objective.adapter, nn.Conv2d)
    assert objective.adapter.bias is None
    w = weight(objective.adapter)[:, :, 0, 0]

    def expected(x: dict[str, Array]) -> float:
        return squares(resized(np.einsum("oc,nchw->nohw", w, x["a"]), teacher[1:], interpolating) - t["b"])

    holds(objective, expected, s, t)


@pytest.mark.parametrize(("student", "teacher"), [((1, 6), (1, 9)), ((5, 4), (5, 4)), ((2, 7, 6), (2, 7, 3))])
def test_hint_of_vectors_and_sequences(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    s, t = {"a": normal(*student)}, {"b": normal(*teacher, seed=1)}
    objective = fitted(Hint("a", "b"), s, t)
    assert isinstance(objective.adapter, nn.Linear)
    w = weight(objective.adapter)
    holds(objective, lambda x: squares(x["a"] @ w.T - t["b"]), s, t)
    # The adapter learns too: d mean((xW' - t)^2) / dW.
    rest = (2 * (s["a"] @ w.T - t["b"]) / t["b"].size).reshape(-1, teacher[-1])
    found = objective.adapter.weight.grad.numpy()
    np.testing.assert_allclose(found, rest.T @ s["a"].reshape(-1, student[-1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("made", [Hint("a", "b"), Hidden(["a"], ["b"])])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 4, 6, 6), (2, 4)), ((2, 9, 4), (2, 4)), ((2, 9, 4), (2, 16, 4)), ((2, 3, 4, 4, 4), (2, 3, 4, 4, 4))],
)
def test_features_of_other_kinds_are_refused(made: Any, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="tap layers of the same kind") as raised:
        made.fit({"a": torch.zeros(student)}, {"b": torch.zeros(teacher)})
    assert str(list(student)) in raised.value.problem.what
    assert str(list(teacher)) in raised.value.problem.what


def test_hidden_states_of_a_narrower_student_and_of_one_as_wide() -> None:
    s = {"first": normal(2, 5, 4), "second": normal(2, 5, 6, seed=1)}
    t = {"one": normal(2, 5, 7, seed=2), "two": normal(2, 5, 6, seed=3)}
    objective = fitted(Hidden(["first", "second"], ["one", "two"]), s, t)
    assert isinstance(objective.adapters[1], nn.Identity)
    w = weight(objective.adapters[0])
    holds(objective, lambda x: squares(x["first"] @ w.T - t["one"]) + squares(x["second"] - t["two"]), s, t)


def test_hidden_vectors_of_one_row() -> None:
    s, t = {"a": normal(1, 6)}, {"b": normal(1, 6, seed=1)}
    holds(fitted(Hidden(["a"], ["b"]), s, t), lambda x: squares(x["a"] - t["b"]), s, t)


def test_hidden_maps_of_one_size_only() -> None:
    s, t = {"a": normal(2, 3, 4, 4)}, {"b": normal(2, 5, 4, 4, seed=1)}
    objective = fitted(Hidden(["a"], ["b"]), s, t)
    w = weight(objective.adapters[0])[:, :, 0, 0]
    holds(objective, lambda x: squares(np.einsum("oc,nchw->nohw", w, x["a"]) - t["b"]), s, t)
    with pytest.raises(UsageError) as raised:
        fitted(Hidden(["a"], ["b"]), s, {"b": normal(2, 5, 2, 2)})
    assert "`hint`" in raised.value.problem.hint


def attended(x: Array, y: Array) -> float:
    """Zagoruyko and Komodakis, eq. 2 with F^2: energies over channels, to length 1, apart."""
    a, b = pooled_to_smaller((x**2).mean(axis=1, keepdims=True), (y**2).mean(axis=1, keepdims=True))
    n = len(x)
    return squares(rows_to_unit(a.reshape(n, -1)) - rows_to_unit(b.reshape(n, -1)))


@pytest.mark.parametrize(("student", "teacher"), [*MAPS, ((3, 4, 9), (3, 6, 5))])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention(batch: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    s, t = {"a": normal(batch, *student), "logits": LOGITS}, {"b": normal(batch, *teacher, seed=1)}
    holds(Attention(["a"], ["b"]), lambda x: attended(x["a"], t["b"]), s, t)


def test_attention_of_pairs_adds_up() -> None:
    s = {"a": normal(2, 3, 4, 4), "c": normal(2, 5, 2, 2), "logits": LOGITS}
    t = {"b": normal(2, 3, 4, 4, seed=1), "d": normal(2, 2, 2, 2, seed=1)}
    objective = Attention(["a", "c"], ["b", "d"])
    holds(objective, lambda x: attended(x["a"], t["b"]) + attended(x["c"], t["d"]), s, t)


def test_attention_of_equal_pixels_and_of_dead_maps() -> None:
    """Ties: a map without contrast. All zeros look nowhere: the value counts, the gradient is 0, not infinite."""
    t = {"b": normal(2, 3, 3, 3, seed=1)}
    even = np.ones((2, 3, 3, 3))
    holds(Attention(["a"], ["b"]), lambda x: attended(x["a"], t["b"]), {"a": even, "logits": LOGITS}, t)
    dead = {"a": torch.zeros(2, 3, 3, 3, requires_grad=True), "logits": torch.zeros(2, 4)}
    Attention(["a"], ["b"])(dead, {"b": torch.tensor(t["b"]).float()}, {}).mean().backward()
    assert dead["a"].grad is not None
    assert (dead["a"].grad == 0).all()


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 6, 6), (4, 6, 6)), ((3, 8, 5), (3, 4, 7)), ((2, 4, 4), (2, 9, 9))]
)
def test_classifier_reuse(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Chen et al., eq. 2: squared distance of the maps, the larger pooled."""
    s, t = {"projector": normal(2, *student)}, {"b": normal(2, *teacher, seed=1)}

    def expected(x: dict[str, Array]) -> float:
        a, b = pooled_to_smaller(x["projector"], t["b"])
        return squares(a - b)

    holds(ClassifierReuse("b"), expected, s, t)


def test_the_student_classifies_as_the_teacher_when_its_maps_agree() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projector, self.classifier = nn.Identity(), nn.Linear(4, 3)

    student, teacher = Student(), nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    ClassifierReuse("0", classifier="1").begin(student, teacher, 0)
    x = torch.randn(5, 4)
    assert torch.equal(student.classifier(x), teacher(x))
    assert not student.classifier.weight.requires_grad
    with pytest.raises(UsageError) as raised:
        ClassifierReuse("0", classifier="fc").begin(student, teacher, 0)
    assert raised.value.problem.hint == "its linear layers: 1"
