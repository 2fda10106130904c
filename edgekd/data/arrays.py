"""Arrays that users bring, turned into image and label tensors."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

__all__ = ["Layout", "check_range", "image_tensor", "label_tensor"]

Layout = Literal["NHWC", "NCHW"]
_CHANNELS = (1, 3, 4)


def image_tensor(array: Any, layout: Layout, where: str) -> Tensor:
    """Images uint8 or float32 [N, C, H, W] from an array [N, H, W], [N, H, W, C] or [N, C, H, W] (as `layout` says).

    Raises UsageError for another type or shape, and for floating-point values outside [0, 1].
    """
    if isinstance(array, Tensor):
        array = (array.float() if array.is_floating_point() else array).numpy(force=True)
    array = np.asarray(array)
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    elif array.dtype != np.uint8:
        hint = "convert with .astype('uint8') (0..255), or divide into floats in [0, 1]"
        raise UsageError(f"images must be uint8 or floating point, got {array.dtype}", where=where, hint=hint)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim != 4:
        raise UsageError(f"images must be {layout} or [N, H, W], got shape {list(array.shape)}", where=where)
    else:
        mine, other = (array.shape[3], array.shape[1]) if layout == "NHWC" else (array.shape[1], array.shape[3])
        if mine not in _CHANNELS and other in _CHANNELS:
            swapped = "NCHW" if layout == "NHWC" else "NHWC"
            raise UsageError(
                f"shape {list(array.shape)} read as {layout} has {mine} channels",
                where=where,
                hint=f"it looks like {swapped}: transpose it, or say so with `layout` where there is one",
            )
        if layout == "NHWC":
            array = array.transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.array(array, order="C"))
    check_range(images, where)
    return images


def check_range(images: Tensor, where: str) -> None:
    """Raises UsageError naming the first image with NaN, infinity or a floating-point value outside [0, 1]."""
    if images.dtype != torch.float32 or images.numel() == 0:
        return
    low, high = torch.aminmax(images)  # both are NaN where any value is
    if low >= 0 and high <= 1:
        return
    bad = (~((images >= 0) & (images <= 1))).flatten(1).any(1)
    row = int(bad.nonzero()[0])
    image = images[row]
    if not bool(image.isfinite().all()):
        what, hint = "NaN or infinite values", "mend or drop this image"
    elif image.min() < 0:
        what, hint = f"values down to {float(image.min()):.3g}", "leave normalisation to edgekd: data.normalize"
    else:
        what, hint = f"values up to {float(image.max()):.3g}", "divide by 255, or give uint8"
    raise UsageError(f"image {row} has {what}, expected [0, 1] ({int(bad.sum())} such images)", where=where, hint=hint)


def label_tensor(array: Any, where: str) -> Tensor:
    """Labels int64 [N] from integers [N] or [N, 1]. Raises UsageError for another type or shape."""
    array = array.numpy(force=True) if isinstance(array, Tensor) else np.asarray(array)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UsageError(
            f"labels must be integers [N], got {array.dtype} {list(array.shape)}",
            where=where,
            hint="number the classes from 0 (one-hot rows: use argmax)",
        )
    return torch.from_numpy(array.astype(np.int64))
