"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in the data set's own binary format: no pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from ..registry import register
from .files import directory, read_bytes
from .source import Source, Split

__all__ = ["cifar10", "cifar100"]

_IMAGE = 3 * 32 * 32
_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"


@register("data", "cifar10")
def cifar10(root: Path) -> Source:
    """CIFAR-10: 50,000 + 10,000 colour images 32x32 of 10 classes, from `cifar-10-batches-bin` or the folder above."""
    folder = _folder(root, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "data_batch_1.bin")
    return Source(
        train=_split(folder, [f"data_batch_{k}.bin" for k in range(1, 6)], label_bytes=1),
        test=_split(folder, ["test_batch.bin"], label_bytes=1),
        classes=_class_names(folder / "batches.meta.txt", 10),
        mean=[0.4914, 0.4822, 0.4465],
        std=[0.2470, 0.2435, 0.2616],
    )


@register("data", "cifar100")
def cifar100(root: Path) -> Source:
    """CIFAR-100: 50,000 + 10,000 colour images 32x32 of 100 classes, from `cifar-100-binary` or the folder above."""
    folder = _folder(root, "cifar-100-binary", "cifar-100-binary.tar.gz", "train.bin")
    return Source(
        train=_split(folder, ["train.bin"], label_bytes=2),
        test=_split(folder, ["test.bin"], label_bytes=2),
        classes=_class_names(folder / "fine_label_names.txt", 100),
        mean=[0.5071, 0.4865, 0.4409],
        std=[0.2673, 0.2564, 0.2762],
    )


def _folder(root: Path, name: str, archive: str, file: str) -> Path:
    hint = f"unpack {archive} from {_HOME} and point data.root at {name} or the folder above it"
    root = directory(root, hint)
    for folder in (root, root / name):
        if (folder / file).exists():
            return folder
    pickled = [p for p in (root, *root.iterdir()) if p.name in ("cifar-10-batches-py", "cifar-100-python")]
    what = f"no {file} here or in {name}"
    raise UsageError(
        f"{what}: {pickled[0].name} is the pickled version, which edgekd does not read" if pickled else what,
        where=str(root),
        hint=hint,
    )


def _split(folder: Path, files: list[str], label_bytes: int) -> Split:
    """Records of `label_bytes` (the last one is the fine label) and 3072 bytes: all red, all green, all blue."""
    record = label_bytes + _IMAGE
    parts = []
    for name in files:
        data = read_bytes(folder / name, f"unpack the archive from {_HOME} again")
        if not data or len(data) % record:
            raise UsageError(
                f"{len(data)} bytes are not a whole number of {record}-byte records",
                where=str(folder / name),
                hint=f"damaged, or another data set's file: unpack the archive from {_HOME} again",
            )
        parts.append(np.frombuffer(data, np.uint8).reshape(-1, record))
    records = np.concatenate(parts)
    images = torch.from_numpy(records[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return Split(images, torch.from_numpy(records[:, label_bytes - 1].astype(np.int64)))


def _class_names(file: Path, count: int) -> list[str]:
    text = read_bytes(file, f"unpack the archive from {_HOME} again").decode("utf-8", "replace")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != count:
        raise UsageError(f"expected {count} class names, one a line, got {len(names)}", where=str(file))
    return names
