"""Objectives on relations: values and gradients against the papers' formulas in float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from formulas import Array, averaging, embedded, holds, normal, resized, rows_to_unit

from edgekd.errors import UsageError
from edgekd.objectives.relation import Probabilistic, Relational, Similarity, SolutionFlow

#: Student and teacher features: vectors, maps of other sizes and widths, tokens, 1,000 classes, one image, two.
FEATURES = [
    ((5, 4), (5, 4)),
    ((4, 3, 6, 5), (4, 7, 2, 2)),
    ((3, 5, 4), (3, 6, 2)),
    ((6, 1000), (6, 1000)),
    ((1, 4), (1, 4)),
    ((2, 4), (2, 3)),
]


def huber(a: Array, b: Array) -> Array:
    gap = np.abs(a - b)
    return np.where(gap <= 1, gap**2 / 2, gap - 0.5)


def distances(x: Array) -> Array:
    """Park et al., eq. 4 and 5: over their mean; that counts different images only, as in the paper's code."""
    made = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
    apart = made[made > 0]
    return made / apart.mean() if len(apart) else made


def angles(x: Array) -> Array:
    """Park et al., eq. 7: cosines of the angle that i and k enclose at j, 0 where two are the same."""
    n = len(x)
    made = np.zeros((n, n, n))
    for j in range(n):
        to = x - x[j]
        lengths = np.sqrt((to**2).sum(axis=1))
        apart = np.flatnonzero(lengths)
        directions = to[apart] / lengths[apart, None]
        made[j][np.ix_(apart, apart)] = directions @ directions.T
    return made


def relational(s: Array, t: Array, distance: float = 25.0, angle: float = 50.0) -> float:
    s, t = embedded(s), embedded(t)
    apart, bent = huber(distances(s), distances(t)).mean(), huber(angles(s), angles(t)).mean()
    return float(distance * apart + angle * bent)


def preserved(s: Array, t: Array) -> float:
    """Tung and Mori, eq. 2 to 4."""
    a, b = (x.reshape(len(x), -1) for x in (s, t))
    gap = rows_to_unit(a @ a.T) - rows_to_unit(b @ b.T)
    return float((gap**2).sum() / len(a) ** 2)


def picks(x: Array) -> Array:
    """Passalis and Tefas, eq. 5 and 8: the cosine kernel, normalised over the other images; 1 on the diagonal."""
    made = np.eye(len(x))
    for i in range(len(x)):
        others = [k for k in range(len(x)) if k != i]
        kernel = np.array([x[i] @ x[k] / np.sqrt((x[i] @ x[i]) * (x[k] @ x[k])) + 1 for k in others]) / 2
        made[i, others] = kernel / kernel.sum() if others else kernel
    return made


def probabilistic(s: Array, t: Array) -> float:
    q, p = picks(embedded(s)), picks(embedded(t))
    return float((p * np.log(p / q)).sum() / len(q))


COMPARING: dict[str, tuple[Callable[..., Any], Callable[[Array, Array], float]]] = {
    "rkd": (Relational, relational),
    "similarity": (Similarity, preserved),
    "pkt": (Probabilistic, probabilistic),
}


@pytest.mark.parametrize(("student", "teacher"), FEATURES)
@pytest.mark.parametrize("name", COMPARING)
def test_images_compared(name: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    made, formula = COMPARING[name]
    s, t = {"a": normal(*student)}, {"b": normal(*teacher, seed=1)}
    holds(made("a", "b"), lambda x: formula(x["a"], t["b"]), {**s, "logits": np.zeros((student[0], 2))}, t)


@pytest.mark.parametrize("name", COMPARING)
def test_equal_images(name: str) -> None:
    made, formula = COMPARING[name]
    s, t = {"a": normal(5, 4), "logits": np.zeros((5, 2))}, {"b": normal(5, 3, seed=1)}
    for x in (s["a"], t["b"]):
        x[[2, 4]] = x[0]
    holds(made("a", "b"), lambda x: formula(x["a"], t["b"]), s, t, equal=[0, 2, 4])


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("case", ["dead", "one dead", "alike"])
def test_what_the_student_cannot_tell_apart_gives_no_endless_gradient(name: str, case: str) -> None:
    """A network that says zeros, or the same to two images that the teacher tells apart."""
    x = torch.tensor(normal(4, 3)).float()
    x[1] = x[0]
    x[{"dead": [0, 1, 2, 3], "one dead": [3], "alike": []}[case]] = 0.0
    x.requires_grad_()
    teacher = {"b": torch.tensor(normal(4, 3, seed=1)).float()}
    value = COMPARING[name][0]("a", "b")({"a": x, "logits": x}, teacher, {})
    value.backward()
    assert torch.isfinite(value)
    assert x.grad is not None
    assert x.grad.abs().max() < 100


@pytest.mark.parametrize(("name", "made"), [("rkd", Relational()), ("pkt", Probabilistic())])
def test_without_taps_logits_are_compared(name: str, made: Any) -> None:
    s, t = {"logits": normal(4, 10)}, {"logits": normal(4, 10, seed=1)}
    holds(made, lambda x: COMPARING[name][1](x["logits"], t["logits"]), s, t)
    with pytest.raises(UsageError, match="both taps or neither"):
        type(made)("a")


@pytest.mark.parametrize(("distance", "angle"), [(2.0, 0.0), (0.0, 3.0)])
def test_distances_and_angles_apart(distance: float, angle: float) -> None:
    s, t = {"logits": normal(5, 3)}, {"logits": normal(5, 3, seed=1)}
    objective = Relational(distance=distance, angle=angle)
    holds(objective, lambda x: relational(x["logits"], t["logits"], distance, angle), s, t)


@pytest.mark.parametrize("name", COMPARING)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name: str) -> None:
    x = torch.tensor(normal(5, 4)).requires_grad_()
    value = COMPARING[name][0]("a", "a")({"a": x, "logits": x}, {"a": x.detach()}, {})
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-12


def flow(first: Array, second: Array) -> Array:
    """Yim et al., eq. 1: G = sum over pixels of F1 F2 / (h w), the larger map pooled."""
    n, m, h, w = (*first.shape[:2], *np.minimum(first.shape[2:], second.shape[2:]))
    a, b = resized(first, (h, w), averaging), resized(second, (h, w), averaging)
    made = np.zeros((n, m, b.shape[1]))
    for i in range(h):
        for j in range(w):
            made += a[:, :, i, j][:, :, None] * b[:, :, i, j][:, None] / (h * w)
    return made


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [((6, 6), (3, 3), (3, 3)), ((5, 4), (4, 5), (2, 2))])
def test_solution_flow(batch: int, sizes: tuple[tuple[int, int], ...]) -> None:
    names, widths = ["a", "b", "c"], (2, 3, 4)
    s = {n: normal(batch, c, *hw, seed=c) for n, c, hw in zip(names, widths, sizes, strict=True)}
    t = {n: normal(batch, c, 4, 4, seed=9 + c) for n, c in zip(names, widths, strict=True)}

    def expected(x: dict[str, Array]) -> float:
        gaps = [flow(x[i], x[j]) - flow(t[i], t[j]) for i, j in (("a", "b"), ("b", "c"))]
        return float(sum((gap**2).mean() for gap in gaps))

    objective = SolutionFlow(names, names)
    objective.fit({n: torch.tensor(x) for n, x in s.items()}, {n: torch.tensor(x) for n, x in t.items()})
    holds(objective, expected, {**s, "logits": np.zeros((batch, 2))}, t)


def test_solution_flow_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(UsageError, match="two taps"):
        SolutionFlow(["a"], ["a"])
    maps = {"a": torch.zeros(1, 2, 4, 4), "b": torch.zeros(1, 3, 4, 4)}
    with pytest.raises(UsageError, match="2 channels"):
        SolutionFlow(["a", "b"], ["b", "a"]).fit(maps, maps)
