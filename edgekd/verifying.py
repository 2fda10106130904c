"""Which files a name stands for, each judged for TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .artifact import Artifact
from .errors import UsageError
from .profile import Profile, load_profile, profile_names
from .trt import Verification, verify
from .trt.files import files_of, suited

__all__ = ["verify_paths"]


def verify_paths(
    paths: Sequence[str], profile: str | None, *, compute_capability: str | None = None
) -> list[Verification]:
    """Judge ONNX files, ours or not, and of runs and artifacts of `export` the files for TensorRT.

    Without a profile it is the first one with TensorRT of the run's recipe. Of the two int8 forms of an artifact, that
    for the profile's TensorRT is judged where both are there. Raises UsageError.
    """
    given = load_profile(profile, "--profile") if profile is not None else None
    found = []
    for text in paths:
        files, names = _files(text)
        chosen = given or _first_with_tensorrt(names)
        if chosen.tensorrt is not None:  # `verify` says that it has none
            files = suited(files, chosen.tensorrt)
        found += [verify(file, chosen, compute_capability=compute_capability) for file in files.values()]
    return found


def _files(text: str) -> tuple[dict[str, Path], Sequence[str]]:
    """The files by name, and the profiles of the recipe that they were made by."""
    path = Path(text)
    if path.suffix == ".onnx" or path.is_file():
        return {path.name: path}, ()
    from .runs import find_source  # here: it imports torch, and files do without

    source = find_source(text, ("export",))
    files: dict[str, Path] = {written.name: written.path for written in files_of(source.artifact)}
    if not files:
        what, others = f"{source.artifact.path} holds no files for TensorRT", _with_files(source.artifact.path.parent)
        hint = f"edgekd verify {others[-1]}" if others else 'a stage `export` with targets = ["trt"] writes them'
        raise UsageError(what, where=text, hint=hint)
    return files, source.recipe.profiles if source.recipe else ()


def _with_files(run: Path) -> list[Path]:
    """Exports of a run that hold files for TensorRT, as `edgekd export` alone makes them beside its own."""
    exports = sorted(
        (path.parent for path in run.glob("*-export*/manifest.json")), key=lambda path: path.stat().st_mtime
    )
    return [path for path in exports if files_of(Artifact.open(path))]


def _first_with_tensorrt(names: Sequence[str]) -> Profile:
    for name in names:
        if (profile := load_profile(name)).tensorrt is not None:
            return profile
    known = [name for name in profile_names() if load_profile(name).tensorrt is not None]
    raise UsageError("which TensorRT is meant?", where="--profile", hint=f"give one of {', '.join(known)}")
