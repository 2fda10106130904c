"""Groups of channels that can only be removed together, and the surgery that removes them.

Torch-Pruning's dependency graph (Fang et al., DepGraph, CVPR 2023) says which slices of which tensors go together.
It sees autograd nodes only, and takes pads, slices, heads and splits for elementwise operations at times, so what it
says is tried before it is believed: see `soundness`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from ..errors import StageError
from ..models.build import without_blocks

__all__ = ["ChannelGroup", "Edit", "apply", "channel_groups", "merged", "slices"]

Attributes = Mapping[str, Mapping[str, Any]]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Edit:
    """Slices `indices` of one module or parameter, to be removed by one of Torch-Pruning's pruning functions.

    roots: for each index, the channel of the group's first layer that it belongs to.
    """

    path: str
    handler: Callable[[Any, list[int]], Any]
    dim: int
    indices: tuple[int, ...]
    roots: tuple[int, ...]

    @property
    def pruner(self) -> str:
        """Torch-Pruning's class for this kind of layer, such as BatchnormPruner."""
        return type(self.handler.__self__).__name__  # type: ignore[attr-defined]

    @property
    def produces(self) -> bool:
        """Whether it removes outputs of a convolution or linear layer."""
        return self.pruner in {"ConvPruner", "LinearPruner", "DepthwiseConvPruner"} and not self.consumes

    @property
    def consumes(self) -> bool:
        """Whether it removes inputs of a convolution or linear layer (a depthwise one's go with its outputs)."""
        return self.handler.__name__ == "prune_in_channels"


@dataclass
class ChannelGroup:
    """Coupled channels, named after the first layer that produces them.

    units: what is removed at once, each a list of that layer's channels (one channel, or one attention head's rows).
    step: units are removed down to multiples of this. heads: attributes that count the units.
    edits_of: channels -> the edits that remove them. edits: those of all channels.
    """

    name: str
    channels: int
    edits: tuple[Edit, ...]
    edits_of: Callable[[Sequence[int]], tuple[Edit, ...]] = field(repr=False)
    units: list[list[int]]
    step: int
    heads: tuple[tuple[str, str], ...] = ()
    reason_kept: str | None = None

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(edit.path for edit in self.edits))

    def attributes(self, removed_units: int) -> dict[str, dict[str, int]]:
        """What has to be set beside the shapes after so many units went."""
        return {path: {name: len(self.units) - removed_units} for path, name in self.heads if removed_units}


def channel_groups(network: nn.Module, example: Tensor, channel_multiple: int) -> list[ChannelGroup]:
    """Every group of channels that convolutions and linear layers produce, in the order of the modules.

    network: not changed. example: [1, C, H, W]. Groups that no surgery can be right for come with a `reason_kept`.
    Raises StageError where the network cannot be traced.
    """
    skeleton = copy.deepcopy(network).requires_grad_(True)
    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(skeleton, example.clone(), verbose=False)
    except Exception as error:  # a stranger's forward pass, traced by a stranger's tracer
        raise StageError(
            f"Torch-Pruning cannot trace this network ({type(error).__name__}: {error})",
            where="prune",
            hint="leave the prune stage out, or make forward(image) run on one image in evaluation mode",
        ) from error
    paths: dict[Any, str] = {parameter: path for path, parameter in skeleton.named_parameters()}
    paths |= {module: path for path, module in skeleton.named_modules()}
    order = {path: place for place, path in enumerate(path for path, _ in skeleton.named_modules())}

    def edits_of(root: nn.Module, channels: Sequence[int]) -> tuple[Edit, ...]:
        function = graph.get_pruner_of_module(root).prune_out_channels
        found = []
        for item in graph.get_pruning_group(root, function, list(channels)):
            node = item.dep.target
            if node.module in paths:
                indices, roots = tuple(item.idxs), tuple(item.root_idxs)
                found.append(Edit(paths[node.module], item.dep.handler, node.pruning_dim, indices, roots))
        return tuple(sorted(found, key=lambda e: (order.get(e.path, len(order)), e.path, e.handler.__name__)))

    groups: list[ChannelGroup] = []
    produced: set[str] = set()
    for path, module in skeleton.named_modules():
        if path in produced or module not in graph.module2node or not _produces(module) or _depthwise(module):
            continue
        width = _width(module)
        edits = edits_of(module, range(width))
        produced |= {edit.path for edit in edits if edit.produces}
        touched = [skeleton.get_submodule(edit.path) for edit in edits if edit.path in order]
        step = math.lcm(channel_multiple, *(m.num_groups for m in touched if isinstance(m, nn.GroupNorm)))
        groups.append(
            ChannelGroup(
                name=path,
                channels=width,
                edits=edits,
                edits_of=lambda channels, root=module: edits_of(root, channels),  # type: ignore[misc]
                units=[[channel] for channel in range(width)],
                step=step,
                reason_kept=_impossible(skeleton, edits),
            )
        )
    return groups


def _impossible(network: nn.Module, edits: Sequence[Edit]) -> str | None:
    producers = [edit for edit in edits if edit.produces]
    for edit in producers:
        if edit.indices != edit.roots or len(edit.indices) != _width(network.get_submodule(edit.path)):
            widths = ", ".join(f"{e.path} ({_width(network.get_submodule(e.path))})" for e in producers[:4])
            return f"layers of different widths are added up or sliced by position: {widths}"
    for edit in edits:
        if None in edit.roots:
            return f"Torch-Pruning cannot tell which channels {edit.path} reads"
        layer = _at(network, edit.path)
        if isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and not _depthwise(layer):
            return f"{edit.path} is a grouped convolution"
    if not any(edit.consumes for edit in edits):
        return "these are the outputs of the network"
    return None


def merged(edits: Iterable[Edit]) -> list[Edit]:
    """One edit for each dimension of each module: several groups may remove inputs of one layer (concatenation)."""
    found: dict[tuple[str, Any, int], dict[int, int]] = {}
    for edit in edits:
        found.setdefault((edit.path, edit.handler, edit.dim), {}).update(zip(edit.indices, edit.roots, strict=True))
    return [
        Edit(path, handler, dim, tuple(sorted(pairs)), tuple(pairs[i] for i in sorted(pairs)))
        for (path, handler, dim), pairs in found.items()
    ]


def apply(network: nn.Module, edits: Iterable[Edit], attributes: Attributes, removed: Iterable[str] = ()) -> None:
    """Remove the slices from `network`, in place, set the attributes, and put the identity in place of `removed`.

    Frozen parameters stay frozen.
    """
    trainable = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for edit in merged(edits):
        target = _at(network, edit.path)
        edit.handler.__self__.pruning_dim = edit.dim  # type: ignore[attr-defined]
        result = edit.handler(target, list(edit.indices))
        if isinstance(target, nn.Parameter):
            owner, _, name = edit.path.rpartition(".")
            setattr(network.get_submodule(owner), name, result)
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(network.get_submodule(path), name, value)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trainable[name])
    without_blocks(network, removed)


def slices(network: nn.Module, edit: Edit) -> list[tuple[str, Tensor, int]]:
    """The parameters that an edit shortens: (path, tensor, dimension), the weight first."""
    target = _at(network, edit.path)
    if isinstance(target, nn.Parameter):
        return [(edit.path, target, edit.dim)]
    names = {"weight": 0, "bias": 0}
    if edit.consumes:
        names = {"weight": 1}
    if isinstance(target, CONVOLUTIONS) and target.transposed:
        names["weight"] = 1 - names["weight"]
    elif isinstance(target, nn.LayerNorm):
        names = {"weight": edit.dim, "bias": edit.dim}
    elif isinstance(target, nn.Embedding):
        names = {"weight": 1}
    found = []
    for name, dim in names.items():
        tensor = getattr(target, name, None)
        if isinstance(tensor, Tensor):
            found.append((f"{edit.path}.{name}" if edit.path else name, tensor, dim % tensor.dim()))
    return found


def _at(network: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(network.get_submodule(owner), name) if path else network


def _produces(module: nn.Module) -> bool:
    return isinstance(module, (*CONVOLUTIONS, nn.Linear))


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def _width(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]
