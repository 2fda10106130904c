"""Contrastive objectives and their memories, and a network's own teacher, against formulas in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from formulas import Array, divergence, embedded, fitted, holds, normal, rows_to_unit, softmax, weight
from torch import Tensor

from edgekd.errors import UsageError
from edgekd.objectives.contrast import Contrast, SimilarityDistribution
from edgekd.objectives.own import OwnTeacher

IMAGES = 20


def mapped(layer: Any, x: Array) -> Array:
    made: Array = x @ weight(layer).T + layer.bias.detach().numpy()
    return made


def two_layers(layers: Any, x: Array) -> Array:
    return mapped(layers[2], np.maximum(mapped(layers[0], x), 0))


def numbers(buffer: Tensor) -> Array:
    return buffer.double().numpy().copy()


def contrasted(own: Array, memory: Array, index: Array, others: list[Array], tau: float, constant: float) -> float:
    """Tian et al., eq. 17 to 19 for one side: -log h(own) - sum over others of log(1 - h), N / M noise samples."""
    total = 0.0
    for x, i, rest in zip(own, index, others, strict=True):
        noise = len(rest) / len(memory)
        positive, negative = (np.exp(memory[k] @ x / tau) / constant for k in (i, rest))
        total -= np.log(positive / (positive + noise)) + np.log(noise / (negative + noise)).sum()
    return total / len(own)


CRD_CASES = [
    ([3, 7, 0, 11], [1, 0, 1, 2], "maps"),
    ([5], [0], "one"),
    ([3, 7, 9], [1, -1, 0], "unlabelled"),
    ([1, 2, 3], [0, 1, 1], "classes"),
]


@pytest.mark.parametrize(("index", "label", "case"), CRD_CASES)
def test_contrast(index: list[int], label: list[int], case: str) -> None:
    n, shape = len(index), {"maps": (3, 4, 4), "classes": (1000,)}.get(case, (6,))
    s = {"a": normal(n, *shape), "logits": np.zeros((n, 2))}
    t = {"b": normal(n, *(5, 2, 2) if case == "maps" else (7,), seed=1)}
    objective = fitted(Contrast("a", "b", size=8, negatives=12, tau=0.5), s, t, images=IMAGES)
    known = np.random.default_rng(2).integers(-1, 3, IMAGES)
    objective.labels.copy_(torch.tensor(known))
    objective.eval()  # the memory stays
    torch.manual_seed(5)
    drawn = torch.randint(IMAGES, (12,)).numpy()
    others = [
        np.array([k for k in drawn if k != i and (y < 0 or known[k] != y)]) for i, y in zip(index, label, strict=True)
    ]
    memories = [numbers(objective.teacher_memory), numbers(objective.student_memory)]
    taught = rows_to_unit(mapped(objective.teacher_map, embedded(t["b"])))

    def sides(x: Array) -> list[Array]:
        return [rows_to_unit(mapped(objective.student_map, embedded(x))), taught]

    def constant(own: Array, memory: Array) -> float:
        """M times the mean score of the first batch."""
        scores = np.array([[own[i] @ memory[k] for k in (index[i], *drawn)] for i in range(n)])
        return float(np.exp(scores / 0.5).mean() * IMAGES)

    kept = [constant(own, memory) for own, memory in zip(sides(s["a"]), memories, strict=True)]

    def expected(x: dict[str, Array]) -> float:
        pairs = zip(sides(x["a"]), memories, kept, strict=True)
        return sum(contrasted(own, memory, np.array(index), others, 0.5, z) for own, memory, z in pairs)

    batch = {"index": torch.tensor(index), "label": torch.tensor(label)}
    holds(objective, expected, s, t, batch, seed=5)
    # The constants are those of the first batch: another batch is measured by them.
    moved = {**s, "a": s["a"][::-1] + 0.5}
    holds(objective, expected, moved, t, batch, seed=5)


def test_the_memory_moves_in_training_only() -> None:
    s, t = {"logits": normal(3, 5)}, {"logits": normal(3, 5, seed=1)}
    objective = fitted(Contrast(size=4, negatives=8, momentum=0.25), s, t, images=IMAGES)
    before = numbers(objective.student_memory)
    batch = {"index": torch.tensor([4, 0, 9]), "label": torch.tensor([2, -1, 1])}
    given = [{"logits": torch.tensor(x["logits"])} for x in (s, t)]
    objective.eval()(*given, batch)
    assert (numbers(objective.student_memory) == before).all()
    objective.train()(*given, batch)
    after = before.copy()
    fresh = rows_to_unit(mapped(objective.student_map, s["logits"]))
    after[[4, 0, 9]] = rows_to_unit(0.25 * before[[4, 0, 9]] + 0.75 * fresh)
    np.testing.assert_allclose(numbers(objective.student_memory), after, rtol=1e-12)
    assert {i: int(y) for i, y in enumerate(objective.labels) if y >= 0} == {4: 2, 9: 1}


@pytest.mark.parametrize(("n", "student", "teacher"), [(4, (3, 4, 4), (6, 2, 2)), (1, (6,), (5,)), (3, (1000,), (4,))])
def test_similarity_distribution(n: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Fang et al., eq. 4 to 6: cross-entropy of similarities to the queue and the teacher's own embedding."""
    s, t = {"a": normal(n, *student), "logits": np.zeros((n, 2))}, {"b": normal(n, *teacher, seed=1)}
    if n > 1:
        t["b"][1] = t["b"][0]  # two images that the teacher cannot tell apart
    objective = fitted(SimilarityDistribution("a", "b", queue=16, tau=0.3, tau_teacher=0.1), s, t)
    queue, taught = numbers(objective.queue), rows_to_unit(embedded(t["b"]))

    def expected(x: dict[str, Array]) -> float:
        own = rows_to_unit(two_layers(objective.map, embedded(x["a"])))
        total = 0.0
        for z, y in zip(own, taught, strict=True):
            several = np.vstack([y, queue])
            p, q = softmax((several @ y / 0.1)[None]), softmax((several @ z / 0.3)[None])
            total -= float((p * np.log(q)).sum())
        return total / n

    holds(objective.eval(), expected, s, t)


def test_the_queue_takes_the_newest_in_place_of_the_oldest() -> None:
    s, t = {"a": normal(3, 4)}, {"b": normal(3, 4, seed=1)}
    objective = fitted(SimilarityDistribution("a", "b", queue=4), s, t).train()
    rows = [normal(3, 4, seed=seed) for seed in (2, 3)]
    for fresh in rows:
        objective({"a": torch.tensor(s["a"]), "logits": torch.zeros(3, 2)}, {"b": torch.tensor(fresh)}, {})
    first, second = (rows_to_unit(x) for x in rows)
    np.testing.assert_allclose(numbers(objective.queue), [second[1], second[2], first[2], second[0]], rtol=1e-12)
    assert int(objective.next) == 2


@pytest.mark.parametrize("label", [[2, 0, 1, 2], [0, -1, 0, -1], [1]])
def test_own_teacher(label: list[int]) -> None:
    """Zhang et al., eq. 4 to 6, with the square's mean: the last classifier and the deepest feature teach."""
    n, marked = len(label), np.array(label) >= 0
    s = {"a": normal(n, 3, 4, 4), "b": normal(n, 5, 2, 2, seed=1), "c": normal(n, 6, seed=2)}
    objective = fitted(OwnTeacher(["a", "b", "c"], tau=2.0, alpha=0.4, beta=0.1), {**s, "logits": normal(n, 3)})
    assert len(objective.heads) == 2
    last, deepest = normal(n, 3, seed=3), s["c"].copy()

    def expected(x: dict[str, Array]) -> float:
        total = 0.0
        for tap, inner, head in zip("ab", objective.maps, objective.heads, strict=True):
            feature = two_layers(inner, embedded(x[tap]))
            logits = mapped(head, feature)
            own = -np.log(softmax(logits)[marked, np.array(label)[marked]]).mean()
            taught = 4.0 * divergence(softmax(last / 2), softmax(logits / 2)).mean()
            total += 0.6 * own + 0.4 * taught + 0.1 * ((feature - deepest) ** 2).mean()
        return float(total)

    gradient = holds(objective, expected, {**s, "logits": last}, {}, {"label": torch.tensor(label)})
    assert (gradient["logits"] == 0).all()
    assert (gradient["c"] == 0).all()


def test_own_teacher_learns_soft_targets_of_mixed_images() -> None:
    s = {"a": normal(2, 4), "c": normal(2, 6, seed=2), "logits": normal(2, 3, seed=3)}
    soft = np.array([[0.3, 0.7, 0.0], [0.0, 0.5, 0.5]])
    objective = fitted(OwnTeacher(["a", "c"], alpha=0.0, beta=0.0), s)

    def expected(x: dict[str, Array]) -> float:
        logits = mapped(objective.heads[0], two_layers(objective.maps[0], x["a"]))
        return float(-(soft * np.log(softmax(logits))).sum() / 2)

    holds(objective, expected, s, {}, {"label": torch.tensor([1, 1]), "target": torch.tensor(soft)})


def test_own_teacher_needs_a_layer_below_the_deepest() -> None:
    with pytest.raises(UsageError, match="two taps"):
        OwnTeacher(["a"])
