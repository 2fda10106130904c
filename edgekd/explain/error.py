"""How far integers are from the reals that they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .constants import Array
from .stored import StoredLayer

__all__ = ["pair_layers", "sqnr", "weight_sqnr"]


def sqnr(reference: Array, found: Array) -> float | None:
    """Signal to quantization noise in dB: 10 log10(sum r^2 / sum (r - f)^2). None where there is no noise or signal."""
    r = reference.astype(np.float64)
    signal, noise = float((r * r).sum()), float(((r - found) ** 2).sum())
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def weight_sqnr(layer: StoredLayer, against: StoredLayer | None = None) -> float | None:
    """Of a layer's integer weight against the float one: of the other file, or of its own where it holds both."""
    if layer.w is None or layer.weight is None:
        return None
    reference = against.weight if against is not None else layer.original
    if reference is None:
        return None
    if reference.shape != layer.weight.shape:
        if reference.shape[::-1] != layer.weight.shape:
            return None
        reference = reference.T
    return sqnr(reference, layer.weight)


def pair_layers(ours: Sequence[StoredLayer], theirs: Sequence[StoredLayer]) -> dict[int, StoredLayer]:
    """Index of a layer -> the same layer of another file of the same network.

    By module path or name where both files have it, otherwise in graph order, if the weights' shapes agree there.
    """
    by_path = {x.path: x for x in theirs if x.path}
    pairs = {x.index: by_path[x.path] for x in ours if x.path in by_path and _alike(x, by_path[x.path])}
    left = [x for x in ours if x.index not in pairs]
    free = [x for x in theirs if not any(x is y for y in pairs.values())]
    if len(left) == len(free) and all(_alike(a, b) for a, b in zip(left, free, strict=True)):
        return pairs | {a.index: b for a, b in zip(left, free, strict=True)}
    weighted = [[x for x in side if x.weight_shape] for side in (left, free)]
    if len(weighted[0]) == len(weighted[1]) and all(_alike(a, b) for a, b in zip(*weighted, strict=True)):
        return pairs | {a.index: b for a, b in zip(*weighted, strict=True)}
    return pairs


def _alike(a: StoredLayer, b: StoredLayer) -> bool:
    return sorted(a.weight_shape or []) == sorted(b.weight_shape or [])
