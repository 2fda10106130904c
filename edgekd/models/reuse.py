"""A network that feeds somebody else's classifier: what the objective `classifier-reuse` trains."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..recipe import Component, ComponentField
from ..registry import register
from .build import build, specify
from .taps import Tapped

__all__ = ["Reuse", "reuse"]


STUDENT = Component(use="cifar-resnet")


@register("models", "reuse")
def reuse(
    student: ComponentField = STUDENT,
    tap: Annotated[str, Field(description="module whose maps [N, C, H, W] go on; what lies behind it is dropped")] = "",
    channels: Annotated[int, Field(gt=0, description="input width of the teacher's classifier")] = 64,
    num_classes: Annotated[int, Field(gt=0)] = 10,
    in_channels: Annotated[int, Field(gt=0)] = 3,
    image_size: Annotated[int, Field(gt=0)] = 32,
) -> Reuse:
    """A student up to `tap`, a projector, and a classifier that is the teacher's (SimKD: Chen et al. 2022)."""
    size = [in_channels, image_size, image_size]
    network = build(specify(student.use, student.args, classes=num_classes, size=size, where="model.student"))
    return Reuse(network, tap, channels, num_classes, size)


class Reuse(nn.Module):
    """`student` up to a tap, `projector` (1x1, 3x3, 1x1 convolutions as in the paper's code), mean, `classifier`."""

    def __init__(self, student: nn.Module, tap: str, channels: int, num_classes: int, size: list[int]) -> None:
        super().__init__()
        with torch.no_grad():
            found = Tapped(student.eval(), [tap])(torch.zeros(1, *size))[tap]
        student.train()
        if found.ndim != 4:
            raise UsageError(f"{tap!r} gives {list(found.shape)}, expected maps [N, C, H, W]", where="model.tap")
        self.student, self.tap = Tapped(student, [tap]), tap
        middle = max(channels // 2, 1)
        self.projector = nn.Sequential(
            *_block(found.shape[1], middle, 1), *_block(middle, middle, 3), *_block(middle, channels, 1)
        )
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        maps = self.projector(self.student(x)[self.tap])
        return self.classifier(F.adaptive_avg_pool2d(maps, 1).flatten(1))


def _block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
