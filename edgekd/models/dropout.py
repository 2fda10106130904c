"""Dropout in front of a classifier: the parameter of the shipped networks, and what it does."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

__all__ = ["Dropout", "dropped"]

Dropout = Annotated[float, Field(ge=0, lt=1, description="share of the classifier's inputs left out in training")]


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Features [N, D] with a share of them at 0 and the others scaled up (Srivastava et al. 2014). No module: there is
    nothing in it to tap, prune or export."""
    return F.dropout(x, share, training) if share else x
