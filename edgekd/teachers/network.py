"""A trained network as a teacher, and one that knows some of the classes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, nearest
from ..registry import register
from .folded import folded

__all__ = ["Frozen", "Placed", "knows"]

Outputs = dict[str, Tensor]


@register("teachers", "frozen")
class Frozen(nn.Module):
    """A trained network that never changes and answers every batch anew; the default.

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """

    snippet = 'objectives = [{ use = "ce", weight = 0.1 }, { use = "kl", weight = 0.9, tau = 4.0 }]\nsource = "frozen"'
    repeatable = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not bool(knows(network).all()):
            raise UsageError(
                "this teacher does not know all classes", where="source", hint="source = 'ensemble', with more teachers"
            )
        self.network = folded(network)

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """image [N, C, H, W] -> the same outputs for every student."""
        outputs = self.network(batch["image"])
        return [outputs for _ in students]


class Placed(nn.Module):
    """A teacher with what an ensemble needs to know: its classes within those of the data, and its accuracy.

    `classes` are the teacher's own, `among` those of the data. Raises UsageError for a class the data do not have.
    `accuracy` is that on the validation split, None where those images may have trained it.
    """

    known: Tensor
    columns: Tensor

    def __init__(
        self, network: nn.Module, classes: Sequence[str], among: Sequence[str], accuracy: float | None = None
    ) -> None:
        super().__init__()
        for name in classes:
            if name not in among:
                what = f"the teacher's class {name!r} is none of the data's"
                raise UsageError(what, where="classes", hint=nearest(name, among))
        self.network, self.accuracy, self.classes = network, accuracy, len(among)
        self.register_buffer("columns", torch.tensor([list(among).index(name) for name in classes]))
        known = torch.zeros(len(among), dtype=torch.bool)
        known[self.columns] = True
        self.register_buffer("known", known)

    def forward(self, x: Tensor) -> Outputs:
        """[N, C, H, W] -> the network's outputs; logits [N, K] in the data's order, 0 for unknown classes."""
        outputs: Outputs = self.network(x)
        logits = outputs["logits"]
        if len(self.columns) == self.classes and bool((self.columns[1:] > self.columns[:-1]).all()):
            return outputs
        return {**outputs, "logits": logits.new_zeros(len(logits), self.classes).index_copy(1, self.columns, logits)}


def knows(network: nn.Module) -> Tensor:
    """bool [K]: the classes that a teacher knows; [1] with True where it says nothing about it."""
    known = getattr(network, "known", None)
    return known if isinstance(known, Tensor) else torch.ones(1, dtype=torch.bool)
