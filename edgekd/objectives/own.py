"""Objectives in which a network teaches itself."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register
from .feature import Taps
from .logit import label_cross_entropy
from .relation import embedding

__all__ = ["OwnTeacher"]

Outputs = dict[str, Tensor]
Level = Annotated[float, Field(ge=0)]


@register("objectives", "byot")
class OwnTeacher(nn.Module):
    """Classifiers on inner layers learn from the labels and from the network's own last one (BYOT 2019).

    Source: Zhang et al. 2019, Be Your Own Teacher, arXiv:1905.08094.

    They train the layers below them and are not exported. The last of the `student` taps is the deepest feature: it
    feeds the network's own classifier and gets no other, the taps before it imitate it. `alpha` weighs the divergence
    from the last classifier against the labels, `beta` the features (their mean square, where the paper sums).
    """

    snippet = 'objectives = ["ce", { use = "byot", student = ["layer1", "layer2", "layer3"] }]'
    needs_teacher = False

    def __init__(
        self,
        student: Taps,
        tau: Annotated[float, Field(gt=0)] = 3.0,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.3,
        beta: Level = 0.03,
    ) -> None:
        super().__init__()
        if len(student) < 2:
            hint = "the layers that get a classifier, and last the one that they imitate"
            raise UsageError("needs two taps or more", where="student", hint=hint)
        self.student_taps, self.tau, self.alpha, self.beta = tuple(student), tau, alpha, beta
        self.maps, self.heads = nn.ModuleList(), nn.ModuleList()

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """A map to the deepest feature's width and a classifier for each tap but the last."""
        wide = embedding(student[self.student_taps[-1]]).shape[1]
        classes = student["logits"].shape[1]
        device = student["logits"].device
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(embedding(student[tap]).shape[1], wide), nn.ReLU(), nn.Linear(wide, wide)).to(
                device
            )
            for tap in self.student_taps[:-1]
        )
        self.heads = nn.ModuleList(nn.Linear(wide, classes).to(device) for _ in self.maps)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Taps [N, ...] and logits [N, K] of the student, labels [N] or soft targets [N, K] -> [N] in nats; the last
        classifier is not moved by what it teaches. Rows without a label learn from it alone."""
        last = student["logits"].detach()
        deepest = embedding(student[self.student_taps[-1]]).detach()
        log_p = F.log_softmax(last / self.tau, dim=1)
        total = last.new_zeros(())
        for inner, head, tap in zip(self.maps, self.heads, self.student_taps[:-1], strict=True):
            feature = inner(embedding(student[tap]))
            logits = head(feature).to(last.dtype)
            log_q = F.log_softmax(logits / self.tau, dim=1)
            divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1) * self.tau**2
            own = label_cross_entropy(logits, batch)
            near = (feature.to(last.dtype) - deepest).square().mean(dim=1)
            total = total + (1 - self.alpha) * own + self.alpha * divergence + self.beta * near
        return total
