"""Compile an ONNX file for a GPU without having one: TensorRT-RTX, one process a file.

TensorRT-RTX parses and builds on any machine; it cannot run there what it built. Kernels are chosen and timed on the
GPU at the first run, so nothing here says how fast a file is.
Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/ (CPU-only ahead-of-time compilation)
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, StageError, UsageError

__all__ = ["TARGETS", "Compiled", "Refusal", "compile_onnx", "compiler_installed", "nearest_target"]

#: Compute capabilities that TensorRT-RTX 1.7 compiles for.
TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
TIMEOUT_S = 600.0
BINDINGS = "tensorrt_rtx_bindings"
INSTALL = "pip install 'edgekd[trt-verify]'"


@dataclass(frozen=True)
class Refusal:
    """A node that the parser does not take; `code` is TensorRT's ErrorCode."""

    node: str
    op: str
    what: str
    code: str


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one file. `engine_bytes` is None where it built nothing."""

    compute_capability: str
    version: str
    refused: list[Refusal]
    #: What it logged as errors after parsing, where it built nothing.
    errors: list[str]
    engine_bytes: int | None
    seconds: float
    #: Every message, `SEVERITY: text`, one after the other; a text may have many lines.
    log: str

    @property
    def ok(self) -> bool:
        """Whether there is an engine."""
        return self.engine_bytes is not None


def compiler_installed() -> bool:
    """Whether the extra `trt-verify` is here."""
    return importlib.util.find_spec(BINDINGS) is not None


def nearest_target(compute_capability: str) -> str:
    """The capability nearest by number that the compiler has; the lower one of two."""
    wanted = float(compute_capability)
    return min(TARGETS, key=lambda target: (round(abs(float(target) - wanted), 1), float(target)))


def compile_onnx(
    path: Path,
    compute_capability: str,
    *,
    batches: tuple[int, int, int] = (1, 1, 8),
    timeout_s: float = TIMEOUT_S,
) -> Compiled:
    """Parse and build `path` for a compute capability of TARGETS; types are those of the file.

    An open first axis is the batch, from `batches[0]` to `batches[2]`, built for `batches[1]`. A file that TensorRT
    refuses is no exception: see `Compiled.refused` and `errors`. Raises MissingExtra without TensorRT-RTX, UsageError
    for another capability, a file that is none or no ONNX, or another open axis, and StageError where the compiler
    crashes or does not end within `timeout_s` seconds.
    """
    if compute_capability not in TARGETS:
        what = f"TensorRT-RTX does not compile for compute capability {compute_capability}"
        raise UsageError(what, where="compute capability", hint=f"it has {', '.join(TARGETS)}")
    if not compiler_installed():
        raise MissingExtra("TensorRT-RTX is not installed", where=BINDINGS, hint=INSTALL)
    if not path.is_file():
        raise UsageError("no such file", where=str(path), hint="an .onnx file is wanted")
    found, messages, status = _ask(path, compute_capability, batches, timeout_s)
    if found is None:
        last = next((text for _, text in reversed(messages) if text.strip()), "nothing")
        raise StageError(
            f"the compiler {_ending(status)}; the last it said: {last.strip().splitlines()[0][:300]}",
            where=str(path),
            hint="the file is the likely cause: edgekd verify names what TensorRT is known not to take",
        )
    _raise_problems(found, path)
    errors = [text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")]
    refused = [Refusal(**entry) for entry in found["refused"]]
    return Compiled(
        compute_capability=compute_capability,
        version=found["version"],
        refused=refused,
        errors=[] if refused or found["engine_bytes"] is not None else errors,
        engine_bytes=found["engine_bytes"],
        seconds=found["seconds"],
        log="".join(f"{severity}: {text}\n" for severity, text in messages),
    )


def _ask(
    path: Path, capability: str, batches: tuple[int, int, int], timeout_s: float
) -> tuple[dict[str, Any] | None, list[tuple[str, str]], int | str]:
    status: int | str
    worker = Path(__file__).with_name("worker.py")
    command = [sys.executable, "-P", str(worker), str(path.resolve()), capability, ",".join(map(str, batches))]
    try:
        child = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
        said, status = child.stdout, child.returncode
        trouble = child.stderr.decode("utf-8", "replace").strip()
    except subprocess.TimeoutExpired as error:
        said, status, trouble = error.stdout or b"", f"did not end within {timeout_s:g} s", ""
    except OSError as error:
        raise StageError(f"the compiler did not start: {error.strerror}", where=str(worker)) from error
    found: dict[str, Any] | None = None
    messages: list[tuple[str, str]] = []
    for line in said.decode("utf-8", "replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut off where it ended
            continue
        if isinstance(entry, dict):
            found = entry
        else:
            messages.append((entry[0], entry[1]))
    if found is None and trouble:
        messages.append(("ERROR", trouble.splitlines()[-1]))
    return found, messages, status


def _ending(status: int | str) -> str:
    if isinstance(status, str):
        return status
    if status < 0:
        killed = ", perhaps for want of memory" if -status == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-status).name}{killed}"
    return f"ended with status {status}"


def _raise_problems(found: dict[str, Any], path: Path) -> None:
    if "missing" in found:
        raise MissingExtra(f"TensorRT-RTX does not load: {found['missing']}", where=BINDINGS, hint=INSTALL)
    if "no_target" in found:
        what = f"TensorRT-RTX {found['version']} does not compile for compute capability {found['no_target']}"
        raise UsageError(what, where="compute capability", hint=INSTALL)
    if any(entry["code"] == "MODEL_DESERIALIZE_FAILED" for entry in found["refused"]):
        raise UsageError("not an ONNX file, or one that is cut off", where=str(path), hint="write it again")
    for name, axes in found["open_axes"].items():
        raise UsageError(
            f"input {name!r} leaves axes {', '.join(map(str, axes))} open, only axis 0, the batch, may be",
            where=str(path),
            hint="export with a fixed size of the images",
        )
