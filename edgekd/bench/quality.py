"""What classification logits say beyond one accuracy: calibration, classes, confusions. Pure NumPy."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .results import ClassFigures

__all__ = ["calibration_error", "class_figures", "confusion_matrix", "packed", "unpacked"]


def calibration_error(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error of logits [N, K] against labels [N]: a fraction, 0 is perfect.

    Guo, Pleiss, Sun, Weinberger 2017, On Calibration of Modern Neural Networks: answers are binned by the probability
    that the network gives them, and the bins' |accuracy - confidence| is averaged by their numbers of images.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted)
    confidence = 1 / probabilities.sum(axis=1)  # of the answer, whose shifted logit is 0
    right = logits.argmax(axis=1) == labels
    place = np.minimum((np.ceil(confidence * bins) - 1).astype(int), bins - 1)
    gaps = [abs(float((right[place == b] - confidence[place == b]).sum())) for b in range(bins)]
    return sum(gaps) / len(labels)


def confusion_matrix(answers: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts [true class, answer]."""
    return np.bincount(labels * classes + answers, minlength=classes * classes).reshape(classes, classes)


def class_figures(confusion: NDArray[np.int64], names: Sequence[str]) -> list[ClassFigures]:
    """Recall and precision of every class."""
    right, images, answers = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return [
        ClassFigures(
            name=name,
            images=int(images[i]),
            recall=float(right[i] / images[i]) if images[i] else None,
            precision=float(right[i] / answers[i]) if answers[i] else None,
        )
        for i, name in enumerate(names)
    ]


def packed(correct: ArrayLike) -> str:
    """bool [N] as base64, eight images a byte."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode()


def unpacked(text: str, images: int) -> NDArray[np.bool_]:
    """What `packed` packed. Raises ValueError when it is not that of so many images."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if not images <= len(bits) < images + 8:
        raise ValueError(f"answers of {len(bits)} images, expected {images}")
    return bits[:images].astype(bool)
