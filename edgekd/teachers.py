"""Where a student's targets come from: teacher sources.

A source is an `nn.Module` registered under the kind `teachers`: built as `Source(network, **args)`,
called as `source(batch, students) -> [outputs]`, one dict of tensors per student, without gradient.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from .artifact import write_atomically
from .errors import StageError, UsageError
from .registry import register

__all__ = ["Cached", "Frozen"]

Outputs = dict[str, Tensor]
AGAIN = "delete it: it is computed again"


@register("teachers", "frozen")
class Frozen(nn.Module):
    """A trained network that never changes and answers every batch anew."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """image [N, C, H, W] -> the same outputs for every student."""
        outputs = self.network(batch["image"])
        return [outputs for _ in students]


@register("teachers", "cached")
class Cached(nn.Module):
    """A trained network's logits for a fixed number of augmented views per image, computed once and replayed.

    Teacher and student see the same crop, since a view's augmentation follows from the seed (FKD: Shen and Xing 2022,
    arXiv:2112.01528). Epoch e trains on view e modulo `views`. Logits only: objectives on features need `frozen`.
    """

    def __init__(self, network: nn.Module, views: Annotated[int, Field(gt=0)] = 8) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.views = views
        self.files: list[Path] = []
        self.images = 0
        self._replayed: tuple[int, Tensor] | None = None

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
    ) -> None:
        """Compute what `directory` lacks: one file per view, each [images, K] in half precision, written atomically.

        `stream(view)` gives batches that cover all `images` once. The directory's name must tell teacher, data and
        augmentation apart. Raises StageError when the disk refuses, or a file there does not fit.
        """
        files = [directory / f"view-{view:03d}.npy" for view in range(self.views)]
        for view, file in enumerate(files):
            if not file.exists():
                self._compute(
                    file, stream(view), images, partial(_offset, progress, view * images, self.views * images)
                )
            progress((view + 1) * images, self.views * images)
        self.files, self.images = files, images
        self._replay(0)

    def _compute(
        self, file: Path, batches: Iterable[dict[str, Any]], images: int, progress: Callable[[int], None]
    ) -> None:
        rows: np.ndarray[Any, Any] | None = None
        done = 0
        for batch in batches:
            logits = self.network(batch["image"])["logits"].float().cpu().numpy()
            if rows is None:
                rows = np.zeros((images, logits.shape[1]), np.float16)
            with np.errstate(over="ignore"):  # told below
                rows[batch["index"].numpy()] = logits
            done += len(logits)
            progress(done)
        assert rows is not None
        if not np.isfinite(rows).all():
            raise StageError("the teacher's logits are not finite in half precision", hint="use source = 'frozen'")
        buffer = io.BytesIO()
        np.save(buffer, rows)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, buffer.getvalue())
        except OSError as error:
            raise StageError(f"cannot write the teacher cache: {error.strerror}", where=str(file)) from error

    def _replay(self, view: int) -> Tensor:
        if self._replayed is None or self._replayed[0] != view:
            try:
                rows = np.load(self.files[view], allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise StageError("the teacher cache is damaged", where=str(self.files[view]), hint=AGAIN) from error
            if rows.ndim != 2 or len(rows) != self.images:
                what = f"the teacher cache holds {list(rows.shape)}, expected [{self.images}, classes]"
                raise StageError(what, where=str(self.files[view]), hint=AGAIN)
            self._replayed = (view, torch.from_numpy(rows))
        return self._replayed[1]

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """index [N] and view -> stored logits [N, K]; before `fill`, what the network says to the images."""
        if not self.files:
            outputs = self.network(batch["image"])
            if len(outputs) > 1:
                raise UsageError(
                    "a cached teacher has logits only, no features",
                    where="source",
                    hint="source = 'frozen', or objectives on logits",
                )
        else:
            logits = self._replay(batch["view"])[batch["index"].cpu()].to(batch["image"].device).float()
            outputs = {"logits": logits}
        return [outputs for _ in students]


def _offset(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)
