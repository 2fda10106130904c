"""Objectives on the student's own weights, which prepare it for pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from ..registry import register

__all__ = ["NormSparsity"]

Outputs = dict[str, Tensor]


@register("objectives", "bn-sparsity")
class NormSparsity(nn.Module):
    """L1 norm of the batch norms' scales: channels that matter little fade (Network Slimming 2017).

    Source: Liu et al. 2017, arXiv:1708.06519.

    For a distillation before `prune` with importance = "bn-scale", with a weight of 1e-5 to 1e-4 (the paper's). The
    stage after it heals with the same objectives unless its `heal.objectives` says otherwise.
    """

    snippet = 'objectives = ["ce", "kl", { use = "bn-sparsity", weight = 1e-4 }]'
    needs_teacher = False

    def __init__(self) -> None:
        super().__init__()
        self.scales: tuple[nn.Parameter, ...] = ()  # a tuple is not registered: they are the student's, not copies

    def begin(self, student: nn.Module, teacher: nn.Module | None, images: int) -> None:
        """Find the scales. Raises UsageError where the student has none."""
        norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
        self.scales = tuple(norm.weight for norm in norms if norm.weight is not None)
        if not self.scales:
            hint = "leave it out, and rank channels by another importance: edgekd list importances"
            raise UsageError("the student has no batch normalisation with a scale", hint=hint)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Sum of |gamma| over all channels of all batch norms -> scalar; its gradient is sign(gamma), 0 at 0."""
        return torch.stack([scale.abs().sum() for scale in self.scales]).sum()
