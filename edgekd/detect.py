"""A profile for the machine that this runs on."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from typing import Any, NamedTuple

from .bench import environment, kernels_differ, not_here
from .errors import UsageError
from .jetpack import of_l4t, of_tensorrt, same_line
from .profile import Profile, load_profile, profile_names
from .toml_text import pairs

__all__ = ["Detected", "detect", "l4t_of", "tensorrt_of"]

#: The wheels that bring TensorRT's Python module.
WHEELS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
TABLES = ("tensorrt", "datasheet", "protocol", "budgets")


class Detected(NamedTuple):
    """`table`: the profile's keys as they stand in a file; `notes`: what was found, and what was not."""

    table: dict[str, Any]
    notes: list[str]

    def toml(self) -> str:
        """The file: what was found as comments, then the keys."""
        plain = {key: value for key, value in self.table.items() if key not in TABLES}
        blocks = [f"[{key}]\n{pairs(self.table[key])}" for key in TABLES if self.table.get(key)]
        head = "\n".join(["# Written by `edgekd profiles detect`.", *(f"# {note}" for note in self.notes)])
        return "\n\n".join([f"{head}\n{pairs(plain)}", *blocks]) + "\n"


def detect(machine: dict[str, Any] | None = None, installed: str | None = None) -> Detected:
    """A profile for this machine, or for the one that `machine` (`edgekd.bench.environment`) describes.

    It extends the nearest shipped profile. Where that one's datasheet is another device's, it stands alone without one.
    `installed` is what dpkg says of TensorRT's packages. Raises UsageError where no shipped profile is near.
    """
    machine = environment() if machine is None else machine
    if "jetson" in machine:
        return _jetson(machine, _dpkg() if installed is None else installed)
    if machine.get("gpus"):
        return _gpu(machine, tensorrt_of(installed) if installed is not None else _wheel() or tensorrt_of(_dpkg()))
    return _cpu(machine)


def l4t_of(text: str) -> str | None:
    """`36.4.7` in the first line of /etc/nv_tegra_release (`# R36 (release), REVISION: 4.7, ...`)."""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def tensorrt_of(text: str) -> str | None:
    """`10.3.0` in lines of `dpkg -l` or `dpkg-query -W` (`libnvinfer10  10.3.0.30-1+cuda12.5`)."""
    found = re.search(r"^(?:ii\s+)?(?:tensorrt|libnvinfer\d+)(?::\w+)?\s+(\d+\.\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else None


def _cpu(machine: dict[str, Any]) -> Detected:
    known = [p for p in _shipped("cpu") if not_here(p, machine, list) is None and kernels_differ(p, machine) is None]
    if not known:
        raise UsageError(f"no shipped profile is near a {machine['machine']} CPU", hint="edgekd profiles list")
    base = max(known, key=lambda p: len(p.requires))
    board = machine.get("board")
    changes = {
        "description": f"{board or machine['cpu']}, {_cores(machine)}, ONNX Runtime",
        "threads": min(base.threads, machine["cores"]),
        "memory_mb": machine["memory_mb"],
    }
    notes = [_processor(machine)]
    # The only CPU whose datasheet is shipped; any other one with its kernels has other figures.
    return _near(base, changes, notes, same=base.datasheet is None or "Raspberry Pi 5" in str(board))


def _gpu(machine: dict[str, Any], tensorrt: str | None) -> Detected:
    card = machine["gpus"][0]
    capability, here = card.get("compute_capability"), _shipped("gpu")
    same = next((p for p in here if not_here(p, machine, list) is None), None)
    base = same or next((p for p in here if p.compute_capability == capability), None) or load_profile("gpu-h100")
    turing = capability is not None and float(capability) < 8
    changes: dict[str, Any] = {
        "description": f"{card['name']}, TensorRT",
        "product": (base.product if same else None) or str(card["name"]).removeprefix("NVIDIA "),
        "compute_capability": capability,
        "precisions": [p for p in base.precisions if p != "bf16"] if turing else base.precisions,
    }
    if card.get("memory_mb"):
        changes["memory_mb"] = card["memory_mb"]
    notes = [f"GPU: {card['name']}, driver {card['driver_version']}", _processor(machine), _without_gpu(machine)]
    if tensorrt is None:
        guess = base.tensorrt.version if base.tensorrt is not None else "none"
        notes.append(f"TensorRT was not found here: {guess} is a guess, write the version that you will have")
    else:
        changes |= _typed(tensorrt)
    return _near(base, changes, notes, same=same is not None)


def _jetson(machine: dict[str, Any], installed: str) -> Detected:
    board, mode = str(machine.get("board")), machine.get("power_mode")
    boards = _shipped("jetson")
    exact = next((p for p in boards if not_here(p, machine, list) is None), None)
    of_any_mode = (p for p in boards if not_here(p, {**machine, "power_mode": None}, list) is None)
    of_chip = (p for p in boards if p.compute_capability == machine.get("compute_capability"))
    base = exact or next(of_any_mode, None) or next(of_chip, None)
    if base is None or base.tensorrt is None:
        raise UsageError(f"no shipped profile is near {board}", hint="edgekd profiles list")
    release, version = l4t_of(str(machine["jetson"])), tensorrt_of(installed)
    jetpack = of_l4t(release) if release else None
    if version and (jetpack is None or not same_line(version, (jetpack.tensorrt, *jetpack.also))):
        jetpack = of_tensorrt(version, machine.get("compute_capability"))
    changes: dict[str, Any] = {"description": f"{board}, {mode or 'power mode unknown'}, TensorRT"}
    if mode:
        changes["power_mode"] = mode
    if base.product and base.product.lower() not in board.lower():
        changes["product"] = board.removeprefix("NVIDIA ")
    changes |= _typed(version or (jetpack.tensorrt if jetpack else base.tensorrt.version))
    if jetpack is not None:
        changes["tensorrt"]["jetpack"] = jetpack.version
    found = f"TensorRT {version} by dpkg" if version else "TensorRT not found by dpkg: as in its JetPack"
    notes = [f"board: {board}, L4T {release}, JetPack {jetpack.version if jetpack else 'not known'}, {found}"]
    if exact is None:
        notes.append(f"no shipped profile is this board in power mode {mode}: write its datasheet for estimates")
    return _near(base, changes, [*notes, _processor(machine)], same=exact is not None and jetpack is not None)


def _typed(version: str) -> dict[str, Any]:
    """TensorRT's version, and the opset that its files have."""
    return {"opset": 20 if int(version.partition(".")[0]) >= 11 else 17, "tensorrt": {"version": version}}


def _near(base: Profile, changes: dict[str, Any], notes: list[str], *, same: bool) -> Detected:
    """What differs from the base, which is the `same` device; or all of it, without what is the other device's."""
    whole = base.model_dump(mode="json", exclude_none=True)
    if same:
        own = {key: value for key, value in changes.items() if whole.get(key) != value}
        return Detected({"extends": base.name, **own}, notes)
    tensorrt = {**whole.get("tensorrt", {}), **changes.get("tensorrt", {})}
    if "jetpack" not in changes.get("tensorrt", {}):
        tensorrt.pop("jetpack", None)
    whole |= {**changes, "tensorrt": tensorrt}
    for key in ("name", "datasheet", *(key for key in TABLES if not whole.get(key))):
        whole.pop(key, None)
    return Detected({key: value for key, value in whole.items() if value is not None}, notes)


def _shipped(device: str) -> list[Profile]:
    return [p for name in profile_names() if (p := load_profile(name)).device == device]


def _processor(machine: dict[str, Any]) -> str:
    instructions = ", ".join(machine["instruction_sets"]) or "none that matters"
    return (
        f"CPU: {machine['cpu']}, {machine['cores']} cores, {machine['memory_mb']} MB, instruction sets: {instructions}"
    )


def _cores(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"


def _without_gpu(machine: dict[str, Any]) -> str:
    known = [p for p in _shipped("cpu") if not_here(p, machine, list) is None and kernels_differ(p, machine) is None]
    return f"its CPU alone: {max(known, key=lambda p: len(p.requires)).name}" if known else "its CPU alone: no profile"


def _wheel() -> str | None:
    for name in WHEELS:
        try:
            return ".".join(importlib.metadata.version(name).split(".")[:3])
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _dpkg() -> str:
    if shutil.which("dpkg-query") is None:
        return ""
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", "tensorrt", "libnvinfer[0-9]*"]
    return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout  # 1 where one is not there
