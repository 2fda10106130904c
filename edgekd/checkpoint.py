"""What a training leaves on disk while it is not complete: its state, and one history per student."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .artifact import write_atomically
from .errors import StageError

__all__ = ["CHECKPOINT", "METRICS", "metrics_file", "read", "write"]

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


def metrics_file(member: int) -> str:
    """The name of a student's history."""
    return METRICS if member == 0 else f"metrics-{member}.jsonl"


def write(directory: Path, content: Mapping[str, Any], histories: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """Replace checkpoint and histories, each atomically. Raises StageError when the disk refuses."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Histories first: restoring writes them anew from the checkpoint, so they may only be ahead.
        for i, history in enumerate(histories):
            write_atomically(directory / metrics_file(i), "".join(json.dumps(record) + "\n" for record in history))
        write_atomically(directory / CHECKPOINT, buffer.getvalue())
    except OSError as error:
        raise StageError(
            f"cannot save a checkpoint: {error.strerror or error}", where=str(directory), hint="is the disk full?"
        ) from error


def read(directory: Path) -> bytes | None:
    """The checkpoint's bytes, None where there is none. Raises StageError when the disk refuses."""
    file = directory / CHECKPOINT
    try:
        return file.read_bytes() if file.exists() else None
    except OSError as error:
        raise StageError(f"cannot read the checkpoint: {error.strerror or error}", where=str(file)) from error
