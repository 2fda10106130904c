"""Runtimes: open a model file, run it, and say which runtimes this machine has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..profile import Profile
from ..registry import resolve
from . import onnxruntime_cuda, tensorrt, torch_session  # noqa: F401 (importing them registers their runtimes)
from .doctor import RuntimeStatus, probe
from .onnxruntime import open_onnxruntime
from .session import DeviceCall, Feed, Parts, Session, check_feed

__all__ = [
    "DeviceCall",
    "Feed",
    "Parts",
    "RuntimeStatus",
    "Session",
    "check_feed",
    "open_for",
    "open_onnxruntime",
    "open_session",
    "probe",
]


def open_session(
    file: Path,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    profile_dir: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Session:
    """Open a model file in a runtime, with `threads` threads inside an operator.

    `profile_dir` gets the runtime's own per-operator trace when the session is closed; `options` are what this
    runtime takes beside (device, precision, cuda_graphs), what it does not take is left out.
    Raises UsageError (no such runtime, no such file, not a valid model) or MissingExtra (the runtime is not installed).
    """
    component, arguments = resolve("runtimes", runtime, where="runtime")
    takes = inspect.signature(component).parameters
    arguments |= {name: value for name, value in (options or {}).items() if name in takes}
    session: Session = component(file=Path(file), threads=threads, profile_dir=profile_dir, **arguments)
    return session


def open_for(file: Path, profile: Profile) -> Session:
    """Open a model file as a profile runs it: its runtime and threads, and on a GPU its precision and CUDA graphs."""
    return open_session(file, runtime=profile.runtime, threads=profile.threads, options=profile.runtime_options)
