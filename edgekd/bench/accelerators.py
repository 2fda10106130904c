"""What NVIDIA GPUs and Jetson boards say about themselves: clocks, throttling, power mode."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["accelerators", "gpus", "power_mode", "with_capability"]

GPU_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.limit",
    "persistence_mode", "clocks_throttle_reasons.active",
)  # fmt: skip
#: Bits of nvmlClocksEventReasons (NVML API reference) that slow a busy GPU down.
THROTTLE = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "power brake",
}  # fmt: skip
#: A query of their own: drivers that do not know a field answer nothing at all.
CAPABILITY_FIELDS = ("compute_cap", "memory.total")
#: Chips of Jetsons, whose GPU is no card, in /proc/device-tree/compatible. Source: NVIDIA, "CUDA GPUs".
CHIPS = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}


def accelerators(root: Path = Path("/")) -> dict[str, Any]:
    """What this machine has of `gpus`, `board` (its name), `jetson` (the L4T release), its `power_mode` and the
    `compute_capability` of its GPU.
    """
    found: dict[str, Any] = {}
    if cards := gpus(_smi(GPU_FIELDS)):
        found["gpus"] = with_capability(cards, _smi(CAPABILITY_FIELDS))
    if board := _read(root / "proc/device-tree/model"):
        found["board"] = board.strip("\0\n ")
    if release := _read(root / "etc/nv_tegra_release"):
        found["jetson"] = release.splitlines()[0].lstrip("# ")
        found["power_mode"] = power_mode(_output(["nvpmodel", "-q"]))
        chips = _read(root / "proc/device-tree/compatible")
        found["compute_capability"] = next((c for chip, c in CHIPS.items() if chip in chips), None)
    return found


def gpus(text: str) -> list[dict[str, Any]]:
    """nvidia-smi's CSV, a line a GPU, as tables; `throttled` names what slows it down."""
    cards = []
    for line in text.splitlines():
        values = [v.strip() for v in line.split(",")]
        if len(values) != len(GPU_FIELDS):
            continue
        card: dict[str, Any] = dict(zip(GPU_FIELDS[:-1], values, strict=False))
        try:
            bits = int(values[-1], 16)
        except ValueError:
            bits = 0
        cards.append({**card, "throttled": [reason for bit, reason in THROTTLE.items() if bits & bit]})
    return cards


def with_capability(cards: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The cards with `compute_capability` and `memory_mb` (10^6 bytes) from a second answer of nvidia-smi.

    Both None for a driver that does not tell.
    """
    lines = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    told = lines if len(lines) == len(cards) and all(len(line) == 2 for line in lines) else [["", ""]] * len(cards)
    return [
        {
            **card,
            "compute_capability": capability if re.fullmatch(r"\d+\.\d", capability) else None,
            "memory_mb": round(int(mebibytes) * 2**20 / 1e6) if mebibytes.isdigit() else None,
        }
        for card, (capability, mebibytes) in zip(cards, told, strict=True)
    ]


def power_mode(text: str) -> str | None:
    """The name in `nvpmodel -q`'s answer (`NV Power Mode: MAXN`)."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found.group(1) if found else None


def _smi(fields: Sequence[str]) -> str:
    return _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
