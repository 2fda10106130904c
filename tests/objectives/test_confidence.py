"""Teachers weighed per image by their own loss, against CA-MKD's formula by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import Array, normal, softmax

from edgekd.teachers.ensemble import confidence


def by_hand(losses: list[float]) -> Array:
    """Zhang et al., eq. 5: w_k = (1 - exp(CE_k) / sum over j of exp(CE_j)) / (K - 1)."""
    powers = np.exp(losses)
    return (1 - powers / powers.sum()) / (len(losses) - 1)


def weights(logits: Array, label: list[int], known: list[list[bool]] | None = None) -> Array:
    everything = np.ones((len(logits), logits.shape[2]), dtype=bool)
    said = torch.tensor(everything if known is None else known)
    return confidence(torch.tensor(logits), torch.tensor(label), said).numpy()


@pytest.mark.parametrize(("teachers", "classes"), [(2, 3), (3, 10), (5, 1000)])
def test_the_surer_of_the_label_the_heavier(teachers: int, classes: int) -> None:
    logits, label = normal(teachers, 4, classes, scale=2.0), [0, 2, 1, 2]
    found = weights(logits, label)
    for i, y in enumerate(label):
        losses = [float(-np.log(softmax(logits[m, i : i + 1])[0, y])) for m in range(teachers)]
        np.testing.assert_allclose(found[:, i], by_hand(losses), rtol=1e-9)
        assert found[:, i].argmax() == int(np.argmin(losses))
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-12)


def test_a_hand_made_case() -> None:
    """Probabilities of the label 1/2, 1/4, 1/4: exp(CE) = 2, 4, 4."""
    logits = np.log([[[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]], [[0.25, 0.25, 0.5]]])
    np.testing.assert_allclose(weights(logits, [0])[:, 0], [0.4, 0.3, 0.3], rtol=1e-12)


def test_rows_without_a_label_and_equal_teachers_weigh_alike() -> None:
    logits = normal(3, 2, 4)
    np.testing.assert_allclose(weights(logits, [-1, 0])[:, 0], 1 / 3, rtol=1e-12)
    alike = np.repeat(logits[:1], 3, axis=0)
    np.testing.assert_allclose(weights(alike, [1, 3]), 1 / 3, rtol=1e-12)


def test_teachers_of_some_classes() -> None:
    """Weighed among those that know the label, by their loss over the classes that they know."""
    logits = normal(3, 3, 4)
    known = [[True, True, False, False], [True, False, True, False], [True, True, True, False]]
    found = weights(logits, [0, 1, 3], known)
    losses = []
    for m in range(3):
        some = np.flatnonzero(known[m])
        losses.append([float(-np.log(softmax(logits[m, :1, some].T)[0, 0])), 0.0])
        if known[m][1]:
            losses[m][1] = float(-np.log(softmax(logits[m, 1:2, some].T)[0, list(some).index(1)]))
    np.testing.assert_allclose(found[:, 0], by_hand([own for own, _ in losses]), rtol=1e-9)
    np.testing.assert_allclose(found[[0, 2], 1], by_hand([losses[0][1], losses[2][1]]), rtol=1e-9)
    assert found[1, 1] == 0
    assert (found[:, 2] == 0).all()  # nobody knows it


def test_the_only_one_that_knows_the_label_and_the_only_teacher() -> None:
    logits = normal(2, 1, 3)
    assert weights(logits, [2], [[True, True, False], [True, True, True]])[:, 0].tolist() == [0, 1]
    assert weights(logits[:1], [2])[:, 0].tolist() == [1]
