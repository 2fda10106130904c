"""A run's measurements from devices elsewhere: a document each, beside what was measured here."""

from __future__ import annotations

from pathlib import Path

from .results import ProfileResults, Results

__all__ = ["of_device", "with_devices"]


def of_device(run: Path, profile: str) -> Path:
    """Where a run keeps what a device measured as `profile`."""
    return run / "devices" / f"{profile}.json"


def with_devices(results: Results, run: Path) -> Results:
    """`results` of a run, with what its devices measured in place of, or behind, what stands there of their profiles.

    Measurements of files that the run has no more are left out. Raises ArtifactError (a damaged document).
    """
    keys = {variant.key for profile in results.profiles for variant in profile.variants}
    profiles = {profile.profile: profile for profile in results.profiles}
    for file in sorted(of_device(run, "*").parent.glob("*.json")):
        found = Results.read(file)
        for profile in found.profiles:
            if profile.elsewhere is None and all(variant.key in keys for variant in profile.variants):
                profiles[profile.profile] = _beside(profile, found, results)
    return results.model_copy(update={"profiles": list(profiles.values())})


def _beside(profile: ProfileResults, own: Results, results: Results) -> ProfileResults:
    if (own.data, own.test_images) == (results.data, results.test_images):
        return profile
    # Bits per image only mean something beside those of the same images.
    variants = [variant.model_copy(update={"correct": None}) for variant in profile.variants]
    told = f"its accuracies are those of {own.test_images:,} of {results.test_images:,} test images, seen on the device"
    return profile.model_copy(update={"variants": variants, "warnings": [*profile.warnings, told]})
