"""What moves the weights: optimizer, learning-rate schedule, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .recipe import Training

__all__ = ["Averaged", "learning_rate", "make_optimizer"]


def learning_rate(settings: Training, progress: float) -> float:
    """The learning rate after a share `progress` in [0, 1] of all steps.

    All schedules rise linearly during `warmup`; then `one-cycle` falls linearly to zero (Smith 2018,
    arXiv:1803.09820), `cosine` along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983),
    and `constant` stays.
    """
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    rest = (progress - settings.warmup) / (1 - settings.warmup)
    if settings.schedule == "one-cycle":
        return settings.lr * (1 - rest)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * rest))
    return settings.lr


def make_optimizer(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """SGD (Nesterov) or AdamW; weight decay on matrices and kernels only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


class Averaged:
    """Exponential moving average of a network's parameters and of its batch-norm statistics.

    The decay warms up as (1 + step) / (10 + step), so that the first steps do not linger.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(_averaged_tensors(network))
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._live.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged values; called twice, nothing has changed."""
        for name, live in self._live.items():
            kept = live.detach().clone()
            live.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.tensors[name].copy_(value)


def _averaged_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            yield name, parameter  # not its data: preparing for several processes exchanges it
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield name, buffer
