"""`edgekd bench --host`: from what a user named to the measurements of a device."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..bench import Results
from ..bench.devices import of_device
from ..bundle import read_results
from ..errors import ArtifactError, UsageError
from ..profile import Profile, load_profile
from ..recipe import Recipe
from .bundled import bundle_at, bundle_given, bundled_profile, run_at
from .check import not_the_device
from .known import Device
from .remote import greet, measured_on, said
from .ssh import connected

__all__ = ["bench_on", "not_run"]

Emit = Callable[[dict[str, Any]], None]


def bench_on(
    device: Device,
    paths: Sequence[str],
    profiles: Sequence[str],
    emit: Emit,
    recipe: Recipe | None = None,
    *,
    keep: bool = False,
    out: Path | None = None,
) -> Results:
    """Measure on a device; results are in `out` before the device forgets them.

    Those of a run are in RUN/devices/PROFILE.json too, where reports and gates find them. Called again with the same
    arguments it goes on with what an earlier call has begun. Raises UsageError, StageError or MissingExtra.
    """
    run = run_at(paths)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as directory, connected(device) as link:
        given = bundle_given(paths, Path(directory))
        profile = _profile(device, profiles, given)
        there = greet(link, profile)
        if (why := not_the_device(profile, there)) is not None:
            emit(said(f"warning: {why}: outputs are compared there, and no time counts; another --profile?"))
        bundle = given or bundle_at(paths, profile, recipe, Path(directory))
        with measured_on(link, bundle, emit, keep=keep) as fetched:
            results = _read(fetched, bundle, device)
            for file in filter(None, (out, of_device(run, profile.name) if run is not None else None)):
                file.parent.mkdir(parents=True, exist_ok=True)
                results.write(file)
    return results


def not_run(results: Results) -> list[str]:
    """The networks that should have been timed and were not: each has a warning that says why."""
    return [v.name for p in results.profiles if p.elsewhere is None for v in p.variants if v.latency is None]


def _profile(device: Device, profiles: Sequence[str], given: Path | None) -> Profile:
    """What the device is measured as."""
    names = list(profiles) or ([device.profile] if device.profile else [])
    if given is not None:
        profile = bundled_profile(given)
        if profiles and [load_profile(n, "--profile").name for n in profiles] != [profile.name]:
            raise UsageError(f"the bundle was made for {profile.name}", where="--profile", hint="leave it away")
        return profile
    if len(names) != 1:
        hint = f"--profile NAME, or once: edgekd devices add NAME {shlex.quote(device.host)} --profile NAME"
        what = f"{device.name} is measured as one profile, got {', '.join(names) or 'none'}"
        raise UsageError(what, where="--profile", hint=hint)
    return load_profile(names[0], "--profile")


def _read(fetched: Path, bundle: Path, device: Device) -> Results:
    """What the device has measured of the bundle; all else that its results.json says must be what is known here."""
    try:
        results = read_results(fetched, bundle=bundle)
    except ArtifactError as error:
        hint = f"run the same command again; does something else write into {device.directory} there?"
        raise ArtifactError(error.problem.what, where=f"results of {device.name}", hint=hint) from error
    command = shlex.join(["edgekd", *sys.argv[1:]])
    return results.model_copy(update={"command": command, "environment": {**results.environment, "host": device.name}})
