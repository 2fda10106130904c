"""What a network is for: the metrics that judge it and the headline among them."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .bench import calibration_error
from .errors import RecipeError
from .recipe import Component
from .registry import bind, register

__all__ = ["Classification", "Task", "make_task"]


class Task(Protocol):
    """`metrics` maps logits [N, K] and labels [N] of a whole split to named figures."""

    headline: str
    direction: Literal["max", "min"]

    def metrics(self, logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> dict[str, float]: ...

    def correct(self, logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.bool_]: ...


@register("tasks", "classification")
class Classification:
    """One class per image; headline metric: top-1 accuracy."""

    headline = "accuracy"
    direction: Literal["max", "min"] = "max"

    def correct(self, logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """logits [N, K], labels [N] -> whether each image's answer is right [N]."""
        return np.asarray(logits.argmax(axis=1) == labels)

    def metrics(self, logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> dict[str, float]:
        """logits [N, K], labels [N] -> accuracy (a fraction), cross-entropy in nats, expected calibration error."""
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(axis=1))
        own = shifted[np.arange(len(labels)), labels]
        return {
            "accuracy": float(self.correct(logits, labels).mean()),
            "loss": float((log_sum - own).mean()),
            "ece": calibration_error(logits, labels),
        }


def make_task(spec: Component) -> Task:
    """The recipe's task. Raises UsageError or RecipeError."""
    component, args, problems = bind("tasks", spec.use, spec.args, "task")
    if problems:
        raise RecipeError(problems)
    return component(**args)
