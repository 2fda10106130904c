"""A network after MobileNetV3-Small (Howard et al. 2019), with strides for 32x32 images."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import register
from .dropout import Dropout, dropped

__all__ = ["MobileNet", "mobilenet"]

#: kernel, expanded channels, output channels, squeeze-excite, hardswish (else ReLU), stride
_BLOCKS = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 1),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 384, 96, True, True, 1),
)


@register("models", "mobilenet")
def mobilenet(
    width: Annotated[float, Field(gt=0)] = 1.0,
    num_classes: Annotated[int, Field(gt=0)] = 10,
    in_channels: Annotated[int, Field(gt=0)] = 3,
    dropout: Dropout = 0.0,
) -> MobileNet:
    """MobileNetV3-like: inverted residuals, depthwise convolutions, squeeze-excite, hardswish; any width multiplier."""
    return MobileNet(width, num_classes, in_channels, dropout)


def _channels(width: float, channels: int) -> int:
    """Scaled to a multiple of 8 that is not more than 10 % below, as in the MobileNet papers."""
    scaled = width * channels
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class SqueezeExcite(nn.Module):
    """Each channel times a gate computed from all channels' means (Hu et al. 2018); 1x1 convolutions, hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _channels(0.25, channels)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-excite, linear 1x1 projection (Sandler et al. 2018)."""

    def __init__(
        self, inputs: int, expanded: int, outputs: int, kernel: int, excite: bool, hard: bool, stride: int
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        activation = nn.Hardswish if hard else nn.ReLU
        self.expand: nn.Module = nn.Identity()
        if expanded != inputs:
            self.expand = _conv(inputs, expanded, 1, activation=activation)
        self.depthwise = _conv(expanded, expanded, kernel, stride, groups=expanded, activation=activation)
        self.excite: nn.Module = SqueezeExcite(expanded) if excite else nn.Identity()
        self.project = _conv(expanded, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """stem, blocks, head, linear; an eighth of the input's side remains at the end."""

    def __init__(self, width: float, num_classes: int, in_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        channels = _channels(width, 16)
        self.stem = _conv(in_channels, channels, 3, activation=nn.Hardswish)
        blocks = []
        for kernel, expanded, outputs, excite, hard, stride in _BLOCKS:
            wide, narrow = _channels(width, expanded), _channels(width, outputs)
            blocks.append(InvertedResidual(channels, wide, narrow, kernel, excite, hard, stride))
            channels = narrow
        self.blocks = nn.Sequential(*blocks)
        last = _channels(width, 384)
        self.head = _conv(channels, last, 1, activation=nn.Hardswish)
        self.linear = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        x = self.head(self.blocks(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(dropped(x, self.dropout, self.training))


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None
) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))
