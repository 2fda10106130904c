"""A bundle of what a user named: a run, stages, artifacts, ONNX files, or a bundle that is one already."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import zstandard

from ..bundle import make_bundle
from ..bundle.make import MANIFEST, BundleFile
from ..bundle.packing import ENDINGS
from ..candidates import Candidate, arranged
from ..data import load
from ..errors import ArtifactError, UsageError
from ..profile import Profile
from ..recipe import Recipe
from ..runs import candidates_at, open_run, run_candidates

__all__ = ["bundle_at", "bundle_given", "bundled_profile", "run_at"]

#: A manifest names some files and the classes: kilobytes.
MANIFEST_BYTES = 10_000_000


def bundle_given(paths: Sequence[str], directory: Path) -> Path | None:
    """The bundle that is all that was named, unpacked below `directory` where it is an archive; None: no bundle.

    Raises UsageError (no such archive) or ArtifactError (a damaged one).
    """
    path = Path(paths[0]) if len(paths) == 1 else Path()
    if not path.name.endswith(ENDINGS):
        return path if (path / MANIFEST).is_file() else None
    try:
        _unpack(path, directory, {MANIFEST: None})
        _unpack(path, directory, _sizes(directory / MANIFEST))
    except FileNotFoundError as error:
        raise UsageError(f"no bundle at {path}", where="bench", hint="edgekd export RUN --bundle PATH") from error
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, zstandard.ZstdError) as error:
        raise ArtifactError(f"damaged: {error}", where=str(path), hint="make the bundle again") from error
    return directory


def _unpack(path: Path, directory: Path, wanted: dict[str, int | None]) -> None:
    """Write those members of an archive that are `wanted`: name -> bytes, None: as many as a manifest may have."""
    written = set()
    with path.open("rb") as file:
        zstd = path.suffix == ".zst"
        stream = zstandard.ZstdDecompressor().stream_reader(file) if zstd else gzip.GzipFile(fileobj=file)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name not in wanted or member.isdir():
                    continue
                size = wanted[name]
                if name in written:
                    raise tarfile.TarError(f"two files are called {name}")
                if member.size > MANIFEST_BYTES if size is None else member.size != size:
                    expected = f"{size:,}" if size is not None else f"{MANIFEST_BYTES:,} at most"
                    raise tarfile.TarError(f"{name} has {member.size:,} bytes, expected {expected}")
                content = tar.extractfile(member)
                if content is None:
                    raise tarfile.TarError(f"{member.name} is no file")
                with (directory / name).open("wb") as out:
                    shutil.copyfileobj(content, out)
                written.add(name)
    if missing := wanted.keys() - written:
        raise tarfile.TarError(f"it has no {min(missing)}")


def _sizes(manifest: Path) -> dict[str, int | None]:
    """Bytes of every file that a manifest lists. Raises ValueError."""
    try:
        return {str(name): int(size) for name, (_, size) in json.loads(manifest.read_text())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the manifest is no list of files: {error}") from error


def run_at(paths: Sequence[str]) -> Path | None:
    """The run that is all that was named; None where it is something else."""
    return Path(paths[0]) if len(paths) == 1 and (Path(paths[0]) / "recipe.toml").is_file() else None


def bundled_profile(path: Path) -> Profile:
    """The profile that a bundle was made for. Raises ArtifactError."""
    try:
        return Profile.model_validate(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["profile"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"the manifest is damaged: {str(error).partition(chr(10))[0]}"
        raise ArtifactError(what, where=str(path / MANIFEST), hint="make the bundle again") from error


def bundle_at(paths: Sequence[str], profile: Profile, recipe: Recipe | None, directory: Path) -> Path:
    """Make the bundle of `paths` below `directory`, the first being what the others are compared with.

    Of a run, all its files that this profile takes. The same paths give the same bundle. Raises UsageError, StageError.
    """
    run = run_at(paths)
    if run is not None:
        planned = open_run(run)
        candidates, recipe = run_candidates(planned), planned.recipe
        candidates = [c for c in candidates if c.branch in ("", profile.scheme)]
    else:
        candidates, recipe = candidates_at(paths, recipe)
    data = load(recipe.data, recipe.seed) if recipe is not None else None
    files = [_bundled(candidate) for candidate in arranged(candidates, profile)]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", recipe.name if run is not None and recipe else candidates[-1].name)
    if not files:
        raise UsageError(f"nothing of {' '.join(paths)} is for {profile.name}", where="bench")
    return make_bundle(files, directory / (name.strip("-") or "bundle"), profile, data)


def _bundled(candidate: Candidate) -> BundleFile:
    metrics: dict[str, Any] = candidate.artifact.manifest.metrics if candidate.artifact else {}
    return BundleFile(candidate.name, candidate.file, candidate.key, candidate.scheme, metrics)
