"""What NVIDIA GPUs and Jetson boards say about themselves: clocks, throttling, power mode."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["accelerators", "gpus", "power_mode"]

GPU_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.limit",
    "persistence_mode", "clocks_throttle_reasons.active",
)  # fmt: skip
#: Bits of nvmlClocksEventReasons (NVML API reference) that slow a busy GPU down.
THROTTLE = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "power brake",
}  # fmt: skip


def accelerators() -> dict[str, Any]:
    """`gpus`, `jetson` (the L4T release) and `power_mode`: only those that this machine has."""
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    found: dict[str, Any] = {}
    if cards := gpus(_output(query)):
        found["gpus"] = cards
    release = Path("/etc/nv_tegra_release")
    if release.is_file():
        found["jetson"] = release.read_text(errors="replace").splitlines()[0].lstrip("# ")
        found["power_mode"] = power_mode(_output(["nvpmodel", "-q"]))
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


def power_mode(text: str) -> str | None:
    """The name in `nvpmodel -q`'s answer (`NV Power Mode: MAXN`)."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found.group(1) if found else None


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
