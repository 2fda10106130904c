"""Where profiles want different quantization schemes, a stage of the recipe becomes one step per scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .artifact import Artifact
from .errors import Problem
from .profile import Profile

__all__ = ["Branch", "branch_of", "branches", "ending_of", "fork_problems", "made_for"]


@dataclass(frozen=True)
class Branch:
    """One of the steps that a stage becomes, for the `profiles` that want its scheme (there may be none).

    `scheme` ends the step's name; it is empty where the stage becomes only one, which is for all profiles.
    """

    scheme: str
    stage: Any
    profiles: list[Profile]


def branches(
    stage: Any, before: Mapping[str, str], scheme: str | None, ending: str, profiles: Sequence[Profile]
) -> list[Branch]:
    """The steps of a stage: one per scheme that it names, or per step of the fork that it goes on from.

    `before` maps schemes to the steps of that fork, empty where there is none. `scheme` is that of the one network
    which the stage goes on from, None where it is float or not known, and `ending` what ends the stage's name for it.
    """

    def wanting(scheme: str) -> list[Profile]:
        return [p for p in profiles if p.scheme == scheme]

    if hasattr(stage, "schemes"):
        schemes = stage.schemes(profiles)
        if len(schemes) > 1:
            return [Branch(s, stage.model_copy(update={"scheme": s}), wanting(s)) for s in schemes]
    elif before:
        return [Branch(scheme, stage, wanting(scheme)) for scheme in before]
    elif scheme is not None:
        return [Branch(ending, stage, wanting(scheme) or list(profiles))]
    return [Branch("", stage, list(profiles))]


def fork_problems(stage: Any, found: Sequence[Branch], profiles: Sequence[Profile], where: str) -> Iterator[Problem]:
    """Several schemes of which none is what a profile wants: nobody could say which file is its."""
    if not hasattr(stage, "schemes") or len(found) < 2:
        return
    schemes = [branch.scheme for branch in found]
    for profile in profiles:
        if profile.scheme not in schemes:
            what = f"none of {', '.join(schemes)} is what profile {profile.name} wants: {profile.scheme}"
            yield Problem(f"{where}.scheme", what, f"add {profile.scheme!r}, or name one scheme for all profiles")


def made_for(artifact: Artifact) -> str | None:
    """The scheme that an artifact was quantized by; None for a network that computes in float."""
    quantization = artifact.manifest.quantization
    return None if quantization is None else quantization["scheme"]


def branch_of(artifact: Artifact) -> str | None:
    """The scheme whose branch an artifact stands on, also where the network stayed float; None where there is none."""
    manifest = artifact.manifest
    if manifest.kind == "quantize":
        return str(manifest.config["scheme"])
    return made_for(artifact) or (ending_of(artifact) or None if manifest.kind == "export" else None)


def ending_of(artifact: Artifact) -> str:
    """`trt-s8s8` of the directory `04-quantize.trt-s8s8-52cd...`; empty where it was no fork's."""
    return artifact.path.name.partition("-")[2].rpartition("-")[0].partition(".")[2]
