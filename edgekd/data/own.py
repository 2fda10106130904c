"""Data from the user's own function: data sets of PyTorch, pairs of arrays, or a Source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from ..errors import UsageError, nearest
from .arrays import Layout, image_tensor, label_tensor
from .source import Source, Split

__all__ = ["materialise"]

_KEYS = ("train", "test", "validation", "classes")
_RETURNS = (
    'return {"train": ..., "test": ...} (and "validation", "classes"), each a torch Dataset of (image, label) '
    "or a pair (images, labels) of arrays"
)


def materialise(use: str, result: Any) -> Source:
    """A Source from whatever the function `use` returned.

    A Source passes. A dict holds train and test, and may hold validation and classes; a tuple is (train, test) or
    (train, test, classes). Each split is a data set of (image, label) items, read once, or a pair of arrays. An image
    is a tensor [C, H, W], an array [H, W, C] (either may be [H, W]), or a PIL image; uint8, or floats in [0, 1].
    Raises UsageError naming the split, the item and what was wrong with it.
    """
    if isinstance(result, Source):
        return result
    table = _table(use, result)
    present = [name for name in ("train", "test", "validation") if table.get(name) is not None]
    for position, one in enumerate(present):
        for other in present[position + 1 :]:
            _check_apart(use, one, table[one], other, table[other])
    splits = {name: _split(table[name], f"{use}, {name}") for name in present}
    classes = table.get("classes")
    if classes is None:
        own = getattr(_origin(table["train"])[0], "classes", None)  # torchvision's data sets have it
        classes = own if isinstance(own, list | tuple) else None
    if classes is None:
        count = max((int(split.labels.max()) + 1 for split in splits.values() if len(split)), default=0)
        classes = range(max(count, 1))
    return Source(splits["train"], splits["test"], [str(name) for name in classes], splits.get("validation"))


def _table(use: str, result: Any) -> Mapping[str, Any]:
    if isinstance(result, tuple) and len(result) in (2, 3) and not _is_pair(result):
        result = dict(zip(("train", "test", "classes"), result, strict=False))
    if not isinstance(result, Mapping):
        raise UsageError(f"returned {_describe(result)}", where=use, hint=_RETURNS)
    unknown = [key for key in result if key not in _KEYS]
    if unknown:
        raise UsageError(f"returned the unknown key {unknown[0]!r}", where=use, hint=nearest(str(unknown[0]), _KEYS))
    missing = [key for key in ("train", "test") if result.get(key) is None]
    if missing:
        raise UsageError(f"returned no {missing[0]!r} split", where=use, hint=_RETURNS)
    if not isinstance(result.get("classes") or [], list | tuple):
        given = _describe(result["classes"])
        raise UsageError(f"the classes must be a list of names, got {given}", where=use, hint=_RETURNS)
    return result


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, np.ndarray | Tensor) for v in value)
    )


def _origin(data: Any) -> tuple[Any, Any]:
    """The object that items come from and the rows that are used, so that overlapping subsets can be told."""
    rows: Any = None
    while isinstance(data, Subset):
        rows = data.indices if rows is None else [data.indices[r] for r in rows]
        data = data.dataset
    return data, rows


def _check_apart(use: str, one: str, first: Any, other: str, second: Any) -> None:
    if _is_pair(first) and _is_pair(second):
        x, y = first[0], second[0]
        shared = x is y or (isinstance(x, np.ndarray) and isinstance(y, np.ndarray) and np.shares_memory(x, y))
    else:
        (base, rows), (base_2, rows_2) = _origin(first), _origin(second)
        shared = base is base_2 and (rows is None or rows_2 is None or not set(rows).isdisjoint(rows_2))
    if shared:
        raise UsageError(
            f"{one} and {other} share images", where=use, hint="figures on images seen in training mean nothing"
        )


def _split(data: Any, where: str) -> Split:
    if _is_pair(data):
        layout: Layout = "NCHW" if isinstance(data[0], Tensor) else "NHWC"
        return Split(image_tensor(data[0], layout, f"{where} images"), label_tensor(data[1], f"{where} labels"))
    images: list[Tensor] = []
    labels: list[int] = []
    for row, item in enumerate(_items(data, where)):
        image, label = _item(item, f"{where}[{row}]")
        if images and (image.shape != images[0].shape or image.dtype != images[0].dtype):
            raise UsageError(
                f"the image is {image.dtype} {list(image.shape)}, the first one {images[0].dtype} "
                f"{list(images[0].shape)}",
                where=f"{where}[{row}]",
                hint="resize or crop all images to one size, in the data set's transform",
            )
        images.append(image)
        labels.append(label)
    if not images:
        raise UsageError("is empty", where=where, hint="the data set has no items")
    return Split(torch.stack(images), torch.tensor(labels, dtype=torch.int64))


def _items(data: Any, where: str) -> Iterator[Any]:
    by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)
    if isinstance(data, str | Mapping | np.ndarray | Tensor) or not (by_index or hasattr(data, "__iter__")):
        raise UsageError(f"is {_describe(data)}", where=where, hint=_RETURNS)
    row = 0
    try:
        if by_index:
            for row in range(len(data)):
                yield data[row]
        else:
            for item in data:
                yield item
                row += 1
    except UsageError:
        raise
    except Exception as error:  # the user's data set may fail in any way
        raise UsageError(
            f"{type(error).__name__}: {error}", where=f"{where}[{row}]", hint="reading this item by itself shows where"
        ) from error


def _item(item: Any, where: str) -> tuple[Tensor, int]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UsageError(f"is {_describe(item)}, expected (image, label)", where=where)
    image, label = item
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if not isinstance(image, np.ndarray | Tensor):
        hint = "a tensor [C, H, W], an array [H, W, C] or a PIL image"
        raise UsageError(f"the image is {_describe(image)}", where=where, hint=hint)
    axes = ("C", "H", "W") if isinstance(image, Tensor) else ("H", "W", "C")
    if image.ndim not in (2, 3):
        raise UsageError(
            f"the image has shape {list(image.shape)}, expected [{', '.join(axes)}] or [H, W]",
            where=where,
            hint="one image per item, not a batch",
        )
    pixels = image_tensor(image[None], "NCHW" if isinstance(image, Tensor) else "NHWC", where)[0]
    number = np.asarray(label)
    if number.ndim != 0 or number.dtype.kind not in "iu":
        raise UsageError(f"the label is {_describe(label)}, expected an integer class number", where=where)
    return pixels, int(number)


def _describe(value: Any) -> str:
    shape = f" {list(value.shape)}" if hasattr(value, "shape") else ""
    length = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{type(value).__name__}{shape}{length}"
