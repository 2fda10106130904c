"""Which runtimes this machine has; for each missing one why, and what to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["RuntimeStatus", "probe", "status_of"]

#: Loading CUDA libraries from a cold disk takes this long at worst.
TIMEOUT_S = 60.0


class RuntimeStatus(BaseModel):
    """One line of `edgekd doctor`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    available: bool
    version: str | None = None
    why: str | None = None
    install: str | None = None
    details: list[str] = []


@dataclass(frozen=True)
class _Target:
    name: str
    module: str
    distributions: tuple[str, ...]
    install: str
    #: Python that runs after `import MODULE as m` and prints a JSON object: why (or null) and details.
    check: str


_TARGETS = [
    _Target(
        "onnxruntime",
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu"),
        "pip install onnxruntime",
        "say(None, m.get_available_providers())",
    ),
    _Target(
        "onnxruntime on CUDA",
        "onnxruntime",
        ("onnxruntime-gpu", "onnxruntime"),
        "pip install onnxruntime-gpu (needs an NVIDIA GPU)",
        "has = 'CUDAExecutionProvider' in m.get_available_providers()\n"
        "say(None if has else 'built without CUDAExecutionProvider')",
    ),
    _Target(
        "torch on CUDA",
        "torch",
        ("torch",),
        "install torch's CUDA build (needs an NVIDIA GPU and its driver): https://pytorch.org/get-started",
        "n = m.cuda.device_count()\n"
        "say(None if n else ('no GPU is visible' if m.version.cuda else 'a CPU-only build of torch'),"
        " [m.cuda.get_device_name(i) for i in range(n)])",
    ),
    _Target(
        "tensorrt",
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "pip install 'edgekd[trt]' (needs an NVIDIA GPU)",
        # The bindings import without a GPU; only a builder shows that the driver is there.
        "say(None if m.Builder(m.Logger(m.Logger.ERROR)) else 'no builder: is there an NVIDIA GPU?')",
    ),
    _Target(
        "torch-tensorrt",
        "torch_tensorrt",
        ("torch-tensorrt",),
        "pip install 'edgekd[trt]' (needs an NVIDIA GPU)",
        "import torch\nsay(None if torch.cuda.is_available() else 'imports, but no GPU is visible')",
    ),
    _Target(
        "tensorrt-rtx",
        "tensorrt_rtx_bindings",  # what the wheel installs
        ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
        "pip install 'edgekd[trt-verify]' (compiles for TensorRT without a GPU)",
        "targets = [n[2:-1] + '.' + n[-1] for n in m.ComputeCapability.__members__ if n.startswith('SM')]\n"
        "say(None if m.Builder(m.Logger(m.Logger.ERROR)) else 'no builder', ['compiles for ' + ', '.join(targets)])",
    ),
]

_PRELUDE = """
import json
def say(why, details=()): print("\\x1e" + json.dumps({"why": why, "details": list(details)}))
"""


def probe() -> list[RuntimeStatus]:
    """The state of every runtime that edgekd knows, in a fixed order; takes seconds at most and never raises.

    What is installed is imported in a process of its own: such imports may print, fail in any way, or crash.
    """
    with ThreadPoolExecutor(max_workers=len(_TARGETS)) as pool:
        return list(pool.map(_status, _TARGETS))


def status_of(name: str) -> RuntimeStatus:
    """One of `probe`'s, by its name."""
    return _status(next(target for target in _TARGETS if target.name == name))


def _status(target: _Target, run: Callable[..., Any] = subprocess.run) -> RuntimeStatus:
    if importlib.util.find_spec(target.module) is None:
        return RuntimeStatus(name=target.name, available=False, why="not installed", install=target.install)
    version = _version(target.distributions)
    if target.module == "torch" and version is not None and version.endswith("+cpu"):
        answer: dict[str, Any] = {"why": "a CPU-only build of torch", "details": []}  # known without its slow import
    else:
        answer = _ask(target, run)
    why = answer["why"]
    return RuntimeStatus(
        name=target.name,
        available=why is None,
        version=version,
        why=why,
        install=target.install if why else None,
        details=answer["details"],
    )


def _ask(target: _Target, run: Callable[..., Any]) -> dict[str, Any]:
    script = f"{_PRELUDE}import {target.module} as m\n{target.check}\n"
    try:
        child = run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"why": f"importing it did not end within {TIMEOUT_S:.0f} s", "details": []}
    answer = child.stdout.rpartition("\x1e")[2] if "\x1e" in child.stdout else ""
    if child.returncode == 0 and answer:
        return dict(json.loads(answer.partition("\n")[0]))
    last = (child.stderr.strip().splitlines() or [f"it ended with status {child.returncode}"])[-1]
    return {"why": f"installed, but does not work: {last[:300]}", "details": []}


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
