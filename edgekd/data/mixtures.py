"""Augmentation that blends the images of a batch and gives them soft labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..registry import register
from .augment import Batch

__all__ = ["CutMix", "Mixup"]


@register("augmentations", "mixup")
@dataclass(frozen=True)
class Mixup:
    """Each image is blended with another of its batch, in a share drawn from Beta(alpha, alpha) (Zhang et al. 2018)."""

    alpha: Annotated[float, Field(gt=0)] = 0.2

    def mix(self, batch: Batch, classes: int, generator: torch.Generator) -> Batch:
        image, share = batch["image"], _beta(self.alpha, generator)
        partner = torch.randperm(len(image), generator=generator)
        return _blended(batch, image * share + image[partner] * (1 - share), partner, share, classes)


@register("augmentations", "cutmix")
@dataclass(frozen=True)
class CutMix:
    """A rectangle of each image comes from another of its batch; labels mix by area (Yun et al. 2019)."""

    alpha: Annotated[float, Field(gt=0)] = 1.0

    def mix(self, batch: Batch, classes: int, generator: torch.Generator) -> Batch:
        image = batch["image"].clone()
        height, width = image.shape[2:]
        side = math.sqrt(1 - _beta(self.alpha, generator))
        centre_y = int(torch.randint(height, (), generator=generator))
        centre_x = int(torch.randint(width, (), generator=generator))
        half_y, half_x = int(height * side) // 2, int(width * side) // 2
        top, bottom = max(centre_y - half_y, 0), min(centre_y + half_y, height)
        left, right = max(centre_x - half_x, 0), min(centre_x + half_x, width)
        partner = torch.randperm(len(image), generator=generator)
        image[:, :, top:bottom, left:right] = batch["image"][partner, :, top:bottom, left:right]
        return _blended(batch, image, partner, 1 - (bottom - top) * (right - left) / (height * width), classes)


def _beta(alpha: float, generator: torch.Generator) -> float:
    # PyTorch's Beta distribution takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _blended(batch: Batch, image: Tensor, partner: Tensor, share: float, classes: int) -> Batch:
    """The batch with blended images and targets; where a label of the two is missing, the row is unlabelled (0s)."""
    label = batch["label"]
    target = batch.get("target")
    if target is None:
        target = torch.nn.functional.one_hot(label.clamp(min=0), classes).to(torch.float32)
    known = (label >= 0) & (label[partner] >= 0)
    mixed = (target * share + target[partner] * (1 - share)) * known[:, None]
    return {**batch, "image": image, "target": mixed, "label": torch.where(known, label, -1)}
