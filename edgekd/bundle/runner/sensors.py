"""Temperatures, clocks, power and throttling, from whatever the device has."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import threading
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .device import output_of, read_text

__all__ = ["Sensors", "clocks_shown", "power_mode", "tegrastats", "throttled_bits"]

#: Of the GPU's clock over the rounds: lower than this share of its highest is told.
CLOCK_DROP = 0.9
#: Milliseconds between lines of tegrastats: often enough for a round, and seldom enough to take no time from it.
INTERVAL_MS = 500
#: Bits of `vcgencmd get_throttled` (raspberrypi.com, documentation of the operating system): now, and since boot.
PI_BITS = {0: "under-voltage", 1: "a capped clock", 2: "throttling", 3: "the soft temperature limit"}
#: Bits of nvmlClocksEventReasons (NVML API reference) that slow a busy GPU down.
GPU_BITS = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "power brake",
}  # fmt: skip
GPU_FIELDS = ("temperature.gpu", "power.draw", "clocks.sm", "clocks_throttle_reasons.active")


def tegrastats(line: str) -> Dict[str, Any]:
    """One line of tegrastats: temperatures (degrees Celsius), power_mw by rail, gpu_mhz, gpu_load, cpu_mhz, ram_mb.

    What a release or a board does not print is not there. Orin names its GPU clock `GR3D_FREQ 35%@[1300,1300]`, Thor
    `GR3D_FREQ @[314,314,314]` or not at all; power is `RAIL now/average`, in milliwatts, with or without the unit.
    """
    found: Dict[str, Any] = {}
    zones = {name: float(value) for name, value in re.findall(r"(\w+)@(-?\d+(?:\.\d+)?)C\b", line)}
    rails = re.findall(r"\b((?:VDD|VIN|POM|CPU|GPU|SYS)\w*) (-?\d+)(?:mW)?/-?\d+", line)
    found["temperatures"] = {name: value for name, value in zones.items() if value > -200}  # -256: switched off
    found["power_mw"] = {name: int(value) for name, value in rails}
    ram = re.search(r"RAM (\d+)/(\d+)MB", line)
    if ram:
        found["ram_mb"] = [int(ram.group(1)), int(ram.group(2))]
    gpu = re.search(r"GR3D_FREQ (?:(\d+)%)?(?:@(\d+|\[[\d,]+\]))?", line)
    if gpu and gpu.group(1):
        found["gpu_load"] = int(gpu.group(1))
    if gpu and gpu.group(2):
        found["gpu_mhz"] = max(int(value) for value in gpu.group(2).strip("[]").split(","))
    cores = re.search(r"CPU \[([^\]]*)\]", line)
    if cores:
        found["cpu_mhz"] = [int(value) for value in re.findall(r"%@(\d+)", cores.group(1))]
    return found


def power_mode(text: str) -> Tuple[Optional[str], Optional[int]]:
    """Name and number in `nvpmodel -q`'s answer: `NV Power Mode: MAXN` and, on the next line, `0`."""
    found = re.search(r"NV Power Mode:\s*(\S+)(?:\s*\n\s*(\d+)\s*$)?", text, re.MULTILINE)
    if found is None:
        return None, None
    return found.group(1), int(found.group(2)) if found.group(2) else None


def clocks_shown(text: str) -> Dict[str, Dict[str, float]]:
    """`jetson_clocks --show`: MHz {"min", "max", "now"} of GPU, EMC and cores; min equals max where they are pinned."""
    found = {}
    pattern = r"^(\w+)\s*:?\s.*?MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)"
    for name, *values in re.findall(pattern, text, re.MULTILINE):
        unit = 1e6 if name in ("GPU", "EMC") else 1e3  # hertz there, kilohertz of cores
        found[name] = dict(zip(("min", "max", "now"), (round(int(value) / unit, 3) for value in values)))
    return found


def throttled_bits(text: str) -> Tuple[List[str], List[str]]:
    """`vcgencmd get_throttled` -> what slows a Raspberry Pi down now, and what has since it was booted."""
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", text)
    bits = int(found.group(1), 16) if found else 0
    return tuple([what for bit, what in PI_BITS.items() if bits >> (bit + shift) & 1] for shift in (0, 16))  # type: ignore[return-value]


def temperatures(root: str = "/sys/class/thermal") -> Dict[str, float]:
    """Degrees Celsius by thermal zone."""
    found = {}
    for zone in sorted(glob.glob(os.path.join(root, "thermal_zone*"))):
        name, value = read_text(os.path.join(zone, "type")), read_text(os.path.join(zone, "temp"))
        if re.match(r"-?\d+$", value) and int(value) > -200000:
            found[name or os.path.basename(zone)] = int(value) / 1000
    return found


def cpu_mhz(root: str = "/sys/devices/system/cpu") -> List[int]:
    """The present clock of each core."""
    files = glob.glob(os.path.join(root, "cpu[0-9]*", "cpufreq", "scaling_cur_freq"))
    values = [read_text(file) for file in sorted(files)]
    return [int(value) // 1000 for value in values if value.isdigit()]


def events(root: str = "/sys") -> Dict[str, int]:
    """Counters of throttling: a Jetson's over-current events, and x86 cores' thermal ones. Only differences matter."""
    patterns = (
        "class/hwmon/hwmon*/oc*_event_cnt",
        "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count",
    )
    files = [file for pattern in patterns for file in sorted(glob.glob(os.path.join(root, pattern)))]
    return {os.path.relpath(file, root): int(read_text(file)) for file in files if read_text(file).isdigit()}


class Sensors:
    """What the device says of itself before, during and after the rounds."""

    def __init__(self) -> None:
        self.process: Optional["subprocess.Popen[bytes]"] = None
        self.lines: List[str] = []
        self.lock = threading.Lock()

    def power_mode(self) -> Optional[str]:
        return power_mode(output_of(["nvpmodel", "-q"]))[0]

    def snapshot(self) -> Dict[str, Any]:
        """All that can be asked for without a background process."""
        told: Dict[str, Any] = {"temperatures": temperatures(), "cpu_mhz": cpu_mhz(), "events": events()}
        mode, number = power_mode(output_of(["nvpmodel", "-q"]))
        if mode is not None:
            told["power_mode"] = {"name": mode, "id": number}
        clocks = clocks_shown(output_of(["jetson_clocks", "--show"]))
        if clocks:
            told["clocks"] = clocks
        if shutil.which("vcgencmd"):
            now, since_boot = throttled_bits(output_of(["vcgencmd", "get_throttled"]))
            told["raspberry_pi"] = {"now": now, "since_boot": since_boot}
        told.update(_gpu())
        return told

    def start(self) -> None:
        """Let tegrastats run beside the rounds, where there is one."""
        if shutil.which("tegrastats") is None:
            return
        command = ["tegrastats", "--interval", str(INTERVAL_MS)]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError:
            return
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: Any) -> None:
        for line in process.stdout:
            with self.lock:
                self.lines.append(line.decode("utf-8", "replace"))

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
            self.process = None

    def since(self) -> Dict[str, Any]:
        """What was seen since the last call: means of power and clocks, the highest temperatures."""
        with self.lock:
            lines, self.lines = self.lines, []
        told: Dict[str, Any] = {"temperatures": temperatures(), "cpu_mhz": cpu_mhz()}
        told.update(_gpu())
        seen = [tegrastats(line) for line in lines]
        for key in ("temperatures", "power_mw"):
            names = sorted({name for one in seen for name in one[key]})
            merge = max if key == "temperatures" else _mean
            values = {name: merge([one[key][name] for one in seen if name in one[key]]) for name in names}
            if values:
                told[key] = values
        clocks = [one["gpu_mhz"] for one in seen if one.get("gpu_mhz")]
        if clocks:
            told["gpu_mhz"] = _mean(clocks)
        return told

    def complaints(self, rounds: Sequence[Dict[str, Any]], session: Dict[str, Any]) -> List[str]:
        """Sentences about throttling while these rounds were measured."""
        found = []
        before, after = session["before"], session["after"]
        counted = {name: after["events"].get(name, 0) - count for name, count in before["events"].items()}
        for name, more in sorted(counted.items()):
            if more > 0:
                found.append("throttled %d times while measuring (%s)" % (more, name))
        for what in after.get("raspberry_pi", {}).get("now", []):
            found.append("slowed down by %s: a better supply or cooling helps" % what)
        reasons = {r for one in rounds for r in one.get("sensors", {}).get("gpu_throttled", [])}
        found += ["the GPU was slowed down by %s" % reason for reason in sorted(reasons)]
        clocks = [one["sensors"]["gpu_mhz"] for one in rounds if one.get("sensors", {}).get("gpu_mhz")]
        if clocks and min(clocks) < CLOCK_DROP * max(clocks):
            pair = (max(clocks), min(clocks))
            found.append("the GPU's clock fell from %.0f to %.0f MHz: `sudo jetson_clocks` holds it" % pair)
        names = [s.get("power_mode", {}).get("name") for s in (before, after)]
        if names[0] != names[1]:
            found.append("the power mode changed from %s to %s while measuring" % tuple(names))
        return found


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 3)


def _gpu() -> Dict[str, Any]:
    """A discrete GPU's temperature, watts, clock and what slows it down, by nvidia-smi; empty without one."""
    text = output_of(["nvidia-smi", "--query-gpu=" + ",".join(GPU_FIELDS), "--format=csv,noheader,nounits"])
    values = [value.strip() for value in text.partition("\n")[0].split(",")]
    if len(values) != len(GPU_FIELDS):
        return {}
    told: Dict[str, Any] = {}
    for name, value in zip(("gpu_celsius", "gpu_watts", "gpu_mhz"), values):
        if re.match(r"\d+(\.\d+)?$", value):
            told[name] = float(value)
    if re.match(r"0x[0-9a-fA-F]+$", values[-1]):
        bits = int(values[-1], 16)
        told["gpu_throttled"] = [reason for bit, reason in GPU_BITS.items() if bits & bit]
    return told
