"""Whether removing channels leaves the computation that masking them leaves: tried, not assumed.

A removed channel must be one that nobody reads. So on a copy with random weights, zeroing the slices that are to be
removed has to give the same outputs as removing them. A group whose channels are addressed by position (padded
shortcuts, splits, attention heads), or whose width is written into the forward pass, fails and is left alone.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .graph import Attributes, ChannelGroup, Edit, apply, slices

__all__ = ["difference", "keep_sound", "outputs_of", "stand_in"]

HEADS = ("num_heads", "heads", "n_heads", "num_attention_heads")


def keep_sound(network: nn.Module, example: Tensor, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups that can be pruned, with attention regrouped by heads where that works; the others get a reason.

    network: not changed. example: [1, C, H, W]. groups: without a `reason_kept` so far.
    """
    if difference(network, example, *_half(groups)) is None:
        return list(groups)
    kept: list[ChannelGroup] = []
    for group in groups:
        reason = difference(network, example, *_half([*kept, group]))
        by_head = _by_head(network, group) if reason else None
        if by_head and difference(network, example, *_half([*kept, by_head])) is None:
            group.units, group.step, group.heads = by_head.units, by_head.step, by_head.heads
            reason = None
        if reason is None:
            kept.append(group)
        group.reason_kept = reason
    return kept


def difference(network: nn.Module, example: Tensor, edits: Sequence[Edit], attributes: Attributes) -> str | None:
    """Why removing the slices is not the same as masking them, or None where it is."""
    masked, image, tolerance = stand_in(network, example)
    pruned = copy.deepcopy(masked)
    before = outputs_of(masked, image)
    for edit in edits:
        for _, tensor, dim in slices(masked, edit):
            tensor.data.index_fill_(dim, torch.tensor(edit.indices, device=tensor.device), 0)
    try:
        apply(pruned, edits, attributes)
        found = outputs_of(pruned, image)
    except Exception as error:  # whatever a stranger's forward pass raises when its widths changed
        first = str(error).strip().partition("\n")[0]
        return f"the forward pass does not run without some of these channels ({type(error).__name__}: {first})"
    if [t.shape for t in found] != [t.shape for t in before]:
        return "the outputs change their shape without some of these channels"
    for a, b in zip(found, outputs_of(masked, image), strict=True):
        if not torch.allclose(a, b, rtol=0, atol=tolerance * (1 + float(b.abs().max()))):
            return "the network addresses these channels by their position, or mixes them outside its layers"
    return None


def _half(groups: Iterable[ChannelGroup]) -> tuple[list[Edit], dict[str, dict[str, Any]]]:
    """Edits that remove an irregular half of every group's units: a regular one might fit by chance."""
    edits: list[Edit] = []
    attributes: dict[str, dict[str, Any]] = {}
    for group in groups:
        count = len(group.units) - max(1, len(group.units) // (2 * group.step)) * group.step
        chosen = torch.randperm(len(group.units), generator=torch.Generator().manual_seed(len(group.units)))[:count]
        edits += group.edits_of(sorted(channel for i in chosen.tolist() for channel in group.units[i]))
        attributes |= group.attributes(count)
    return edits, attributes


def stand_in(network: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor, float]:
    """A copy with random weights, so that zeros in the trained ones (a last BN's scale, say) hide no difference.

    Norms over channels become plain scales there: they rightly change with the number of channels.
    In float64 where the network takes it, to compare exactly.
    """
    twin = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        if name.endswith("running_mean") or (isinstance(tensor, nn.Parameter) and tensor.dim() > 1):
            noise = torch.randn(tensor.shape, generator=generator) / max(1, tensor[:1].numel()) ** 0.5
        elif name.endswith("running_var") or isinstance(tensor, nn.Parameter):
            noise = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            continue
        tensor.data.copy_(noise)
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            # A bound method, because a deep copy binds it to the copied module.
            module.forward = types.MethodType(_scale, module)  # type: ignore[method-assign]
    image = torch.randn(example.shape, generator=generator).to(example.device)
    try:
        exact = copy.deepcopy(twin).double()
        outputs_of(exact, image.double())
    except RuntimeError:
        return twin, image, 1e-3
    return exact, image.double(), 1e-7


def _scale(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> Tensor:
    for tensor, combine in ((norm.weight, torch.mul), (norm.bias, torch.add)):
        if tensor is not None:
            x = combine(x, tensor.reshape(-1, *[1] * (x.dim() - 2)) if isinstance(norm, nn.GroupNorm) else tensor)
    return x


def outputs_of(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Every tensor that the network returns, without gradients."""
    with torch.no_grad():
        return _leaves(network(image))


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [leaf for item in inner for leaf in _leaves(item)]


def _by_head(network: nn.Module, group: ChannelGroup) -> ChannelGroup | None:
    """The group with whole heads as units, where its first layer makes queries, keys and values of an attention.

    Either that layer makes one of the three (its width is that of the output projection's input), or all three,
    stacked. `difference` is what decides whether this reading was right.
    """
    parents = dict.fromkeys(edit.path.rpartition(".")[0] for edit in group.edits)
    heads = tuple((path, name) for path in parents for name in HEADS if _count(network, path, name))
    width = min((len(edit.indices) for edit in group.edits if edit.consumes), default=0)
    if not heads or width == 0 or group.channels not in (width, 3 * width):
        return None
    count = _count(network, *heads[0])
    if width % count or any(_count(network, *head) != count for head in heads):
        return None
    size = width // count
    units = [
        [part + head * size + row for part in range(0, group.channels, width) for row in range(size)]
        for head in range(count)
    ]
    step = group.step // math.gcd(group.step, size)
    return replace(group, units=units, step=step, heads=heads) if count >= 2 * step else None


def _count(network: nn.Module, path: str, name: str) -> int:
    value = getattr(network.get_submodule(path), name, None)
    return value if isinstance(value, int) and value > 1 else 0
