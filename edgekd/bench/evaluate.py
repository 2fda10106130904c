"""The outputs of a model file over a whole test set, as its own runtime computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..artifact import TensorInfo
from ..errors import StageError, UsageError
from ..runtimes import Session

__all__ = ["evaluate"]

Array = np.ndarray[Any, Any]


def evaluate(session: Session, images: Array, preprocess: Callable[[Array], Array], batch: int = 250) -> Array:
    """Logits float [N, K] of `images` [N, C, H, W] as they are stored.

    Batches of `images` go through `preprocess` first, unless the network itself takes uint8: then it gets them as
    they are. A static batch axis is honoured (the last batch is filled up). Raises UsageError (no images, an input
    that is no single image batch, images that do not fit) or StageError (no logits [N, K], or NaN or +inf in them).
    """
    if not len(images):
        raise UsageError("the test set is empty", where="data")
    source, target = _image_input(session), _logits_output(session)
    if source.dtype == "uint8" and images.dtype != np.uint8:
        raise UsageError(
            f"input {source.name!r} takes raw uint8 images, the data are {images.dtype}",
            hint="measure a file exported with float input",
        )
    static = source.axes[0] if source.axes and isinstance(source.axes[0], int) else None
    size = static or batch
    parts = []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        rows = len(chunk)
        if static and rows < static:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], static - rows, axis=0)])
        ready = chunk if source.dtype == "uint8" else preprocess(chunk).astype(source.dtype, copy=False)
        logits = session.run({source.name: ready})[target.name]
        if logits.ndim != 2 or len(logits) != len(chunk):
            raise StageError(
                f"output {target.name!r} has shape {list(logits.shape)}, expected [{len(chunk)}, classes]",
                hint="classification is measured on one row of logits per image",
            )
        logits = logits[:rows]
        broken = np.isnan(logits) | np.isposinf(logits)
        if broken.any():
            first = start + int(broken.any(axis=1).argmax())
            count = int(broken.any(axis=1).sum())
            raise StageError(
                f"output {target.name!r} is NaN or infinite for {count} of {rows} images, first for test image {first}",
                hint="a precision without the range for its values? compare with the fp32 file",
            )
        parts.append(logits)
    return np.concatenate(parts)


def _image_input(session: Session) -> TensorInfo:
    if len(session.inputs) != 1:
        names = ", ".join(info.name for info in session.inputs)
        raise UsageError(f"the network has inputs {names or '(none)'}, expected one batch of images")
    return session.inputs[0]


def _logits_output(session: Session) -> TensorInfo:
    """The output called "logits"; of somebody else's file, the first."""
    return next((info for info in session.outputs if info.name == "logits"), session.outputs[0])
