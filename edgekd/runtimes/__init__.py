"""Runtimes: open a model file, run it, and say which runtimes this machine has."""

from __future__ import annotations

from pathlib import Path

from ..registry import resolve
from .doctor import RuntimeStatus, probe
from .onnxruntime import open_onnxruntime
from .session import Feed, Session, check_feed

__all__ = ["Feed", "RuntimeStatus", "Session", "check_feed", "open_onnxruntime", "open_session", "probe"]


def open_session(
    file: Path, *, runtime: str = "onnxruntime", threads: int = 1, profile_dir: Path | None = None
) -> Session:
    """Open a model file in a runtime, with `threads` threads inside an operator.

    `profile_dir` gets the runtime's own per-operator trace when the session is closed.
    Raises UsageError (no such runtime, no such file, not a valid model) or MissingExtra (the runtime is not installed).
    """
    component, arguments = resolve("runtimes", runtime, where="runtime")
    session: Session = component(file=Path(file), threads=threads, profile_dir=profile_dir, **arguments)
    return session
