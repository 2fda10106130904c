"""Artifacts: immutable directories with a manifest, written atomically; and the lock on a run.

What has a manifest is complete. A directory is filled under a temporary name in the same file system,
its files are hashed and flushed, the manifest is written last, and the directory is renamed into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ArtifactError, StageError, UsageError

__all__ = ["FORMAT", "Artifact", "Manifest", "ModelSpec", "Preprocessing", "TensorInfo", "digest", "locked", "writing"]

#: Part of every key: raised when the meaning of a stage or of the files changes.
FORMAT = 1
MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Record):
    """What builds a network: `models.build(spec)` is pure. `attributes` and `removed` are what pruning changed."""

    use: str
    args: dict[str, Any] = {}
    attributes: dict[str, dict[str, Any]] = Field(default={}, description="module path -> changed attributes")
    removed: list[str] = Field(default=[], description="paths of blocks that are left out: the identity stands there")


class TensorInfo(_Record):
    """One input or output: axes are names where dynamic, sizes where static."""

    name: str
    dtype: str
    axes: list[str | int]


class Preprocessing(_Record):
    """How an image becomes the network's input: NCHW, RGB or grey, scaled to [0, 1], then normalised."""

    size: list[int] = Field(description="channels, height, width")
    mean: list[float]
    std: list[float]
    layout: str = "NCHW"
    colour: str = "RGB"


class Manifest(_Record):
    """What an artifact is, where it came from, and what its files must hash to."""

    format: int = FORMAT
    kind: str = Field(description="the stage that made it")
    key: str
    parents: dict[str, str] = {}
    config: dict[str, Any] = {}
    model: ModelSpec
    quantization: dict[str, Any] | None = None
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    preprocessing: Preprocessing
    classes: list[str]
    metrics: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    files: dict[str, tuple[str, int]] = Field(default={}, description="name -> sha256, bytes")


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    def file(self, name: str) -> Path:
        """The path of one of its files. Raises ArtifactError when it has no such file."""
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.manifest.kind} artifacts have no {name}", where=str(self.path))
        return self.path / name

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Artifact:
        """Read an artifact, check its files' sha256. Raises UsageError (no artifact) or ArtifactError (corrupted)."""
        path = Path(path)
        try:
            text = (path / MANIFEST).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"no artifact at {path}", hint="an artifact is a directory with a manifest.json"
            ) from error
        except UnicodeDecodeError as error:
            raise ArtifactError("the manifest is damaged: not text", where=str(path), hint=_again(path)) from error
        try:
            table = json.loads(text)
            if table.get("format") != FORMAT:
                raise ArtifactError(
                    f"artifact format {table.get('format')}, expected {FORMAT}", where=str(path), hint="make it again"
                )
            artifact = cls(path, Manifest.model_validate(table))
        except (ValueError, AttributeError, ValidationError) as error:
            first = str(error).partition("\n")[0]
            raise ArtifactError(f"the manifest is damaged: {first}", where=str(path), hint=_again(path)) from error
        if verify:
            artifact.verify()
        return artifact

    def verify(self) -> None:
        """Compare every file with its recorded size and sha256. Raises ArtifactError naming the first that differs."""
        for name, (sha256, size) in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise ArtifactError(f"{name} is missing", where=str(self.path), hint=_again(self.path))
            if file.stat().st_size != size or file_sha256(file) != sha256:
                raise ArtifactError(
                    f"{name} is corrupted (sha256 does not match)", where=str(self.path), hint=_again(self.path)
                )


def _again(path: Path) -> str:
    return f"delete {path} and run the same command again: only this stage is made anew"


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[Path]:
    """A temporary directory beside `destination`, renamed to it on success and removed on failure.

    The body writes its files and then calls `finish(directory, manifest)`; the run is locked meanwhile, so whatever
    another process left under such a name is rubbish. Raises StageError when the disk refuses.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        for killed in destination.parent.glob(f".{destination.name}.*.tmp"):
            shutil.rmtree(killed, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if not (temporary / MANIFEST).exists():
            raise AssertionError("writing() ended without finish()")
        if destination.is_symlink():
            destination.unlink()  # a search's trials link to what they share: that stays
        elif destination.exists():
            # The manifest goes first: killed in between, what is left must not look complete.
            (destination / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(destination)
        os.rename(temporary, destination)
        _sync(destination.parent)
    except OSError as error:
        raise StageError(
            f"cannot write {destination}: {error.strerror or error}",
            hint="is the disk full, or the directory read-only?",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish(directory: Path, manifest: Manifest) -> None:
    """Hash and flush every file of `directory`, then write the manifest that makes it complete."""
    files = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        _sync(file)
        files[str(file.relative_to(directory))] = (file_sha256(file), file.stat().st_size)
    text = manifest.model_copy(update={"files": files}).model_dump_json(indent=2)
    write_atomically(directory / MANIFEST, text + "\n")
    _sync(directory)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a power cut, sees the old content or the new, never a part.

    Raises OSError, which names `path` and not the temporary file beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the run directory: a second run in it gets a StageError (exit 3) that names the first one's process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / ".lock").open("a+")
    except OSError as error:
        raise StageError(
            f"cannot write to {directory}: {error.strerror}", hint="choose another directory with -o DIR"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise StageError(
                f"{directory} is in use by another edgekd (process {holder})",
                hint="wait for it to end, or choose another directory with -o DIR",
            ) from error
        except OSError as error:
            raise StageError(
                f"cannot lock {directory}: {error.strerror}", hint="choose a directory on a local disk with -o DIR"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds, it only names nobody
            os.ftruncate(stream.fileno(), 0)
            os.write(stream.fileno(), str(os.getpid()).encode())
        yield
