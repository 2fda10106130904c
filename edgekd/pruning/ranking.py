"""How much each channel matters, by magnitude, by batch normalisation's scale, or by a Taylor expansion of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import StageError, UsageError
from .graph import ChannelGroup, slices
from .plan import Importance

__all__ = ["channel_importance", "with_gradients"]


def channel_importance(network: nn.Module, group: ChannelGroup, importance: Importance) -> Tensor | None:
    """The importance of every channel of a group, float64 [channels], at least 0; None where it is undefined.

    magnitude: L2 norm of the filters that produce the channel, over all layers that are added up into it, without
        biases and norms (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017).
    bn-scale: sum of |gamma| of the batch norms behind it (Liu et al., Network Slimming, ICCV 2017); None without one.
    taylor: sum of |weight x gradient| over all weights that make, scale or read the channel: to first order, what the
        loss changes by without each (Molchanov et al., Importance Estimation, CVPR 2019; over the whole group as
        Torch-Pruning does). `network` needs gradients.
    """
    scores = torch.zeros(group.channels, dtype=torch.float64)
    defined = False
    for edit in group.edits:
        norm = edit.pruner == "BatchnormPruner"
        wanted = {"magnitude": edit.produces, "bn-scale": norm, "taylor": True}[importance]
        if not wanted:
            continue
        for _, tensor, dim in slices(network, edit)[:1]:
            values = tensor.detach().double()
            if importance == "magnitude":
                values = values**2
            elif importance == "taylor":
                if tensor.grad is None:
                    continue
                values = values * tensor.grad.double()
            defined = True
            per_slice = values.abs().movedim(dim, 0).flatten(1).sum(1) if values.dim() > 1 else values.abs()
            scores.index_add_(0, torch.tensor(edit.roots), per_slice.cpu()[list(edit.indices)])
    if not defined:
        return None
    return scores.sqrt() if importance == "magnitude" else scores


def with_gradients(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> nn.Module:
    """A copy of the network in evaluation mode that holds the gradient of `loss(copy)`. Raises StageError."""
    twin = copy.deepcopy(network).eval().requires_grad_(True)
    twin.zero_grad(set_to_none=True)
    with torch.enable_grad():
        value = loss(twin)
    if value.numel() != 1 or not value.requires_grad:
        raise UsageError(
            f"taylor importance needs a scalar loss that depends on the weights, got shape {list(value.shape)}",
            where="importance",
        )
    value.backward()
    if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in twin.parameters()):
        raise StageError(
            "the calibration loss has no finite gradient",
            where="importance",
            hint='check the weights and the calibration images, or use importance = "magnitude"',
        )
    return twin
