"""IDX files: MNIST (LeCun, Cortes, Burges), Fashion-MNIST, KMNIST and the like, gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from ..registry import register
from .files import directory, read_bytes
from .source import Source, Split

__all__ = ["idx"]

_UNSIGNED_BYTE = 0x08


@register("data", "idx")
def idx(root: Path, classes: list[str] | None = None) -> Source:
    """MNIST's format: `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]`, and `t10k-...`, in one folder.

    Grey images [N, 1, H, W]. `classes` names the labels; they are called by their numbers otherwise.
    """
    folder = directory(root, "the folder that holds train-images-idx3-ubyte or train-images-idx3-ubyte.gz")
    train, test = _split(folder, "train"), _split(folder, "t10k")
    count = int(torch.cat([train.labels, test.labels, torch.tensor([-1])]).max()) + 1
    return Source(train, test, classes if classes is not None else [str(label) for label in range(max(count, 1))])


def _split(folder: Path, prefix: str) -> Split:
    images = _array(_find(folder, f"{prefix}-images", 3), 3)
    labels = _array(_find(folder, f"{prefix}-labels", 1), 1)
    return Split(torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64)))


def _find(folder: Path, stem: str, axes: int) -> Path:
    names = [f"{stem}{mark}idx{axes}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UsageError(
            f"no {names[0]} or {names[1]}", where=str(folder), hint="point data.root at the folder with it"
        )
    return found[0]


def _array(file: Path, axes: int) -> np.ndarray:
    again = "the file is damaged or another kind: fetch it again"
    data = read_bytes(file, again)
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"cannot be unpacked: {error}", where=str(file), hint=again) from error
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes([0, 0, _UNSIGNED_BYTE, axes]):
        raise UsageError(
            f"not an IDX file of unsigned bytes with {axes} axes: starts with {data[:4].hex() or 'nothing'}, "
            f"expected {bytes([0, 0, _UNSIGNED_BYTE, axes]).hex()}",
            where=str(file),
            hint="still gzipped? its name must end in .gz then" if data[:2] == b"\x1f\x8b" else again,
        )
    shape = [int(n) for n in np.frombuffer(data, ">u4", axes, 4)]
    if len(data) != start + math.prod(shape):
        what = f"the header promises {shape} = {math.prod(shape)} bytes, the file holds {len(data) - start}"
        raise UsageError(what, where=str(file), hint=again)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
