"""Data sets as two or three splits of tensors, and batches made of them by vectorised, stateless code."""

from __future__ import annotations

from . import cifar, digits, folder, idx, mixtures, npz  # noqa: F401  (importing registers what edgekd ships)
from .augment import augmentations
from .dataset import load
from .loader import batches, loader_speed
from .source import Dataset, Source, Split
from .streams import Mixed, Stream, Unlabelled, forget_streams, joined, loaded, open_stream

__all__ = [
    "Dataset",
    "Mixed",
    "Source",
    "Split",
    "Stream",
    "Unlabelled",
    "augmentations",
    "batches",
    "forget_streams",
    "joined",
    "load",
    "loaded",
    "loader_speed",
    "open_stream",
]
