"""Whether this machine is the device that a profile is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..profile import Profile
from ..runtimes import RuntimeStatus, probe

__all__ = ["kernels_differ", "not_here"]

#: What systems call one architecture.
ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


def not_here(
    profile: Profile, environment: dict[str, Any], runtimes: Callable[[], list[RuntimeStatus]] = probe
) -> str | None:
    """Why figures of this machine (`edgekd.bench.environment`) would not be those of the profile's device; or None.

    Another architecture, an instruction set that is missing, or a runtime that is not there.
    """
    machine = str(environment["machine"])
    own = ARCHITECTURES.get(machine.lower(), machine)
    if profile.architecture not in (None, own):
        return f"{profile.name} is {profile.architecture}, this machine is {own}"
    missing = [name for name in profile.requires if name not in environment["instruction_sets"]]
    if missing:
        return f"{profile.name} has {', '.join(missing)}, this machine has not"
    if profile.runtime != "onnxruntime":  # which edgekd itself needs
        status = next((r for r in runtimes() if r.name == profile.runtime), None)
        if status is not None and not status.available:
            return f"{profile.name} runs on {status.name}, which does not run here: {status.why}"
    return None


def kernels_differ(profile: Profile, environment: dict[str, Any]) -> str | None:
    """A warning where this machine takes faster instructions than the profile's device has; or None."""
    more = [name for name in profile.lacks if name in environment["instruction_sets"]]
    if not more:
        return None
    return (
        f"this machine has {', '.join(more)} and the device of {profile.name} has not: its int8 kernels are other, "
        "slower ones; measure there before you rely on these latencies"
    )
