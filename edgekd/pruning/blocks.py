"""Residual blocks that can go as a whole: found by trying, whatever the network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..models.build import without_blocks
from .soundness import outputs_of, stand_in

__all__ = ["Block", "residual_blocks"]


@dataclass
class Block:
    """A module that adds something to what it gets. It has one unit; without it the identity stands in its place."""

    name: str
    reason_kept: str | None = None
    units: ClassVar[list[list[int]]] = [[0]]
    step: ClassVar[int] = 1

    @property
    def layers(self) -> list[str]:
        return [self.name]

    def edits_of(self, channels: Sequence[int]) -> tuple[()]:
        """None: removing it slices nothing."""
        return ()

    def attributes(self, removed_units: int) -> dict[str, dict[str, int]]:
        """None: nothing has to be set."""
        return {}


def residual_blocks(network: nn.Module, example: Tensor) -> list[Block]:
    """The smallest modules with weights that give back what they get once all their weights are 0, in their order.

    network: not changed. example: [1, C, H, W]. Such a module is called once, with one tensor, and adds to it (an
    activation behind the sum may follow, where it leaves what came in as it is). Those without which the network does
    not run, or does something else than with zeroed weights, are left out.
    """
    network, image, tolerance = stand_in(network, example)
    calls = _calls(network, image)
    found: list[str] = []
    # From the inside out, so that a stage is not taken for a block.
    for path, module in reversed(list(network.named_modules())):
        inside = any(inner.startswith(f"{path}.") for inner in found)
        if path and path in calls and not inside and _adds(module, *calls[path], tolerance):
            found.append(path)
    found.reverse()
    if not _replaceable(network, image, found, tolerance):
        found = [path for path in found if _replaceable(network, image, [path], tolerance)]
    return [Block(path) for path in found]


def _calls(network: nn.Module, image: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What went into and came out of each module that ran once, from one tensor to one of the same shape."""
    seen: dict[str, list[tuple[Tensor, Tensor] | None]] = {}

    def before(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            # A copy, as it may be changed in place.
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            seen.setdefault(path, []).append((args[0].clone(), args[0]) if alone else None)

        return hook

    def after(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            call = seen[path][-1]
            same = call is not None and isinstance(result, Tensor) and result.shape == call[0].shape
            seen[path][-1] = (call[0], result) if same and call is not None else None

        return hook

    handles = []
    for path, module in network.named_modules():
        if any(True for _ in module.parameters()):
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
    try:
        outputs_of(network, image)
    finally:
        for handle in handles:
            handle.remove()
    return {path: calls[0] for path, calls in seen.items() if len(calls) == 1 and calls[0] is not None}


def _adds(module: nn.Module, x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether the module, which makes y of x, makes x of x without weights."""
    if _near(x, y, tolerance):
        return False  # it does nothing as it is
    zeroed = copy.deepcopy(module)
    for parameter in zeroed.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        return _near(zeroed(x.clone()), x, tolerance)


def _replaceable(network: nn.Module, image: Tensor, paths: Sequence[str], tolerance: float) -> bool:
    zeroed, without = copy.deepcopy(network), copy.deepcopy(network)
    for parameter in (p for path in paths for p in zeroed.get_submodule(path).parameters()):
        parameter.data.zero_()
    without_blocks(without, paths)
    try:
        found = outputs_of(without, image)
    except Exception:  # whatever a stranger's forward pass raises when a module is another one
        return False
    expected = outputs_of(zeroed, image)
    return len(found) == len(expected) and all(_near(a, b, tolerance) for a, b in zip(found, expected, strict=True))


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance * (1 + float(b.abs().max())))
