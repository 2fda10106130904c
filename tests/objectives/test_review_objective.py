"""Knowledge review against its paper's formulas in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from formulas import Array, averaging, fitted, holds, normal, repeating, resized, weight
from torch import nn

from edgekd.objectives.review import Review


def convolved(x: Array, kernel: Array) -> Array:
    """3 x 3 with a border of zeros, or 1 x 1."""
    side = kernel.shape[2]
    h, w = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    shifted = [
        np.einsum("oc,nchw->nohw", kernel[:, :, i, j], padded[:, :, i : i + h, j : j + w])
        for i in range(side)
        for j in range(side)
    ]
    return np.sum(shifted, axis=0)


def batch_normed(x: Array) -> Array:
    mean, variance = x.mean(axis=(0, 2, 3), keepdims=True), x.var(axis=(0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5)


def hierarchical(a: Array, b: Array) -> float:
    """The whole maps and, where they are larger, pools of 4, 2 and 1: weights 1, 1/2, 1/4, ... over their sum."""
    levels = [(a, b)]
    for side in (4, 2, 1):
        if side < a.shape[2]:
            levels.append((resized(a, (side, side), averaging), resized(b, (side, side), averaging)))
    weights = 0.5 ** np.arange(len(levels))
    return float(np.average([((x - y) ** 2).mean() for x, y in levels], weights=weights))


def reviewed(x: list[Array], t: list[Array], fusions: Any) -> float:
    """Chen et al., figure 4 (a) and (b): from the deepest stage up, each is fused with what came before."""
    total, below = 0.0, None
    for stage, teacher, fusion in reversed(list(zip(x, t, fusions, strict=True))):
        own = batch_normed(convolved(stage, weight(fusion.reduce[0])))
        if below is not None:
            below = resized(below, own.shape[2:], repeating)
            mix = convolved(np.concatenate([own, below], axis=1), weight(fusion.mix))
            shares = 1 / (1 + np.exp(-mix - fusion.mix.bias.detach().numpy()[None, :, None, None]))
            own = shares[:, :1] * own + shares[:, 1:] * below
        if own.shape[2:] != teacher.shape[2:]:
            own = resized(own, teacher.shape[2:], repeating)
        below = own
        total += hierarchical(batch_normed(convolved(own, weight(fusion.produce[0]))), teacher)
    return total


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([(3, 8, 8), (4, 4, 4), (5, 2, 2)], [(6, 8, 8), (7, 4, 4), (2, 2, 2)]),
        ([(3, 6, 6), (4, 3, 3)], [(2, 4, 4), (3, 6, 6)]),
        ([(3, 4, 4)], [(2, 4, 4)]),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_review(batch: int, student: list[tuple[int, ...]], teacher: list[tuple[int, ...]]) -> None:
    names = [f"layer{i}" for i in range(len(student))]
    s = {name: normal(batch, *shape, seed=i) for i, (name, shape) in enumerate(zip(names, student, strict=True))}
    t = {name: normal(batch, *shape, seed=9 + i) for i, (name, shape) in enumerate(zip(names, teacher, strict=True))}
    objective = fitted(Review(names, names), s, t)
    assert objective.fusions[-1].mix is None  # the deepest has nothing to be fused with

    def expected(x: dict[str, Array]) -> float:
        return reviewed([x[n] for n in names], [t[n] for n in names], objective.fusions)

    holds(objective, expected, {**s, "logits": normal(batch, 3)}, t)


def test_one_layer_may_review_several() -> None:
    s, t = {"a": normal(2, 3, 4, 4)}, {"b": normal(2, 3, 4, 4, seed=1), "c": normal(2, 4, 4, 4, seed=2)}
    objective = fitted(Review(["a", "a"], ["b", "c"]), s, t)
    assert isinstance(objective.fusions[0].mix, nn.Conv2d)

    def expected(x: dict[str, Array]) -> float:
        return reviewed([x["a"], x["a"]], [t["b"], t["c"]], objective.fusions)

    holds(objective, expected, {**s, "logits": normal(2, 3)}, t)
