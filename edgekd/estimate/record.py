"""The record of an estimate, as it stands in results.json in place of a latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..bench.results import Estimate, Fitted
from ..errors import UsageError
from ..profile import Profile
from .fitted import Efficiency, Fit
from .roofline import Roofline, roofline

__all__ = ["estimate_of", "estimates_of"]


def estimates_of(files: Mapping[str, Path], profile: Profile) -> tuple[dict[str, Estimate], list[str]]:
    """By name, what the profile's datasheet says of the files, and in words why it says nothing on some.

    Nothing and no words where the profile has no datasheet.
    """
    found, unknown = {}, []
    for name, file in files.items() if profile.datasheet is not None else ():
        try:
            found[name] = estimate_of(roofline(file, profile), profile)
        except UsageError as error:
            unknown.append(f"no estimate of {name}: {error.problem.what}")
    return found, unknown


def estimate_of(found: Roofline, profile: Profile, fitted: Fit | None = None) -> Estimate:
    """The record of a network that was not measured: its bounds, and the interval that a fit gives."""
    own = fitted.efficiencies.get(found.precision) if fitted is not None else None
    assert profile.datasheet is not None
    return Estimate(
        floor_ms=found.floor_ms,
        roofline_ms=found.ms,
        bound=found.bound,
        batch=found.batch,
        precision=found.precision,
        source=profile.datasheet.source,
        fitted=_fitted(found, own) if own is not None else None,
    )


def _fitted(found: Roofline, own: Efficiency) -> Fitted:
    ms = max(found.floor_ms, found.ms / own.value)
    return Fitted(
        ms=ms,
        low_ms=max(found.floor_ms, found.ms / own.high) if own.networks > 1 else found.floor_ms,
        high_ms=max(ms, found.ms / own.low) if own.networks > 1 else None,
        networks=own.networks,
    )
