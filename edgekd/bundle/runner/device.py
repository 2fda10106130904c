"""What the device is, in the words of edgekd's `environment()`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

__all__ = ["cards_of", "described_device", "output_of", "read_text", "smi_cards"]

#: What int8 and bf16 kernels are chosen by; ARM's names are those of its HWCAPs.
INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip

#: What nvidia-smi is asked, in edgekd/bench/accelerators.py, too, where the reasons are; drivers that do not know a
#: field answer nothing at all, so the second is a query of its own.
CARD_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.limit",
    "persistence_mode", "clocks_throttle_reasons.active",
)  # fmt: skip
CARD_CAPABILITY = ("compute_cap", "memory.total")
#: A GPU whose name CUDA does not tell.
UNKNOWN = "unknown"
SLOWED_BY = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "power brake",
}  # fmt: skip


def read_text(path: str) -> str:
    """A small file's text without white space around it; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().strip().strip("\0")
    except OSError:
        return ""


def output_of(command: List[str], seconds: float = 10.0) -> str:
    """What a program says; empty where it is missing, fails or does not end."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def described_device(runtime: str, version: str, manifest: Dict[str, Any]) -> Dict[str, Any]:
    """The device with what changes its figures."""
    info: Dict[str, str] = {}
    for line in read_text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    flags = set((info.get("flags") or info.get("Features") or "").split())
    board = read_text("/proc/device-tree/model")
    versions = {"python": platform.python_version(), "numpy": np.__version__, runtime: version}
    found: Dict[str, Any] = {
        "cpu": info.get("model name") or board or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "turbo": _turbo(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "cpu_quota": None,
        "memory_mb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6),
        "os": "%s %s" % (platform.system(), platform.release()),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": dict(versions, edgekd=manifest["edgekd"]),
    }
    if board:
        found["board"] = board
    release = read_text("/etc/nv_tegra_release")
    if release:
        found["jetson"] = release.splitlines()[0].lstrip("# ")
    packages = output_of(["dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"])
    if packages:
        found["jetpack"] = packages.strip()
    return found


def smi_cards() -> List[Dict[str, Any]]:
    """The GPUs that nvidia-smi shows, as edgekd's `accelerators` has them."""
    cards = []
    for values in _smi(CARD_FIELDS):
        reasons = int(values[-1], 16) if re.match(r"0x[0-9a-fA-F]+$", values[-1]) else 0
        throttled = [reason for bit, reason in SLOWED_BY.items() if reasons & bit]
        card: Dict[str, Any] = dict(zip(CARD_FIELDS[:-1], values))
        cards.append(dict(card, throttled=throttled))
    told = _smi(CARD_CAPABILITY)
    for card, (capability, mebibytes) in zip(cards, told if len(told) == len(cards) else [["", ""]] * len(cards)):
        card["compute_capability"] = capability if re.match(r"\d+\.\d$", capability) else None
        card["memory_mb"] = round(int(mebibytes) * 2**20 / 1e6) if mebibytes.isdigit() else None
    return cards


def _smi(fields: Sequence[str]) -> List[List[str]]:
    text = output_of(["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"])
    lines = [[value.strip() for value in line.split(",")] for line in text.splitlines()]
    return [line for line in lines if len(line) == len(fields)]


def cards_of(used: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The GPUs of nvidia-smi, `used` (what CUDA calls `gpu` and its `compute_capability`) first, as CUDA may count
    them in another order; by CUDA's words alone where nvidia-smi does not show it. A Jetson's GPU is no card.
    """
    cards = smi_cards()
    if used.get("gpu") in (None, UNKNOWN) or read_text("/etc/nv_tegra_release"):
        return cards
    own = {"name": used["gpu"], "compute_capability": used["compute_capability"]}
    rest = [card for card in cards if card["name"] != own["name"]]
    same = [card for card in cards if card["name"] == own["name"]] or [{"persistence_mode": None, "throttled": []}]
    return [dict(same[0], **own), *same[1:], *rest]


def _turbo() -> Optional[bool]:
    off = read_text("/sys/devices/system/cpu/intel_pstate/no_turbo")
    on = read_text("/sys/devices/system/cpu/cpufreq/boost")
    return off == "0" if off else on == "1" if on else None
