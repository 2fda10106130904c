"""Follow a run from another terminal, by the events that it writes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UsageError, nearest
from .events import EVENTS

__all__ = ["follow"]

Event = dict[str, Any]
POLL_S = 0.3
#: The event that stands for a run which ended without saying so.
KILLED = {"event": "end", "exit_code": 3, "error": "the run was killed: run the same command again to resume"}


def follow(directory: Path, poll_s: float = POLL_S) -> Iterator[Event]:
    """The events of the directory's latest run, those of the past first, until its `end`.

    Waits for the first event where none was written yet. A run whose process is gone ends with an `end` of exit
    code 3. Raises UsageError when there is no such directory.
    """
    if not directory.is_dir():
        parent = directory.parent if directory.parent.is_dir() else Path("runs")
        runs = [str(p.parent) for p in parent.glob("*/recipe.toml")] if parent.is_dir() else []
        raise UsageError(f"no run at {directory}", where="watch", hint=nearest(str(directory), runs))
    file = directory / EVENTS
    begun: Event | None = None
    position, rest, inode = 0, b"", None
    while True:
        try:
            with file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_ino != inode or status.st_size < position:
                    position, rest, inode = 0, b"", status.st_ino  # another run has begun here
                stream.seek(position)
                new = stream.read()
        except FileNotFoundError:
            new = b""
        position += len(new)
        *lines, rest = (rest + new).split(b"\n")
        for line in lines:
            event = _parsed(line)
            if event is None:
                continue
            if event["event"] == "begin":
                begun = event
            yield event
            if event["event"] == "end":
                return
        if not lines:
            if begun is not None and _gone(begun):
                yield KILLED
                return
            time.sleep(poll_s)


def _parsed(line: bytes) -> Event | None:
    """None for what a full disk or a killed process left of a line."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _gone(begun: Event) -> bool:
    """Whether the process that wrote `begin` ended; False where it runs on another machine."""
    if begun.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(begun["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return _zombie(int(begun["pid"]))


def _zombie(pid: int) -> bool:
    """Ended, but not yet waited for by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
