"""The ResNets for 32x32 images of He, Zhang, Ren and Sun (2016), section 4.2: 6n+2 layers, three widths."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..registry import register
from .dropout import Dropout, dropped

__all__ = ["CifarResNet", "cifar_resnet"]


def _valid_depth(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        below = max(8, depth - (depth - 2) % 6)
        near = "8" if depth < 8 else f"{below} and {below + 6}"
        raise ValueError(f"must be 6n+2, n ≥ 1 (nearest: {near})")
    return depth


@register("models", "cifar-resnet")
def cifar_resnet(
    depth: Annotated[int, AfterValidator(_valid_depth)] = 20,
    width: Annotated[int, Field(gt=0)] = 16,
    shortcut: Literal["pad", "conv"] = "pad",
    num_classes: Annotated[int, Field(gt=0)] = 10,
    in_channels: Annotated[int, Field(gt=0)] = 3,
    dropout: Dropout = 0.0,
) -> CifarResNet:
    """CIFAR ResNet of 6n+2 layers; `pad` shortcuts are parameter-free (option A), `conv` ones 1x1 (option B)."""
    return CifarResNet((depth - 2) // 6, width, shortcut, num_classes, in_channels, dropout)


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels, half of them on either side.

    It shifts the residual stream's channels, so that stream cannot be pruned; the channels within blocks can.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, ceil(H/stride), ceil(W/stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = (
                PadShortcut(inputs, outputs, stride)
                if shortcut == "pad"
                else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            )

    def forward(self, x: Tensor) -> Tensor:
        # In place: on a CPU, fresh memory for every activation costs a tenth of a training step.
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class CifarResNet(nn.Module):
    """conv1 bn1 layer1 layer2 layer3 linear, named as in the widely used published weights."""

    def __init__(
        self, blocks: int, width: int, shortcut: str, num_classes: int, in_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1, shortcut)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(dropped(x, self.dropout, self.training))


def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))
