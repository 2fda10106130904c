"""Several networks as one: what an ensemble of students is at deployment."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..artifact import ModelSpec
from ..registry import register
from .build import build
from .taps import outputs

__all__ = ["Average", "average"]


@register("models", "averaged")
def average(members: Annotated[list[dict[str, Any]], Field(min_length=1, examples=[[]])]) -> Average:
    """Networks side by side, whose logits are averaged; the stage `average` writes their specs."""
    return Average([build(ModelSpec.model_validate(member)) for member in members])


class Average(nn.Module):
    """The mean of the members' logits."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, K]."""
        return torch.stack([outputs(member(x))["logits"] for member in self.members]).mean(dim=0)
