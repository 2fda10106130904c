"""Temperatures, clocks, power and throttling, from whatever the device has."""

from __future__ import annotations

import glob
import os
from typing import Any, Dict, List, Optional, Sequence

from .device import output_of, power_mode, read_text

__all__ = ["Sensors"]


class Sensors:
    """What the device says of itself before, during and after."""

    def power_mode(self) -> Optional[str]:
        return power_mode(output_of(["nvpmodel", "-q"]))

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def since(self) -> Dict[str, Any]:
        return {"temperatures": temperatures()}

    def snapshot(self) -> Dict[str, Any]:
        return {"temperatures": temperatures(), "cpu_mhz": cpu_mhz()}

    def complaints(self, rounds: Sequence[Dict[str, Any]], session: Dict[str, Any]) -> List[str]:
        return []


def temperatures(root: str = "/sys/class/thermal") -> Dict[str, float]:
    """Degrees Celsius by thermal zone."""
    found = {}
    for zone in sorted(glob.glob(os.path.join(root, "thermal_zone*"))):
        name, value = read_text(os.path.join(zone, "type")), read_text(os.path.join(zone, "temp"))
        try:
            found[name] = int(value) / 1000
        except ValueError:
            continue
    return found


def cpu_mhz(root: str = "/sys/devices/system/cpu") -> List[int]:
    """The present clock of each core."""
    files = glob.glob(os.path.join(root, "cpu[0-9]*", "cpufreq", "scaling_cur_freq"))
    values = [read_text(file) for file in sorted(files)]
    return [int(value) // 1000 for value in values if value.isdigit()]
