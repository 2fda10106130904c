"""How much each channel matters: by its weights, its norm's scale, its activations, or the loss's derivatives."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StageError, UsageError
from ..models import outputs
from .graph import ChannelGroup, Edit, slices
from .plan import Importance

__all__ = ["IMPORTANCES", "channel_importance", "evidence", "labelled", "unlabelled", "unranked"]

#: What `edgekd list importances` says of each.
IMPORTANCES: dict[Importance, str] = {
    "magnitude": "L2 norm of the filters that make the channel (He et al. 2018, arXiv:1808.06866)",
    "magnitude-l1": "L1 norm of the filters that make the channel (Li et al. 2017, arXiv:1608.08710)",
    "lamp": "squared norm over the sum of all as large (Lee et al. 2021, arXiv:2010.07611)",
    "bn-scale": "|scale| of its batch norm, trained with bn-sparsity (Liu et al. 2017, arXiv:1708.06519)",
    "fpgm": "distance to the layer's other filters: the replaceable go (He et al. 2019, arXiv:1811.00250)",
    "taylor": "|weight x gradient| of the healing loss, first order (Molchanov et al. 2019, arXiv:1906.10771)",
    "hessian": "Optimal Brain Damage, weight^2 x empirical Fisher / 2 (LeCun et al. 1989; Theis et al. 2018)",
    "activation": "mean |activation| that the next layers read (Molchanov et al. 2017, arXiv:1611.06440)",
    "random": "drawn by the recipe's seed: the control",
}
#: A value for every weight of a tensor that an edit slices, by its name; None where it does not count.
Values = Callable[[Edit, str, Tensor], Tensor | None]


def channel_importance(
    network: nn.Module, group: ChannelGroup, importance: Importance, found: Mapping[str, Tensor], seed: int = 0
) -> Tensor | None:
    """The importance of every channel of a group that can be pruned, float64 [channels], at least 0; None if undefined.

    `found` is what `evidence` measured of this network. With F_c the weights, without biases, that produce channel c
    in all layers that are added up into it (outputs of a convolution or linear layer, depthwise ones too):

    magnitude: ||F_c||_2 (as He et al., Soft Filter Pruning, IJCAI 2018).
    magnitude-l1: ||F_c||_1 (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017).
    lamp: ||F_c||^2 / sum of ||F_d||^2 over c and all larger d (Lee et al., Layer-adaptive Sparsity for the
        Magnitude-based Pruning, ICLR 2021; there of single weights). It orders the channels of one group as magnitude
        does, and differs between groups.
    fpgm: sum over d of ||F_c - F_d||_2 (He et al., Filter Pruning via Geometric Median, CVPR 2019).
    bn-scale: sum of |gamma| of the batch norms behind it (Liu et al., Network Slimming, ICCV 2017); None without one.
    taylor: sum of |w dL/dw| over all weights that make, scale or read the channel: to first order, what the loss L
        changes by without each (Molchanov et al., Importance Estimation, CVPR 2019; over the whole group as
        Torch-Pruning does).
    hessian: sum of h w^2 / 2 over the same weights (LeCun, Denker, Solla, Optimal Brain Damage, NIPS 1989): what the
        loss grows by at a minimum with a diagonal Hessian. h is not the Hessian itself, but the diagonal of the
        empirical Fisher information, which is one at a minimum (Theis et al., Faster Gaze Prediction, 2018).
    activation: mean |x| over images and positions, summed over the layers that read the channel, so behind norm and
        activation function (Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017); None where
        no layer reads it in a forward pass.
    random: uniform in [0, 1), the same for the same seed and group.
    """
    made = _summed(network, group, lambda edit, _, tensor: tensor**2 if edit.produces else None)
    if importance == "magnitude":
        return None if made is None else made.sqrt()
    if importance == "magnitude-l1":
        return _summed(network, group, lambda edit, _, tensor: tensor.abs() if edit.produces else None)
    if importance == "lamp":
        return None if made is None else _lamp(made)
    if importance == "fpgm":
        return _distances(network, group)
    if importance == "bn-scale":
        norms = "BatchnormPruner"
        return _summed(network, group, lambda edit, _, tensor: tensor.abs() if edit.pruner == norms else None)
    if importance == "taylor":
        return _summed(network, group, lambda _, name, w: (w * found[name]).abs() if name in found else None)
    if importance == "hessian":
        return _summed(network, group, lambda _, name, w: 0.5 * w**2 * found[name] if name in found else None)
    if importance == "activation":
        return _read(group, found)
    digest = hashlib.sha256(f"{seed} {group.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(group.channels, generator=generator, dtype=torch.float64)


def unranked(importance: Importance) -> str:
    """Why `channel_importance` gives None."""
    reasons = {"bn-scale": "no batch normalisation follows", "activation": "no layer reads them"}
    return reasons.get(importance, "the loss does not depend on them")


def _summed(network: nn.Module, group: ChannelGroup, values: Values) -> Tensor | None:
    """The sum of the values of all weights that belong to each channel: [channels]."""
    scores = torch.zeros(group.channels, dtype=torch.float64)
    defined = False
    for edit in group.edits:
        for name, tensor, dim in slices(network, edit)[:1]:
            value = values(edit, name, tensor.detach().double().cpu())
            if value is None:
                continue
            defined = True
            scores.index_add_(0, torch.tensor(edit.roots), _rows(value, dim, edit).sum(1))
    return scores if defined else None


def _rows(value: Tensor, dim: int, edit: Edit) -> Tensor:
    """[slices of the edit, all else]."""
    return value.movedim(dim, 0).reshape(value.shape[dim], -1)[list(edit.indices)]


def _lamp(squares: Tensor) -> Tensor:
    ascending, order = squares.sort(stable=True)
    larger = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = ascending / larger.clamp_min(torch.finfo(squares.dtype).tiny)
    return scores


def _distances(network: nn.Module, group: ChannelGroup) -> Tensor | None:
    squares = torch.zeros(group.channels, group.channels, dtype=torch.float64)
    producers = [edit for edit in group.edits if edit.produces]
    for edit in producers:
        _, tensor, dim = slices(network, edit)[0]
        rows = _rows(tensor.detach().double().cpu(), dim, edit)
        # Not by the scalar product, which leaves rounding errors where filters are equal.
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        roots = torch.tensor(edit.roots)
        squares.index_put_((roots[:, None], roots[None, :]), distances**2, accumulate=True)
    return squares.sqrt().sum(1) if producers else None


def _read(group: ChannelGroup, found: Mapping[str, Tensor]) -> Tensor | None:
    scores = torch.zeros(group.channels, dtype=torch.float64)
    readers = [edit for edit in group.edits if edit.consumes and edit.path in found]
    for edit in readers:
        scores.index_add_(0, torch.tensor(edit.roots), found[edit.path][list(edit.indices)])
    return scores if readers else None


def evidence(
    network: nn.Module,
    importance: Importance,
    *,
    loss: Callable[[nn.Module], Tensor] | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Tensor]:
    """What an importance has to measure of the network, which is not changed; empty where it looks at weights only.

    taylor: parameter name -> gradient of `loss`, which is called once with a copy of the network in evaluation mode
        and returns a scalar.
    hessian: parameter name -> mean square over the images of the gradient of each image's cross-entropy, from
        `batches` of {"image": [N, C, H, W], "label": [N]}; those with a negative label have none and do not count. One
        backward pass per image.
    activation: path of each convolution and linear layer -> mean |input| of each of its input channels [C].
    Raises UsageError where `loss`, `batches` or every label is missing or the loss is no scalar, StageError where
    something is not finite.
    """
    if importance == "taylor":
        return _gradients(network, loss)
    if importance not in ("hessian", "activation"):
        return {}
    if not batches:
        raise UsageError(f'importance = "{importance}" needs calibration images', where="importance")
    twin = copy.deepcopy(network).eval().requires_grad_(True)
    found = _squared_gradients(twin, batches) if importance == "hessian" else _inputs(twin, batches)
    return _finite(found, importance)


def labelled(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images and labels of those rows of a batch that have a label: a negative one stands for none."""
    known = batch["label"] >= 0
    return batch["image"][known], batch["label"][known]


def unlabelled(importance: Importance) -> UsageError:
    """There is nothing to differentiate."""
    what = f'importance = "{importance}" needs labels, and no calibration image has one'
    return UsageError(what, where="importance", hint='importance = "magnitude" needs none')


def _gradients(network: nn.Module, loss: Callable[[nn.Module], Tensor] | None) -> dict[str, Tensor]:
    if loss is None:
        raise UsageError('importance = "taylor" needs a calibration loss', where="importance")
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
    return _finite({name: p.grad.double().cpu() for name, p in _parameters(twin) if p.grad is not None}, "taylor")


def _squared_gradients(network: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}
    images = 0
    for batch in batches:
        known, labels = labelled(batch)
        for image, label in zip(known, labels, strict=True):
            network.zero_grad(set_to_none=True)
            with torch.enable_grad():
                nn.functional.cross_entropy(outputs(network(image[None]))["logits"], label[None]).backward()
            for name, parameter in _parameters(network):
                if parameter.grad is not None:
                    square = parameter.grad.double().cpu() ** 2
                    squares[name] = squares[name] + square if name in squares else square
            images += 1
    if not images:
        raise unlabelled("hessian")
    return {name: square / images for name, square in squares.items()}


def _inputs(network: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, dim: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().double().movedim(dim, -1).flatten(0, -2).abs()
            sums[path] = sums.get(path, 0.0) + x.sum(0).cpu()
            counts[path] = counts.get(path, 0) + len(x)

        return hook

    for path, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.register_forward_pre_hook(add(path, -1 if isinstance(module, nn.Linear) else 1))
    with torch.no_grad():
        for batch in batches:
            network(batch["image"])
    return {path: total / counts[path] for path, total in sums.items()}


def _parameters(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(network.named_parameters(remove_duplicate=False))


def _finite(found: dict[str, Tensor], importance: Importance) -> dict[str, Tensor]:
    if all(bool(value.isfinite().all()) for value in found.values()):
        return found
    what = "the calibration loss has no finite gradient"
    raise StageError(
        "the activations of the calibration images are not finite" if importance == "activation" else what,
        where="importance",
        hint='check the weights and the calibration images, or use importance = "magnitude"',
    )
