"""Whether this machine is the device that a profile is about."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..profile import Profile
from ..runtimes import RuntimeStatus, probe

__all__ = ["kernels_differ", "not_here"]

#: What systems call one architecture.
ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}

#: A runtime on a GPU -> what `edgekd doctor` calls it.
ON_CUDA = {"torch": "torch on CUDA", "onnxruntime-cuda": "onnxruntime on CUDA"}


def not_here(
    profile: Profile, environment: dict[str, Any], runtimes: Callable[[], list[RuntimeStatus]] = probe
) -> str | None:
    """Why figures of this machine (`edgekd.bench.environment`) would not be those of the profile's device; or None.

    Another architecture, an instruction set that is missing, no such GPU, no Jetson or another one, another power mode,
    or a runtime that is not there.
    """
    machine = str(environment["machine"])
    own = ARCHITECTURES.get(machine.lower(), machine)
    if profile.architecture not in (None, own):
        return f"{profile.name} is {profile.architecture}, this machine is {own}"
    missing = [name for name in profile.requires if name not in environment["instruction_sets"]]
    if missing:
        return f"{profile.name} has {', '.join(missing)}, this machine has not"
    if other := _other_jetson(profile, environment) or _other_gpu(profile, environment):
        return other
    if profile.runtime != "onnxruntime":  # which edgekd itself needs
        name = ON_CUDA.get(profile.runtime, profile.runtime) if profile.device != "cpu" else profile.runtime
        status = next((r for r in runtimes() if r.name == name), None)
        if status is not None and not status.available:
            return f"{profile.name} runs on {status.name}, which does not run here: {status.why}"
    return None


def _other_jetson(profile: Profile, environment: dict[str, Any]) -> str | None:
    if profile.device != "jetson":
        return None
    if "jetson" not in environment:
        return f"{profile.name} is a Jetson, this machine is none"
    board, mode = str(environment.get("board") or ""), environment.get("power_mode")
    if profile.product is not None and board and not _called(profile.product, board):
        return f"{profile.name} is a {profile.product}, this machine is {board}"
    if profile.power_mode is not None and mode not in (None, profile.power_mode):
        return f"{profile.name} is in power mode {profile.power_mode}, this board in {mode}: see `sudo nvpmodel -p`"
    return None


def _other_gpu(profile: Profile, environment: dict[str, Any]) -> str | None:
    if profile.device == "cpu":
        return None
    cards = environment.get("gpus", [])
    if profile.device == "gpu" and not cards:
        return f"{profile.name} is a GPU, this machine has none that nvidia-smi shows"
    # The first is the one that is used: others want CUDA_VISIBLE_DEVICES, which nvidia-smi does not follow.
    name = str(cards[0]["name"]) if cards else str(environment.get("board") or "the board")
    capability = environment.get("compute_capability") or (cards[0].get("compute_capability") if cards else None)
    if None not in (profile.compute_capability, capability) and capability != profile.compute_capability:
        return f"{profile.name} has compute capability {profile.compute_capability}, {name} here has {capability}"
    if profile.device == "gpu" and profile.product is not None and not _called(profile.product, name):
        return f"{profile.name} is an NVIDIA {profile.product}, this machine has {name}"
    return None


def _called(product: str, name: str) -> bool:
    """Whether the words stand in the name: L4 is not in "NVIDIA L40", nor a card in its namesake for laptops."""
    words = re.search(rf"(?<!\w){re.escape(product)}(?!\w)(?! Laptop)", name, re.IGNORECASE)
    return words is not None


def kernels_differ(profile: Profile, environment: dict[str, Any]) -> str | None:
    """A warning where this machine takes faster instructions than the profile's device has; or None."""
    more = [name for name in profile.lacks if name in environment["instruction_sets"]]
    if not more:
        return None
    return (
        f"this machine has {', '.join(more)} and the device of {profile.name} has not: its int8 kernels are other, "
        "slower ones; measure there before you rely on these latencies"
    )
