"""Reading what the user named, with one message when it cannot be read."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError

__all__ = ["directory", "read_bytes"]


def directory(path: Path, hint: str) -> Path:
    """`path` with `~` expanded. Raises UsageError when it is no directory."""
    path = path.expanduser()
    if not path.is_dir():
        what = "is a file, expected a directory" if path.exists() else "no such directory"
        raise UsageError(what, where=str(path), hint=hint)
    return path


def read_bytes(path: Path, hint: str) -> bytes:
    """Raises UsageError when the file is missing or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError("no such file", where=str(path), hint=hint) from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path), hint=hint) from error
