"""What data components return, and what the rest of edgekd works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Dataset", "Source", "Split", "stratified"]


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, C, H, W] in 0..255 or float32 in [0, 1], and labels int64 [N] (-1 = unlabelled).

    `targets` are the labels [N] of a network's further heads, by name.
    """

    images: Tensor
    labels: Tensor
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """The split of the given rows (int64 [n]), in that order."""
        targets = {head: labels[rows] for head, labels in self.targets.items()}
        return Split(self.images[rows], self.labels[rows], targets)


@dataclass(frozen=True, eq=False)
class Source:
    """What a data component returns. `mean` and `std` (of images in [0, 1]) default to those of the training split."""

    train: Split
    test: Split
    classes: list[str]
    validation: Split | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A checked data set: disjoint splits (validation may be empty) with all that preprocessing needs.

    `fingerprint` is a sha256 of images, labels, classes and which image is in which split. It leaves out `mean` and
    `std`, which belong to the preprocessing.
    """

    train: Split
    validation: Split
    test: Split
    classes: list[str]
    mean: list[float]
    std: list[float]
    fingerprint: str

    @property
    def size(self) -> list[int]:
        """[C, H, W] of every image."""
        return list(self.train.images.shape[1:])

    def of_classes(self, names: Sequence[str]) -> Dataset:
        """The images of some classes, numbered in the order of `names`; unlabelled ones are left out."""
        number = torch.full((len(self.classes) + 1,), -1)
        for position, name in enumerate(names):
            number[self.classes.index(name)] = position

        def some(split: Split) -> Split:
            taken = split.take((number[split.labels] >= 0).nonzero().flatten())
            return replace(taken, labels=number[taken.labels])

        splits = some(self.train), some(self.validation), some(self.test)
        fingerprint = f"{self.fingerprint} of {', '.join(names)}"
        return Dataset(*splits, list(names), self.mean, self.std, fingerprint)


def stratified(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to keep and to hold out, both ascending: round(share * labelled rows) are held out, at least one; share < 1.

    Classes give in proportion to their size (largest remainders); none gives its last row, so a held-out class is
    always a trained one. Unlabelled rows (-1) are kept. `labels` is int64 [N].
    """
    members = {int(c): (labels == c).nonzero().flatten() for c in labels.unique() if c >= 0}
    quota = {c: share * len(rows) for c, rows in members.items()}
    given = {c: int(q) for c, q in quota.items()}
    wanted = max(1, round(sum(quota.values())))
    for c in sorted(quota, key=lambda c: (given[c] - quota[c], c)):
        if sum(given.values()) < wanted and given[c] < len(members[c]) - 1:
            given[c] += 1
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c, rows in members.items():
        held[rows[torch.randperm(len(rows), generator=generator)[: given[c]]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
