"""Measurements that outlive a run: where they are kept, and what they hold for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import __version__
from ..profile import Profile
from .env import environment

__all__ = ["cache_directory", "holds_for"]


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/edgekd`, or `~/.cache/edgekd`: one for each user, not made by this call."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "edgekd"


def holds_for(profile: Profile) -> dict[str, Any]:
    """What a latency on a profile depends on beside the network, as JSON: settings, this machine, versions."""
    here = environment()
    return {
        "profile": profile.model_dump(mode="json", include={"runtime", "threads", "affinity", "scheme", "opset"}),
        "batch": profile.protocol.batch,
        "machine": {key: here.get(key) for key in ("cpu", "machine", "instruction_sets", "jetson", "power_mode")},
        "gpus": [card["name"] for card in here.get("gpus", [])],
        "versions": {"edgekd": __version__, profile.runtime: here["versions"].get(profile.runtime)},
    }
