"""The files that a run or a comparison measures, and which of them a profile is judged by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .artifact import Artifact
from .data import Dataset
from .forks import made_for
from .profile import Profile
from .stages.export import write_onnx
from .trt.files import FORMS, files_of, suited

__all__ = ["Candidate", "arranged", "candidate_of"]


@dataclass(frozen=True)
class Candidate:
    """A model file to measure, and the artifact it comes from (None: somebody else's file).

    `branch` is the scheme whose branch of a fork it stands on. `takes`: where TensorRT runs and the artifact has files
    for it, those stand for this one: all of them, or the profile's own. `form` is which of these it is.
    """

    name: str
    file: Path
    artifact: Artifact | None
    branch: str = ""
    takes: Literal["this", "own", "all"] = "this"
    form: str = ""

    @property
    def key(self) -> str:
        return self.artifact.key if self.artifact else ""

    @property
    def scheme(self) -> str | None:
        """The quantization scheme it was made for; None for a float network, and where it is not known."""
        if self.form in ("fp16", "fp32"):
            return None
        return self.branch or (made_for(self.artifact) if self.artifact else None)


def arranged(candidates: Sequence[Candidate], profile: Profile) -> list[Candidate]:
    """In their order, but with this profile's own file last: the other branches of a fork stand before its own.

    An export with files for TensorRT is, where the profile runs it, NAME.fp32, NAME.fp16 and NAME.int8 (int8-fp16 for
    strongly typed builds): int8 is often slower than fp16.
    """
    own = [c for c in candidates if c.branch in ("", profile.scheme)]
    at = next((i for i, c in enumerate(own) if c.branch), None)
    if at is not None:
        candidates = [*own[:at], *(c for c in candidates if c not in own), *own[at:]]
    return [file for candidate in candidates for file in _files(candidate, profile)]


def _files(candidate: Candidate, profile: Profile) -> list[Candidate]:
    artifact, tensorrt = candidate.artifact, profile.tensorrt
    if candidate.takes == "this" or artifact is None or tensorrt is None or profile.runtime != "tensorrt":
        return [candidate]
    written = suited({file.name: file.path for file in files_of(artifact)}, tensorrt)
    if not written:
        return [candidate]
    found = [replace(candidate, file=written[form], takes="this", form=form) for form in FORMS if form in written]
    if candidate.takes == "own":
        return found[-1:]
    return [replace(c, name=f"{c.name}.{c.form}") for c in found]


def candidate_of(artifact: Artifact, name: str, data: Dataset, opset: int, cache: Path) -> Candidate:
    """The file of an `export` artifact, or an export of any other one (kept in `cache` by its key)."""
    if artifact.manifest.kind == "export":
        return Candidate(name, artifact.file("model.onnx"), artifact, takes="all")
    file = cache / f"{name}-{artifact.key[:12]}-opset{opset}.onnx"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            write_onnx(artifact, temporary, data, opset=opset)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    return Candidate(name, file, artifact)
