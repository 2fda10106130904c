"""The contract of a runtime: a session on one model file, and the checks of what is fed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..artifact import TensorInfo
from ..errors import UsageError, nearest

__all__ = ["DeviceCall", "Feed", "Parts", "Session", "check_feed"]

#: Input name -> array.
Feed = dict[str, np.ndarray[Any, Any]]
#: Milliseconds of one call: `compute` on the device, `transfers` to it and from it.
Parts = dict[str, float]


@runtime_checkable
class DeviceCall(Protocol):
    """What `bound` of a device's runtime returns: it copies in, computes and copies out, and says how long each took.

    The rest of a call's time is the host's: launching and waiting. A runtime on the CPU copies nothing; its `bound`
    returns a plain function, and compute is the whole call.
    """

    def __call__(self) -> None: ...

    def parts(self) -> Parts:
        """Of the last call; reading it is not part of that call's time."""


class Session(Protocol):
    """One model file, opened by its runtime: `run` blocks until the outputs are there."""

    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    metadata: dict[str, str]

    def run(self, feed: Feed) -> Feed:
        """Outputs by name. Raises UsageError (the feed does not fit) or StageError (the runtime failed)."""

    def bound(self, feed: Feed) -> Callable[[], None]:
        """A call on preallocated inputs and outputs, for timing: it allocates and checks nothing. Raises like `run`.

        Of a device with memory of its own it begins and ends in the host's, and is a `DeviceCall`.
        """

    def close(self) -> None:
        """Free the model; a closed session raises StageError when it is used."""


def check_feed(inputs: Sequence[TensorInfo], feed: Feed, where: str) -> None:
    """Raise UsageError unless `feed` has exactly these inputs, each with its dtype and shape."""
    expected = {info.name: info for info in inputs}
    for name in feed:
        if name not in expected:
            raise UsageError(f"has no input {name!r}", where=where, hint=nearest(name, expected))
    sizes: dict[str, tuple[str, int]] = {}
    for name, info in expected.items():
        if name not in feed:
            raise UsageError(f"input {name!r} is missing", where=where, hint=f"it wants {_described(info)}")
        array = feed[name]
        if not isinstance(array, np.ndarray):
            raise UsageError(f"input {name!r} must be a NumPy array, got {type(array).__name__}", where=where)
        if _dtype(array) != info.dtype:
            raise UsageError(
                f"input {name!r} must be {info.dtype}, got {array.dtype}",
                where=where,
                hint=f"convert it first: {name}.astype({info.dtype!r})",
            )
        if len(array.shape) != len(info.axes) or any(
            isinstance(axis, int) and axis != size for axis, size in zip(info.axes, array.shape, strict=True)
        ):
            raise UsageError(f"input must be {_described(info)}, got shape {list(array.shape)}", where=where)
        for axis, size in zip(info.axes, array.shape, strict=True):
            if not isinstance(axis, str) or axis == "?":
                continue
            other, earlier = sizes.setdefault(axis, (name, size))
            if earlier != size:
                raise UsageError(f"axis {axis!r} is {earlier} in {other!r} but {size} in {name!r}", where=where)


def _dtype(array: np.ndarray[Any, Any]) -> str:
    return "string" if array.dtype.kind in "OSU" else array.dtype.name


def _described(info: TensorInfo) -> str:
    return f"{info.name!r}: {info.dtype} [{', '.join(map(str, info.axes))}]"
