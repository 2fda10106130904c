"""Families of networks and the shapes in them that are worth measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..artifact import ModelSpec
from ..errors import RecipeError, UsageError, nearest
from ..models import specify

__all__ = ["FAMILIES", "Candidate", "candidates", "default_network"]

#: Widths below the kernels' multiple, or between two of them, are there to show what they cost: as controls.
NARROWEST = 8
#: (depth - 2) * width^2 grows as a CIFAR ResNet's MACs do: 2 x those of ResNet-56.
LARGEST_RESNET = 28_000
#: depth * dim^2, as a transformer's.
LARGEST_VIT = 150_000


class Candidate(NamedTuple):
    """One shape of a family. `args` is what a recipe says, `spec` all of it."""

    name: str
    args: dict[str, Any]
    spec: ModelSpec
    depth: int | None
    width: float


class Family(NamedTuple):
    """`grid(multiple)` gives the (depth, width) to measure by default, `args(depth, width, side)` the network's."""

    depths: tuple[int, ...]
    grid: Callable[[int], list[tuple[int | None, float]]]
    args: Callable[[int | None, float, int], dict[str, Any]]


def _step(multiple: int) -> int:
    """The smallest multiple that is a usual width."""
    return multiple * -(-16 // multiple)


def _resnets(multiple: int) -> list[tuple[int | None, float]]:
    step = _step(multiple)
    widths = range(step, max(64, step) + 1, step)
    found: list[tuple[int | None, float]] = [
        (depth, width)
        for depth in FAMILIES["cifar-resnet"].depths
        for width in widths
        if (depth - 2) * width**2 <= LARGEST_RESNET and (depth <= 20 or width <= 2 * NARROWEST)
    ]
    return found + [(depth, width) for depth in (8, 14) for width in (step // 2, 3 * step // 2)]


def _resnet(depth: int | None, width: float, side: int) -> dict[str, Any]:
    return {"depth": depth, "width": _whole(width)}


def _mobilenets(multiple: int) -> list[tuple[int | None, float]]:
    # The family rounds its channels to multiples of 8 by itself; at 2.0 all of them are multiples of 16.
    return [(None, width) for width in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)]


def _mobilenet(depth: int | None, width: float, side: int) -> dict[str, Any]:
    return {"width": width}


def _vits(multiple: int) -> list[tuple[int | None, float]]:
    step = max(32, _step(multiple))
    found: list[tuple[int | None, float]] = [
        (depth, width)
        for depth in FAMILIES["vit"].depths
        for width in range(2 * step, 6 * step + 1, 2 * step)
        if depth * width**2 <= LARGEST_VIT
    ]
    return [*found, (2, 2 * step + NARROWEST), (4, 2 * step + NARROWEST)]


def _vit(depth: int | None, width: float, side: int) -> dict[str, Any]:
    dim = _whole(width)
    # Heads of 32 or a little more; patches that leave 16 x 16 tokens at most.
    heads = next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
    patch = next(p for p in range(min(4, side), side + 1) if side % p == 0 and side // p <= 16)
    return {"depth": depth, "dim": dim, "heads": heads, "patch": patch}


FAMILIES: dict[str, Family] = {
    "cifar-resnet": Family((8, 14, 20, 32), _resnets, _resnet),
    "mobilenet": Family((), _mobilenets, _mobilenet),
    "vit": Family((2, 4, 6), _vits, _vit),
}


def _whole(width: float) -> int:
    if width != int(width):
        raise UsageError(f"must be whole numbers in this family, got {width:g}", where="--widths")
    return int(width)


def candidates(
    family: str,
    multiple: int,
    size: list[int],
    classes: int,
    depths: Sequence[int] = (),
    widths: Sequence[float] = (),
    where: str = "family",
) -> list[Candidate]:
    """The shapes of a family to measure for images of `size` [C, H, W], by their depths, then widths.

    `multiple` is the profile's channel_multiple; `depths` and `widths` ask for others than the default ones, every
    combination of them. Raises UsageError (no such family, or no such shape in it) or RecipeError.
    """
    if family not in FAMILIES:
        raise UsageError(f"no family {family!r}", where=where, hint=nearest(family, FAMILIES))
    chosen = FAMILIES[family]
    if depths and not chosen.depths:
        raise UsageError(f"{family} has one depth only", where="--depths", hint="leave it out")
    pairs = chosen.grid(multiple)
    if depths or widths:
        deep: Sequence[int | None] = list(depths) or list(chosen.depths) or [None]
        pairs = [(d, w) for d in deep for w in (widths or dict.fromkeys(w for _, w in pairs))]
    pairs = sorted(set(pairs), key=lambda pair: (pair[0] or 0, pair[1]))
    try:
        return [_candidate(family, depth, width, size, classes) for depth, width in pairs]
    except RecipeError as error:
        own = [replace(p, where="--depths") if depths and p.where.endswith(".depth") else p for p in error.problems]
        raise RecipeError(own) from error


def default_network(family: str, size: list[int], classes: int) -> Candidate:
    """The family's own defaults: what its members are measured beside."""
    depth, width = {"cifar-resnet": (20, 16), "mobilenet": (None, 1.0), "vit": (6, 96)}[family]
    return _candidate(family, depth, width, size, classes)


def _candidate(family: str, depth: int | None, width: float, size: list[int], classes: int) -> Candidate:
    args = FAMILIES[family].args(depth, width, size[1])
    spec = specify(family, args, classes=classes, size=size, where=f"{family} of width {width:g}")
    shape = f"{width:g}" if depth is None else f"{depth}x{width:g}"
    return Candidate(f"{family}-{shape}", args, spec, depth, width)
