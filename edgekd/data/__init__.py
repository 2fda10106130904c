"""Data sets as two or three splits of tensors, and batches made of them by vectorised, stateless code."""

from __future__ import annotations

from . import cifar, digits, folder, idx, mixtures, npz  # noqa: F401  (importing registers what edgekd ships)
from .augment import augmentations
from .dataset import load
from .loader import batches, loader_speed
from .source import Dataset, Source, Split

__all__ = ["Dataset", "Source", "Split", "augmentations", "batches", "load", "loader_speed"]
