from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as reference
from sklearn.metrics import precision_recall_fscore_support

from edgekd.bench import calibration_error, class_figures, confusion_matrix, packed, unpacked


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    logits = rng.normal(0, 1, (400, 5)).astype(np.float32)
    logits[np.arange(400), labels] += 1.5
    return logits, labels


def test_calibration_error_is_the_formula_bin_by_bin(answers):
    logits, labels = answers
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = 0.0
    for b in range(15):
        inside = (p.max(axis=1) > b / 15) & (p.max(axis=1) <= (b + 1) / 15)
        if inside.any():
            right = (p.argmax(axis=1) == labels)[inside]
            expected += inside.mean() * abs(right.mean() - p.max(axis=1)[inside].mean())
    assert calibration_error(logits, labels) == pytest.approx(expected, rel=1e-4)


def test_a_sure_network_that_is_wrong_half_the_time_is_off_by_half():
    logits = np.full((100, 2), -50.0)
    logits[:, 0] = 50.0
    labels = np.array([0, 1] * 50)
    assert calibration_error(logits, labels) == pytest.approx(0.5)
    assert calibration_error(logits, np.zeros(100, int)) == pytest.approx(0, abs=1e-9)


def test_confusions_and_class_figures_are_those_of_scikit_learn(answers):
    logits, labels = answers
    found = confusion_matrix(logits.argmax(1), labels, 5)
    assert (found == reference(labels, logits.argmax(1))).all()
    precision, recall, _, images = precision_recall_fscore_support(labels, logits.argmax(1))
    figures = class_figures(found, list("abcde"))
    assert [f.recall for f in figures] == pytest.approx(recall)
    assert [f.precision for f in figures] == pytest.approx(precision)
    assert [f.images for f in figures] == list(images)


def test_a_class_without_images_or_answers_has_no_figure():
    (absent, never) = class_figures(confusion_matrix(np.array([0, 0]), np.array([1, 1]), 2), ["absent", "never"])
    assert (absent.recall, absent.precision) == (None, 0.0)
    assert (never.recall, never.precision) == (0.0, None)


@pytest.mark.parametrize("n", [1, 8, 9, 1000])
def test_answers_are_packed_and_come_back(n):
    bits = np.random.default_rng(n).random(n) < 0.5
    assert (unpacked(packed(bits), n) == bits).all()
    with pytest.raises(ValueError, match="expected"):
        unpacked(packed(bits), n + 8)
