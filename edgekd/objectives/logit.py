"""Objectives on logits."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import register

__all__ = ["CrossEntropy", "LogitSquares", "SoftTargets"]

Outputs = dict[str, Tensor]


@register("objectives", "ce")
class CrossEntropy(nn.Module):
    """Cross-entropy with the labels, in nats; rows without a label (-1) are skipped."""

    needs_teacher = False

    def __init__(self, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K], and labels [N] or (after mixup or cutmix) soft targets [N, K] -> mean over labelled rows."""
        logits, labels = student["logits"], batch["label"]
        labelled = labels >= 0
        target = batch.get("target", labels)
        if not bool(labelled.all()):
            logits, target = logits[labelled], target[labelled]
        if len(logits) == 0:
            return student["logits"].sum() * 0.0
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)


@register("objectives", "kl")
class SoftTargets(nn.Module):
    """KL divergence between tempered class probabilities (Hinton, Vinyals, Dean 2015, arXiv:1503.02531)."""

    def __init__(self, tau: Annotated[float, Field(gt=0)] = 4.0) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of both -> scalar in nats, times tau^2 so that gradients keep their size."""
        log_q = F.log_softmax(student["logits"] / self.tau, dim=1)
        log_p = F.log_softmax(teacher["logits"] / self.tau, dim=1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * self.tau**2


@register("objectives", "mse-logits")
class LogitSquares(nn.Module):
    """Mean squared distance of logits (Ba and Caruana 2014, arXiv:1312.6184)."""

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of both -> mean over N and K."""
        return F.mse_loss(student["logits"], teacher["logits"])
