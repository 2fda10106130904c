"""The machine that was measured on: what changes its figures, and what disturbs them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .accelerators import accelerators

__all__ = ["disturbances", "environment", "others_busy", "same_machine"]

#: What int8 and bf16 kernels are chosen by; ARM's names are those of its HWCAPs.
INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
#: Cores of others from which on it is told: a tenth is what an idle system does by itself.
BUSY = 0.2
PACKAGES = ("edgekd", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "torchao", "torch-pruning", "tensorrt")


def environment() -> dict[str, Any]:
    """What a reader must know about this machine to judge a latency, as JSON values.

    `cores` are those this process may use; `cpu_quota` is the container's limit in cores, `governor` that of the
    first core, both null where there is none or it cannot be read; `memory_mb` in 10^6 bytes.
    """
    cpu = _cpu()
    return {
        **cpu,
        "cores": _cores(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or None,
        "turbo": _turbo(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "cpu_quota": _cpu_quota(),
        "memory_mb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": _versions(),
        **accelerators(),
    }


def disturbances(environment: dict[str, Any], others: float | None = None) -> list[str]:
    """What is likely to disturb a measurement made now, one sentence each with what helps; empty if nothing is.

    `others`: cores that other programs kept busy while it was made. Before it (None) the load average must do, of
    which a training that has just ended is a part.
    """
    warnings = []
    cores, load = environment["cores"], environment["load_average"][0]
    what = None
    if others is None and load > cores / 2:
        what = f"load average {load:.1f} on {cores} cores: something else is running"
    elif others is not None and others > BUSY:
        what = f"other programs kept {others:.1f} of {cores} cores busy meanwhile"
    if what is not None:
        warnings.append(f"{what}; see `ps -eo pcpu,comm --sort -pcpu | head`, end it or wait")
    if environment["governor"] in ("powersave", "conservative", "ondemand", "schedutil"):
        warnings.append(
            f"CPU frequency governor {environment['governor']}: clocks follow the load; "
            "`sudo cpupower frequency-set -g performance`"
        )
    quota = environment["cpu_quota"]
    if quota is not None and quota < cores:
        warnings.append(
            f"a CPU quota of {quota:g} cores on {cores}: the container is stopped in the middle of calls; "
            "start it with --cpuset-cpus instead of --cpus"
        )
    if environment.get("turbo"):
        warnings.append(
            "turbo is on: clocks depend on the temperature; ratios hold, milliseconds vary; "
            "`echo 1 | sudo tee /sys/devices/system/cpu/intel_pstate/no_turbo`, or 0 to cpufreq/boost"
        )
    for card in environment.get("gpus", []):
        if card["throttled"]:
            why = ", ".join(card["throttled"])
            warnings.append(f"{card['name']} is slowed down by {why}; `nvidia-smi -q -d PERFORMANCE` says more")
        if card["persistence_mode"] == "Disabled":
            warnings.append(f"{card['name']} sleeps between runs; `sudo nvidia-smi -pm 1`")
    if "jetson" in environment and (mode := environment.get("power_mode")) not in (None, "MAXN", "MAXN_SUPER"):
        warnings.append(f"power mode {mode}: clocks are capped; `sudo nvpmodel -m 0 && sudo jetson_clocks`")
    return warnings


def others_busy(stat: Path = Path("/proc/stat")) -> Callable[[], float | None]:
    """A function that says how many cores programs other than this one kept busy, on average, since now.

    None where the system does not tell. What a hypervisor takes away counts as others.
    """
    ticks = os.sysconf("SC_CLK_TCK")

    def used() -> tuple[float, float, float] | None:
        fields = _read(stat).partition("\n")[0].split()[1:9]
        if len(fields) < 8:
            return None
        user, nice, system, _, _, irq, softirq, steal = (float(f) / ticks for f in fields)
        return time.monotonic(), user + nice + system + irq + softirq + steal, sum(os.times()[:4])

    before = used()

    def since() -> float | None:
        after = used()
        if before is None or after is None or after[0] - before[0] < 2 / ticks:
            return None
        seconds, everything, ours = (b - a for a, b in zip(before, after, strict=True))
        return max(0.0, everything - ours) / seconds

    return since


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two environments that changes latencies: a phrase each, empty for none.

    Software versions are compared where they belong to: see the runtime in `ProfileResults`.
    """
    different = [
        f"{key.replace('_', ' ')} {one.get(key)!r} and here {other.get(key)!r}"
        for key in ("cpu", "machine", "instruction_sets", "jetson", "power_mode")
        if one.get(key) != other.get(key)
    ]
    cards = [[card["name"] for card in e.get("gpus", [])] for e in (one, other)]
    if cards[0] != cards[1]:
        different.append(f"GPUs {cards[0]} and here {cards[1]}")
    return different


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return {"cpu": model, "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags]}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _turbo() -> bool | None:
    off = _read(Path("/sys/devices/system/cpu/intel_pstate/no_turbo"))
    on = _read(Path("/sys/devices/system/cpu/cpufreq/boost"))
    return off == "0" if off else on == "1" if on else None


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The tightest CFS quota in cores: of this process's cgroup, or of the one that a container sees as its root."""
    groups = {"", *(line.rpartition(":")[2].strip("/") for line in _read(Path("/proc/self/cgroup")).splitlines())}
    limits = []
    for group in groups:
        limits.append(_read(root / group / "cpu.max").split())  # cgroup v2: "QUOTA PERIOD", "max" for none
        v1 = root / "cpu" / group
        limits.append([_read(v1 / "cpu.cfs_quota_us"), _read(v1 / "cpu.cfs_period_us")])
    quotas = []
    for limit in limits:
        with contextlib.suppress(ValueError, ZeroDivisionError):
            quota, period = map(int, limit)
            if quota > 0:
                quotas.append(quota / period)
    return min(quotas, default=None)


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
