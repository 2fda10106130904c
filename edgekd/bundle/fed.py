"""What a bundle feeds to a network, and what ONNX Runtime gives for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..artifact import digest
from ..data import Dataset
from ..errors import StageError, UsageError
from ..profile import Profile
from ..runtimes import Session
from .runner.contents import batches, feed

__all__ = ["Fed", "expected_of", "fed_of"]

Array = np.ndarray[Any, Any]
#: Rows of random inputs, in batches: enough to see an engine that is wrong.
RANDOM_BATCHES = 16
IMAGES, LABELS = "images", "labels"


@dataclass(frozen=True)
class Fed:
    """Arrays to store, and how the runner makes a network's inputs of them.

    `inputs` have name, dtype, the stored `array`, whether its first axis are `rows`, and how it is normalised.
    """

    batch: int
    rows: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    logits: str | None
    arrays: dict[str, Array] = field(default_factory=dict)
    fingerprint: str = ""


def fed_of(session: Session, profile: Profile, data: Dataset | None, images: int, where: str) -> Fed:
    """Test images with labels, or random inputs without `data`. Raises UsageError where the images do not fit."""
    first = session.inputs[0].axes[0] if session.inputs and session.inputs[0].axes else 1
    batch = first if isinstance(first, int) else profile.protocol.batch
    outputs = [{"name": o.name, "dtype": o.dtype} for o in session.outputs]
    if data is None:
        inputs, arrays = _random(session, batch)
        flat = [o.name for o in session.outputs if len(o.axes) == 2]
        return Fed(batch, RANDOM_BATCHES * batch, inputs, outputs, flat[0] if flat else None, arrays)
    target = next((o for o in session.outputs if o.name == "logits"), session.outputs[0])
    if len(session.inputs) != 1 or list(session.inputs[0].axes[1:]) != data.size:
        takes = ", ".join(f"{i.name} {i.axes}" for i in session.inputs)
        raise UsageError(f"takes {takes}, the data are images {data.size}", where=where)
    if len(target.axes) != 2 or (target.axes[1] not in (len(data.classes), "?") and isinstance(target.axes[1], int)):
        what = f"gives {target.name} {target.axes}, the data have {len(data.classes)} classes"
        raise UsageError(what, where=where)
    source = session.inputs[0]
    chosen = _chosen(len(data.test), images)
    stored = data.test.images[chosen].numpy()
    if source.dtype == "uint8" and stored.dtype != np.uint8:
        raise UsageError(f"input {source.name!r} takes raw uint8 images, the data are {stored.dtype}", where=where)
    normalise = {"divide": 255 if stored.dtype == np.uint8 else 1, "mean": list(data.mean), "std": list(data.std)}
    info = {"name": source.name, "dtype": source.dtype, "array": IMAGES, "rows": True, "axes": source.axes}
    arrays = {IMAGES: stored, LABELS: data.test.labels[chosen].numpy()}
    return Fed(
        batch,
        len(chosen),
        [{**info, "normalise": None if source.dtype == "uint8" else normalise}],
        outputs,
        target.name,
        arrays,
        digest([data.fingerprint, chosen.tolist()]),
    )


def _chosen(there: int, wanted: int) -> Array:
    """Rows of the test split: all, or some by a fixed seed, as files are often sorted by class."""
    if there <= wanted:
        return np.arange(there)
    return np.sort(np.random.default_rng(0).choice(there, wanted, replace=False))


def _random(session: Session, batch: int) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Inputs of somebody else's network: dynamic axes are the batch first, then 1."""
    rng = np.random.default_rng(0)
    inputs, arrays = [], {}
    for i, info in enumerate(session.inputs):
        axes = [axis if isinstance(axis, int) else (batch if at == 0 else 1) for at, axis in enumerate(info.axes)]
        rows = bool(axes) and axes[0] == batch
        values = rng.random([RANDOM_BATCHES * batch, *axes[1:]] if rows else axes)
        if np.issubdtype(np.dtype(info.dtype), np.integer):
            values = np.floor(values * 255)
        arrays[f"input{i}"] = np.asarray(values).astype(info.dtype)
        told = {"name": info.name, "dtype": info.dtype, "array": f"input{i}", "rows": rows, "axes": info.axes}
        inputs.append({**told, "normalise": None})
    return inputs, arrays


def expected_of(session: Session, fed: Fed, where: str) -> dict[str, Array]:
    """Reference outputs by name [rows, ...], in batches as the device computes them.

    Raises StageError where an output is NaN or infinite: nothing can be compared with that.
    """
    parts = []
    for start in batches(fed.rows, fed.batch):
        parts.append(session.run(feed({"inputs": fed.inputs}, fed.arrays, start, fed.batch)))
    joined = {}
    for info in fed.outputs:
        values = [part[info["name"]] for part in parts]
        joined[info["name"]] = np.concatenate(values)[: fed.rows] if values[0].ndim else values[0]
        if not np.isfinite(joined[info["name"]]).all():
            what = f"output {info['name']!r} is NaN or infinite in ONNX Runtime here"
            raise StageError(what, where=where, hint="a precision without the range for its values?")
    return joined
