"""A few model files compared on a profile, briefly: what decides between them while a stage is at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..profile import Profile
from ..runtimes import Feed, Session, open_for
from .measure import Measured, measure_latency, pinned, ratios_known

__all__ = ["noise", "side_by_side"]

#: Ratios within one process agree to half a percent; decisions want to be right to about two.
PRECISION = 0.02


def side_by_side(files: Mapping[str, Path], profile: Profile, *, rounds: int = 5, cap_s: float = 20.0) -> Measured:
    """Latencies of model files in the profile's runtime, interleaved, by name; the first is what others compare with.

    Inputs are noise of the profile's batch size. Rounds go on until every ratio to the first is known within 2 %, or
    until `cap_s` seconds. Raises UsageError or StageError (a file that does not load, a runtime that fails).
    """
    protocol = profile.protocol.model_copy(
        update={"rounds": rounds, "cap_s": cap_s, "block_s": 0.05, "warmup_s": 0.1, "precision": PRECISION}
    )
    with pinned(profile.affinity, f"profile {profile.name}: affinity"):
        sessions: dict[str, Session] = {}
        try:
            for name, file in files.items():
                sessions[name] = open_for(file, profile)
            feeds = {name: noise(session, protocol.batch) for name, session in sessions.items()}
            return measure_latency(
                sessions, feeds, protocol, profile.threads, settled=lambda samples: ratios_known(samples, PRECISION)
            )
        finally:
            for session in sessions.values():
                session.close()


def noise(session: Session, batch: int) -> Feed:
    """Random inputs for somebody else's file: dynamic axes are the batch first, then 1."""
    feed = {}
    for info in session.inputs:
        axes = [axis if isinstance(axis, int) else (batch if i == 0 else 1) for i, axis in enumerate(info.axes)]
        values = np.random.default_rng(0).random(axes)
        feed[info.name] = (values * 255 if info.dtype in ("uint8", "int64", "int32") else values).astype(info.dtype)
    return feed
