"""Energy, where the machine counts it: Linux's power capping interface (RAPL of Intel and AMD packages)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["EnergyCounter", "energy_counter"]

#: Joules used since some moment; only differences mean something.
EnergyCounter = Callable[[], float]


def energy_counter(root: Path = Path("/sys/class/powercap")) -> EnergyCounter | None:
    """A counter of the joules of all CPU packages; None where there is none or it may not be read.

    The whole package is counted, idle cores and other programs included: compare variants, not machines.
    """
    packages = []
    for zone in sorted(root.glob("*-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            wraps = int((zone / "max_energy_range_uj").read_text())
            int((zone / "energy_uj").read_text())
        except (OSError, ValueError):
            continue
        if name.startswith("package"):
            packages.append((zone / "energy_uj", wraps))
    if not packages:
        return None
    last = [0] * len(packages)
    total = [0] * len(packages)
    begun = False

    def read() -> float:
        nonlocal begun
        for i, (file, wraps) in enumerate(packages):
            now = int(file.read_text())
            if begun:
                total[i] += (now - last[i]) % (wraps + 1)  # the register starts again at zero
            last[i] = now
        begun = True
        return sum(total) / 1e6

    return read
