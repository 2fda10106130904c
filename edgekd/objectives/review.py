"""Knowledge review: every stage of the student learns from the teacher's stages up to its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import register
from .feature import Taps, check_maps, check_pairs

__all__ = ["Review"]

Outputs = dict[str, Tensor]


@register("objectives", "review")
class Review(nn.Module):
    """Deep student features, fused step by step into shallower ones, imitate the teacher's (2021).

    Source: Chen et al. 2021 (ReviewKD), arXiv:2104.09044, which weighs it by 0.6 to 5 and ramps it up.

    Taps go from shallow to deep.
    """

    snippet = (
        'objectives = ["ce", "kl", { use = "review", student = ["layer1", "layer2", "layer3"], '
        'teacher = ["layer1", "layer2", "layer3"], weight = 0.6 }]'
    )

    def __init__(self, student: Taps, teacher: Taps) -> None:
        super().__init__()
        check_pairs(student, teacher)
        self.student_taps, self.teacher_taps = tuple(student), tuple(teacher)
        self.fusions = nn.ModuleList()

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """One fusion per pair, inside as wide as the deepest student tap, at most 512. Raises UsageError."""
        check_maps(student, self.student_taps, "review.student")
        check_maps(teacher, self.teacher_taps, "review.teacher")
        middle = min(512, student[self.student_taps[-1]].shape[1])
        self.fusions = nn.ModuleList()
        for i, (a, b) in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            deepest = i == len(self.student_taps) - 1
            fusion = Fusion(student[a].shape[1], middle, teacher[b].shape[1], residual=not deepest)
            self.fusions.append(fusion.to(student[a].device))

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Maps [N, C, H, W] -> [N], summed over pairs; the student's take the teacher's size."""
        total = student["logits"].new_zeros(())
        residual = None
        for fusion, a, b in reversed(list(zip(self.fusions, self.student_taps, self.teacher_taps, strict=True))):
            made, residual = fusion(student[a], residual, teacher[b].shape[2:])
            total = total + pyramid_distance(made.to(teacher[b].dtype), teacher[b])
        return total


class Fusion(nn.Module):
    """The paper's attention-based fusion: two learned weights per pixel mix a stage with what came from below it."""

    def __init__(self, inputs: int, middle: int, outputs: int, residual: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.produce = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.mix = nn.Conv2d(2 * middle, 2, 1) if residual else None

    def forward(self, x: Tensor, residual: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[N, inputs, H, W] and the deeper residual -> what is compared [N, outputs, *size], and the new residual."""
        x = self.reduce(x)
        if self.mix is not None and residual is not None:
            residual = F.interpolate(residual, size=x.shape[2:], mode="nearest")
            shares = torch.sigmoid(self.mix(torch.cat([x, residual], dim=1)))
            x = x * shares[:, :1] + residual * shares[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="nearest")
        return self.produce(x), x


def pyramid_distance(a: Tensor, b: Tensor) -> Tensor:
    """The paper's hierarchical context loss per row: squared distances whole and pooled to 4, 2, 1 pixels a side.

    Maps [N, C, H, W] of one size. Weights are halved from level to level and divided by their sum.
    """
    total, weight, weights = (a - b).square().flatten(1).mean(dim=1), 1.0, 1.0
    for side in (4, 2, 1):
        if side < a.shape[2]:
            weight /= 2
            weights += weight
            gap = F.adaptive_avg_pool2d(a, side) - F.adaptive_avg_pool2d(b, side)
            total = total + weight * gap.square().flatten(1).mean(dim=1)
    return total / weights
