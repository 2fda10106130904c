"""`events.jsonl` in a run's directory: what a run tells while it works, for whoever watches from elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import EdgekdError

__all__ = ["EVENTS", "recording"]

Event = dict[str, Any]
EVENTS = "events.jsonl"
#: Events that only move a bar are written once so many seconds, and when they are through.
EVERY_S = 1.0
MOVING = ("step", "bench", "cache")


@contextlib.contextmanager
def recording(directory: Path, command: str, emit: Callable[[Event], None]) -> Iterator[Recorder]:
    """A callable that passes events on to `emit` and appends them to the run's file; see `Recorder`."""
    recorder = Recorder(directory / EVENTS, command, emit)
    try:
        yield recorder
    except BaseException as error:
        code, text = _outcome(error)
        recorder.write({"event": "end", "exit_code": code, "error": text})
        raise
    finally:
        recorder.close()


class Recorder:
    """Writes one JSON line an event. The file begins anew with the first one, when the run holds its directory.

    A disk that is full, or a directory that is read-only, costs the record and not the run.
    """

    def __init__(self, file: Path, command: str, emit: Callable[[Event], None]) -> None:
        self._file, self._command, self._emit = file, command, emit
        self._stream: IO[str] | None = None
        self._failed = False
        self._told: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        self._emit(event)
        if event["event"] in MOVING:
            what, now = str(event.get("stage", event.get("profile"))), time.monotonic()
            if now - self._told.get(what, -EVERY_S) < EVERY_S and event["done"] < event["total"]:
                return
            self._told[what] = now
        if self._stream is None and not self._failed:
            self._begin()
        self.write(event)

    def write(self, event: Event) -> None:
        """Nothing where no event came before: then the directory is not ours."""
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps({"version": 1, "at": round(time.time(), 3), **event}, default=str) + "\n")
            self._stream.flush()
        except OSError:
            self.close()
            self._failed = True

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None

    def _begin(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.unlink(missing_ok=True)  # another file, so that a watcher sees that another run has begun
            self._stream = self._file.open("w", encoding="utf-8")
        except OSError:
            self._failed = True
        self.write({"event": "begin", "pid": os.getpid(), "host": socket.gethostname(), "command": self._command})


def _outcome(error: BaseException) -> tuple[int, str]:
    if isinstance(error, EdgekdError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted: run the same command again to resume"
    return (3 if isinstance(error, OSError) else 70), f"{type(error).__name__}: {error}"
