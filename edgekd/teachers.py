"""Where a student's targets come from: teacher sources.

A source is an `nn.Module` registered under the kind `teachers`: built as `Source(network, **args)`,
called as `source(batch, students) -> [outputs]`, one dict of tensors per student, without gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .registry import register

__all__ = ["Frozen"]

Outputs = dict[str, Tensor]


@register("teachers", "frozen")
class Frozen(nn.Module):
    """A trained network that never changes and answers every batch anew."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """image [N, C, H, W] -> the same outputs for every student."""
        outputs = self.network(batch["image"])
        return [outputs for _ in students]
