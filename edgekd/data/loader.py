"""Batches of a split, whose randomness is a pure function of (seed, epoch, view, step, image)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .augment import Augmentation, Mixture, View
from .source import Split

__all__ = ["batches", "loader_speed"]


def batches(
    split: Split,
    *,
    batch: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    epoch: int,
    augment: Sequence[Augmentation] = (),
    classes: int = 0,
    view: int | None = None,
    start: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    channels_last: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Any]]:
    """One epoch of batches, from step `start` on: exactly the tail of the epoch that starts at 0.

    The order depends on (seed, epoch) only; crops and the like on (seed, view, row of the split) only, where `view`
    defaults to the epoch, so a cache can show the same view in any epoch; mixtures on (seed, epoch, step) only.

    A batch holds `image` float32 [B, C, H, W] = (x - mean) / std with x in [0, 1], `label` int64 [B], `index` int64
    [B] (rows of the split), `view` int, and with a mixture `target` float32 [B, classes]. The last batch may be
    smaller unless `drop_last`. With `share` = (rank, processes), only that share of the rows. Where the split has
    `targets`, `labels` holds those of each head. Raises ValueError when mean and std do not fit the channels, or a
    mixture lacks `classes`.
    """
    size = list(split.images.shape[1:])
    if len(mean) != size[0] or len(std) != size[0]:
        raise ValueError(f"mean and std need {size[0]} numbers each, got {len(mean)} and {len(std)}")
    views = [a for a in augment if isinstance(a, View)]
    mixtures = [a for a in augment if isinstance(a, Mixture)]
    if mixtures and classes < 1:
        raise ValueError("mixtures need the number of classes")
    count = len(split)
    shown = epoch if view is None else view
    order = torch.randperm(count, generator=_generator("order", seed, epoch)) if shuffle else torch.arange(count)
    tables = [v.draws(count, size, _generator("view", seed, shown, i)) for i, v in enumerate(views)]
    scale, shift = _affine(mean, std, 255 if split.images.dtype == torch.uint8 else 1)
    for step in range(start, count // batch if drop_last else -(-count // batch)):
        index = order[step * batch : (step + 1) * batch][share[0] :: share[1]]
        images = split.images[index]
        for changing, table in zip(views, tables, strict=True):
            images = changing.apply(images, table[index])
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        made = {"image": (images * scale).add_(shift), "label": split.labels[index], "index": index, "view": shown}
        if split.targets:
            made["labels"] = {head: target[index] for head, target in split.targets.items()}
        for i, mixture in enumerate(mixtures):
            made = mixture.mix(made, classes, _generator("mix", seed, epoch, step, i, *share[:1]))
        yield made


def _affine(mean: Sequence[float], std: Sequence[float], top: float) -> tuple[Tensor, Tensor]:
    """(x / top - mean) / std as x * scale + shift, both [1, C, 1, 1]."""
    m, s = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return (1 / (top * s)).float(), (-m / s).float()


def _generator(*key: str | int) -> torch.Generator:
    """Hashing the key keeps streams apart whose numbers are close, as (seed 0, epoch 1) and (seed 1, epoch 0) are."""
    number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(number)


def loader_speed(
    split: Split,
    *,
    batch: int,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Sequence[Augmentation] = (),
    classes: int = 0,
    channels_last: bool = False,
    seconds: float = 0.5,
) -> float:
    """Images per second that `batches` makes on this machine with nothing else to do, measured for about `seconds`."""

    def endless() -> Iterator[dict[str, Any]]:
        epoch = 0
        while len(split):
            yield from batches(
                split,
                batch=batch,
                mean=mean,
                std=std,
                seed=0,
                epoch=epoch,
                augment=augment,
                classes=classes,
                channels_last=channels_last,
            )
            epoch += 1

    stream = endless()
    if next(stream, None) is None:  # the first batch also warms up
        return 0.0
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not images:
        images += len(next(stream)["label"])
    return images / elapsed
