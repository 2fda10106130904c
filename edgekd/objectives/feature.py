"""Objectives on features inside the networks, reached by module path."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register

__all__ = ["Hint"]

Outputs = dict[str, Tensor]


@register("objectives", "hint")
class Hint(nn.Module):
    """Mean squared distance of features through a learned adapter (FitNets: Romero et al. 2015, arXiv:1412.6550)."""

    def __init__(self, student: str, teacher: str) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student,), (teacher,)
        self.adapter: nn.Module = nn.Identity()

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Size the adapter: a 1x1 convolution for maps [N, C, H, W], a linear layer for [N, C] and [N, T, C]."""
        s, t = student[self.student_taps[0]], teacher[self.teacher_taps[0]]
        # Maps are brought to one size; sequences of different lengths have no such meaning.
        if s.ndim != t.ndim or s.ndim not in (2, 3, 4) or (s.ndim == 3 and s.shape[1] != t.shape[1]):
            raise UsageError(
                f"{self.student_taps[0]!r} gives {list(s.shape)}, the teacher's {self.teacher_taps[0]!r} "
                f"{list(t.shape)}",
                where="hint",
                hint="tap layers of the same kind: maps with maps, vectors with vectors, sequences of one length",
            )
        channels = -1 if s.ndim != 4 else 1
        sizes = s.shape[channels], t.shape[channels]
        # Made even when sizes agree: the student's basis need not be the teacher's.
        adapter = nn.Conv2d(*sizes, 1, bias=False) if s.ndim == 4 else nn.Linear(*sizes, bias=False)
        self.adapter = adapter.to(s.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Features [N, C, H, W] (or [N, C], [N, T, C]) -> mean; maps take the size of the teacher's."""
        s, t = self.adapter(student[self.student_taps[0]]), teacher[self.teacher_taps[0]]
        if s.ndim == 4 and s.shape[2:] != t.shape[2:]:
            s = F.interpolate(s, size=t.shape[2:], mode="bilinear", align_corners=False)
        return F.mse_loss(s.float(), t)
