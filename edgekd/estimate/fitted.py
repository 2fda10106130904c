"""How far from the roofline a device stays by what was measured on it, and what that says of other networks.

Efficiency is a network's roofline over its measured median. It differs from network to network (small ones spend their
time on starting kernels), so that the figure is an interval: from the lowest to the highest efficiency seen. Of n
networks that are alike, a further one lies inside with probability (n-1)/(n+1); with one network nothing is known of
the range. Each network left out in turn and estimated from the others says how far off that is on the user's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ..bench.results import ProfileResults, Results, Variant
from ..errors import UsageError
from ..onnx_file import stored_bytes
from ..profile import Profile
from .roofline import Precision, roofline

__all__ = ["Efficiency", "Fit", "Known", "fit"]


class Known(BaseModel):
    """A network that was measured on the device. `left_out_ms` is estimated from the others of its precision."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    file: str
    precision: Precision
    batch: int
    measured_ms: float
    roofline_ms: float
    floor_ms: float
    left_out_ms: float | None = None

    @property
    def efficiency(self) -> float:
        return self.roofline_ms / self.measured_ms

    @property
    def off_by(self) -> float | None:
        """The factor between what the others say of it and what was measured, 1 or more."""
        if self.left_out_ms is None:
            return None
        return max(self.left_out_ms / self.measured_ms, self.measured_ms / self.left_out_ms)


class Efficiency(BaseModel):
    """Roofline over measured time, of one precision."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float = Field(description="geometric mean")
    low: float
    high: float
    networks: int
    off_by: float | None = Field(description="the worst factor of those left out in turn; None for one network")


class Fit(BaseModel):
    """What the results from a device say of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    profile: str
    device: str = Field(description="as the results name it")
    known: list[Known]
    efficiencies: dict[Precision, Efficiency]
    notes: list[str] = []


def fit(results: Mapping[Path, Results], profile: Profile, *, precision: Precision | None = None) -> Fit:
    """Efficiencies of the networks that `results`, by where they lie, have measured on `profile`.

    The measured files are looked for where the results name them, where they name the same artifact's, and beside
    them. Raises UsageError where nothing measured on this profile can be used, and what `roofline` raises.
    """
    found: dict[str, Known] = {}
    seen: list[str] = []
    notes: list[str] = []
    devices: dict[str, None] = {}
    for path, document in results.items():
        seen += [p.profile for p in document.profiles]
        for p in document.profiles:
            why = _unfit(p, profile)
            if why:
                notes.append(f"{path}: {why}")
            for v in p.variants if p.profile == profile.name and why is None else []:
                if v.latency is None:
                    continue
                file = _file(v, document, path)
                if file is None:
                    notes.append(f"{v.name} of {path} is left out: the file that was measured is not here ({v.file})")
                    continue
                known = _known(v, file, profile, precision)
                # One file measured twice is one network.
                found.setdefault(hashlib.sha256(file.read_bytes()).hexdigest() + f" {known.batch}", known)
                devices[p.device] = None
                notes += [f"{path}: {text}" for text in p.warnings if f"{path}: {text}" not in notes]
    if not found:
        hint = "; ".join(notes) or f"they have: {', '.join(dict.fromkeys(seen)) or 'nothing'}"
        raise UsageError(f"no network measured on {profile.name} is in these results", where="--results", hint=hint)
    networks = _left_out(list(found.values()))
    precisions = sorted({k.precision for k in networks})
    notes += [
        f"{k.name} was measured at {k.measured_ms:.4g} ms, below its lower bound of {k.floor_ms:.4g} ms: the "
        "datasheet's figures are not those of this device, its clocks or its power mode"
        for k in networks
        if k.measured_ms < k.floor_ms
    ]
    return Fit(
        profile=profile.name,
        device=", ".join(devices),
        known=networks,
        efficiencies={p: _of([k for k in networks if k.precision == p]) for p in precisions},
        notes=notes,
    )


def _unfit(p: ProfileResults, profile: Profile) -> str | None:
    """Why results of this profile are no measurements of it."""
    if p.profile != profile.name:
        return None
    if p.elsewhere is not None:
        return f"not measured on {profile.name}: {p.elsewhere}"
    mode = p.settings.get("power_mode")
    if mode != profile.power_mode:
        return f"measured in power mode {mode}, and the profile is about {profile.power_mode}"
    return None


def _file(v: Variant, document: Results, where: Path) -> Path | None:
    """The file that was measured, by its name and size."""
    directory = where if where.is_dir() else where.parent
    same = [w.file for p in document.profiles for w in p.variants if v.key and w.key == v.key]
    for named in map(Path, dict.fromkeys([v.file, *same])):
        for place in (named, directory / named, directory / named.name):
            if place.is_file() and abs(stored_bytes(place) / 1e6 - v.size_mb) < 1e-6:
                return place
    return None


def _known(v: Variant, file: Path, profile: Profile, precision: Precision | None) -> Known:
    assert v.latency is not None
    bound = roofline(file, profile, batch=v.latency.batch, precision=precision)
    return Known(
        name=v.name,
        file=str(file),
        precision=bound.precision,
        batch=v.latency.batch,
        measured_ms=v.latency.p50.value,
        roofline_ms=bound.ms,
        floor_ms=bound.floor_ms,
    )


def _left_out(networks: list[Known]) -> list[Known]:
    """Each with what the others of its precision say of it."""
    told = []
    for network in networks:
        others = [k for k in networks if k is not network and k.precision == network.precision]
        ms = network.roofline_ms / _mean(others) if others else None
        told.append(network.model_copy(update={"left_out_ms": max(ms, network.floor_ms) if ms is not None else None}))
    return told


def _of(networks: Sequence[Known]) -> Efficiency:
    own = [k.efficiency for k in networks]
    off = [k.off_by for k in networks if k.off_by is not None]
    return Efficiency(
        value=_mean(networks), low=min(own), high=max(own), networks=len(own), off_by=max(off) if off else None
    )


def _mean(networks: Sequence[Known]) -> float:
    return math.exp(sum(math.log(k.efficiency) for k in networks) / len(networks))
