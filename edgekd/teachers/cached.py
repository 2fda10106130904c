"""A teacher's logits for a fixed number of augmented views per image, computed once and replayed."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ..artifact import write_atomically
from ..errors import StageError, UsageError
from ..recipe import Component, ComponentField
from ..registry import register
from .spec import make_source, source_of

__all__ = ["Cached", "cache_bytes", "differs", "unequal", "view_file"]

Outputs = dict[str, Tensor]
AGAIN = "delete it: it is computed again"
HEADER = "cache.json"
FROZEN = Component(use="frozen")


def view_file(directory: Path, view: int) -> Path:
    """Where a cache keeps a view."""
    return directory / f"view-{view:03d}.npy"


def cache_bytes(images: int, classes: int, views: int, top: int | None) -> int:
    """What the files of a cache's views hold together, in bytes."""
    row = _row(classes, top)
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(row.base), "fortran_order": False, "shape": (images, *row.shape)}
    np.lib.format.write_array_header_1_0(header, fields)
    return views * (header.tell() + images * row.itemsize)


def _row(classes: int, top: int | None) -> np.dtype[Any]:
    """What is stored of one image: all logits, or the `top` log-probabilities, the rest's log-mass, and the classes."""
    if top is None or top >= classes:
        return np.dtype((np.float16, (classes,)))
    return np.dtype([("value", np.float16, (top + 1,)), ("index", np.uint16 if classes <= 65536 else np.int32, (top,))])


@register("teachers", "cached")
class Cached(nn.Module):
    """A teacher's logits for a fixed number of views per image, computed once and replayed (FKD 2022).

    Source: Shen and Xing 2022, arXiv:2112.01528.

    Teacher and student see the same crop, since a view's augmentation follows from the seed. Epoch e trains on view e
    modulo `views`. Logits only, in half precision; with `top`, only so many log-probabilities and the mass of the rest,
    which is spread evenly. Objectives on features need `frozen`.
    """

    snippet = (
        'objectives = [{ use = "ce", weight = 0.1 }, { use = "kl", weight = 0.9, tau = 4.0 }]\n'
        'source = { use = "cached", views = 2 }'
    )

    def __init__(
        self,
        networks: Sequence[nn.Module],
        views: Annotated[int, Field(gt=0)] = 8,
        top: Annotated[int | None, Field(gt=0, description="classes kept per image; default: all")] = None,
        of: Annotated[ComponentField, Field(description="whose answers are kept: frozen, or an ensemble")] = FROZEN,
        directory: Annotated[Path | None, Field(description="default: .cache in the run's directory")] = None,
    ) -> None:
        super().__init__()
        self.inner = make_source(source_of(of, "source.of"), networks, [], ())
        if not getattr(self.inner, "repeatable", False):
            raise UsageError(f"{of.use} answers anew each time", where="source.of", hint="frozen, or an ensemble")
        self.views, self.top, self.of, self.directory = views, top, of, directory
        self.files: list[Path] = []
        self.images = self.classes = 0
        self._open: tuple[int, NDArray[Any]] | None = None

    def train(self, mode: bool = True) -> Cached:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def fill(
        self,
        directory: Path,
        stream: Callable[[int], Iterable[dict[str, Any]]],
        images: int,
        progress: Callable[[int, int], None],
        key: Mapping[str, Any],
        device: torch.device | str = "cpu",
    ) -> None:
        """Compute what `directory` lacks: one file per view, each of `images` rows, written atomically.

        `stream(view)` gives batches that cover all images once; they are answered on `device`. `key` tells teacher,
        data and augmentation apart; a directory that was filled for another key is refused. A second process waits
        until the first one is done. Raises StageError when the disk refuses, or a file there does not fit.
        """
        files = [view_file(directory, view) for view in range(self.views)]
        with _alone(directory):
            _claim(directory, {**key, "top": self.top, "images": images})
            for view, file in enumerate(files):
                if not file.exists():
                    done = partial(_offset, progress, view * images, self.views * images)
                    self._compute(file, stream(view), images, done, device)
                progress((view + 1) * images, self.views * images)
        self.files, self.images = files, images
        self.inner = nn.Identity()  # it has said all it will be asked
        self._rows(0)

    def _compute(
        self,
        file: Path,
        batches: Iterable[dict[str, Any]],
        images: int,
        progress: Callable[[int], None],
        device: torch.device | str,
    ) -> None:
        self.inner.to(device)
        rows: NDArray[Any] | None = None
        done = 0
        for batch in batches:
            there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            logits = self.inner(there, [{}])[0]["logits"].float().cpu()
            if rows is None:
                rows = np.zeros(images, _row(logits.shape[1], self.top))
            with np.errstate(over="ignore"):  # told below
                _store(rows, batch["index"].numpy(), logits)
            done += len(logits)
            progress(done)
        assert rows is not None
        if not np.isfinite(rows["value"] if rows.dtype.names else rows).all():
            raise StageError("the teacher's logits are not finite in half precision", hint="use source = 'frozen'")
        buffer = io.BytesIO()
        np.save(buffer, rows)
        try:
            write_atomically(file, buffer.getvalue())
        except OSError as error:
            raise StageError(f"cannot write the teacher cache: {error.strerror}", where=str(file)) from error

    def _rows(self, view: int) -> NDArray[Any]:
        """The rows of a view, mapped into memory."""
        if self._open is None or self._open[0] != view:
            try:
                rows = np.load(self.files[view], mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise StageError("the teacher cache is damaged", where=str(self.files[view]), hint=AGAIN) from error
            if len(rows) != self.images or rows.ndim != (1 if rows.dtype.names else 2):
                what = f"the teacher cache holds {list(rows.shape)}, expected [{self.images}, classes]"
                raise StageError(what, where=str(self.files[view]), hint=AGAIN)
            self._open = (view, rows)
        return self._open[1]

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """index [N] and view -> stored logits [N, K]; before `fill`, what the networks say to the images."""
        if not self.files:
            outputs = {"logits": self.inner(batch, [{}])[0]["logits"]}
            self.classes = outputs["logits"].shape[1]
        else:
            rows = self._rows(batch["view"])[batch["index"].cpu().numpy()]
            outputs = {"logits": _logits(rows, self.classes).to(batch["image"].device)}
        return [outputs for _ in students]


def _store(rows: NDArray[Any], index: NDArray[Any], logits: Tensor) -> None:
    if not rows.dtype.names:
        rows[index] = logits.numpy()
        return
    top = rows.dtype["index"].shape[0]
    log_p = logits.double().log_softmax(dim=1)
    value, classes = log_p.topk(top, dim=1)
    rest = (1 - value.exp().sum(dim=1, keepdim=True)).clamp(min=1e-12).log()
    rows["value"][index] = torch.cat([value, rest], dim=1).clamp(min=-6e4).numpy()
    rows["index"][index] = classes.numpy()


def _logits(rows: NDArray[Any], classes: int) -> Tensor:
    """Rows of a file -> logits float32 [N, K]."""
    if not rows.dtype.names:
        return torch.from_numpy(rows.astype(np.float32))
    value = torch.from_numpy(rows["value"].astype(np.float32))
    index = torch.from_numpy(rows["index"].astype(np.int64))
    rest = value[:, -1:] - math.log(classes - index.shape[1])
    return rest.repeat(1, classes).scatter(1, index, value[:, :-1])


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the cache's directory; who comes second waits."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / ".lock").open("a")
    except OSError as error:
        raise StageError(f"cannot write the teacher cache: {error.strerror}", where=str(directory)) from error
    with stream:
        with contextlib.suppress(OSError):  # a file system without locks: files are still written atomically
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _claim(directory: Path, key: Mapping[str, Any]) -> None:
    """Write down whose cache this is, or find that it is somebody else's. Raises StageError."""
    other = differs(directory, key)
    if other:
        raise StageError(
            f"this teacher cache was made with another {', '.join(other)}",
            where=str(directory),
            hint="name another directory, or leave it out: then it lies in the run",
        )
    try:
        if not (directory / HEADER).exists():
            write_atomically(directory / HEADER, json.dumps(key, indent=1, default=str) + "\n")
    except OSError as error:
        raise StageError(f"cannot write the teacher cache: {error.strerror}", where=str(directory)) from error


def unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts in which two caches' keys differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def differs(directory: Path, key: Mapping[str, Any]) -> list[str]:
    """The parts of the key in which a cache that lies there was made otherwise.

    Raises StageError where that cannot be told: the cache is damaged.
    """
    try:
        found = json.loads((directory / HEADER).read_text(encoding="utf-8"))
        return unequal(json.loads(json.dumps(key, default=str)), found)
    except FileNotFoundError as error:
        if not any(directory.glob("view-*.npy")):
            return []
        what = f"this teacher cache does not say whose answers it holds: its {HEADER} is missing"
        hint = f"delete {directory / 'view-*.npy'}: they are computed again"
        raise StageError(what, where=str(directory), hint=hint) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StageError("the teacher cache is damaged", where=str(directory), hint=f"delete {directory}") from error


def _offset(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)
