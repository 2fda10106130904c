"""Engines with what they were built on: a sidecar `NAME.engine.json`, so that a wrong machine is told before a crash.

An engine is machine code. It runs with the TensorRT that built it, on the GPU it was built for; TensorRT's own
refusals name neither (https://docs.nvidia.com/deeplearning/tensorrt/latest/, "Version Compatibility" and "Hardware
Compatibility").
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import __version__
from ..artifact import file_sha256, write_atomically
from ..errors import ArtifactError, StageError, UsageError

__all__ = [
    "BatchRange", "EngineMetadata", "Here", "check_engine", "driver_version", "engine_of", "read_engine",
    "sidecar_of", "write_engine",
]  # fmt: skip

FORMAT = 1
REBUILD = "rebuild: edgekd export --target trt --build"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchRange(_Record):
    """Shapes of one input that an engine takes: all from `smallest` to `largest`, tuned for `tuned`."""

    smallest: list[int]
    tuned: list[int]
    largest: list[int]


class EngineMetadata(_Record):
    """What an engine was built from, on and for."""

    format: int = FORMAT
    sha256: str = Field(description="of the engine")
    onnx: str = Field(description="name of the file that it was built from")
    onnx_sha256: str
    gpu: str
    compute_capability: str
    driver: str | None = Field(None, description="of the GPU; the L4T release on a Jetson; None: not known")
    tensorrt: str
    cuda: str | None = None
    backend: Literal["tensorrt", "torch-tensorrt"] = "tensorrt"
    precision: str = Field(description="int8, int8-fp16, fp16 or fp32")
    strongly_typed: bool
    flags: list[str] = Field(default=[], description="the builder's")
    optimization_level: int
    workspace_mb: int | None = None
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "same-compute-capability", "ampere-plus"] = "none"
    dla: int | None = Field(None, description="the accelerator that it was built for; None: the GPU")
    gpu_fallback: bool = Field(False, description="whether layers that the DLA does not have may run on the GPU")
    inputs: dict[str, BatchRange]
    edgekd: str = __version__


@dataclass(frozen=True)
class Here:
    """The GPU and the software of this machine."""

    gpu: str
    compute_capability: str
    driver: str | None
    tensorrt: str
    cuda: str | None


def check_engine(metadata: EngineMetadata, here: Here, where: str = "") -> None:
    """Raise StageError with all that differs, if the engine was built for another GPU, TensorRT or driver.

    TensorRT must be the same one, or for version-compatible engines a later one of the same major version. The GPU
    must be of the same model: another one of its compute capability runs what was tuned for other caches and clocks,
    unless the engine was built to be compatible. Drivers are compared by branch (570 of 570.86.15) and Jetson
    releases by R36.4 of R36.4.3: within those, NVIDIA keeps what an engine calls.
    """
    differences = []
    if not _same_tensorrt(metadata, here):
        differences.append(f"it was built with TensorRT {metadata.tensorrt}, here is {here.tensorrt}")
    if not _same_gpu(metadata, here):
        built = f"{metadata.gpu} (compute capability {metadata.compute_capability})"
        differences.append(f"it was built on {built}, here is {here.gpu} ({here.compute_capability})")
    if None not in (metadata.driver, here.driver) and _branch(metadata.driver) != _branch(here.driver):
        differences.append(f"it was built with driver {metadata.driver}, here is {here.driver}")
    if differences:
        raise StageError(f"this engine is another machine's: {'; '.join(differences)}", where=where, hint=REBUILD)


def _same_tensorrt(metadata: EngineMetadata, here: Here) -> bool:
    built, found = _numbers(metadata.tensorrt), _numbers(here.tensorrt)
    if metadata.version_compatible:
        return built[:1] == found[:1] and built <= found
    return built == found


def _same_gpu(metadata: EngineMetadata, here: Here) -> bool:
    built, found = _numbers(metadata.compute_capability), _numbers(here.compute_capability)
    if metadata.hardware_compatibility == "ampere-plus":
        return found >= (8, 0)
    same = built == found
    return same if metadata.hardware_compatibility != "none" else same and metadata.gpu == here.gpu


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _branch(driver: str | None) -> str:
    parts = (driver or "").split(".")
    return ".".join(parts[: 2 if parts[0].startswith("R") else 1])


def driver_version(root: Path = Path("/")) -> str | None:
    """`R36.4.3` on a Jetson, whose driver is a part of L4T; `570.86.15` elsewhere; None where neither file is."""
    release = _text(root / "etc/nv_tegra_release")
    if found := re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release):
        return f"R{found[1]}.{found[2]}"
    found = re.search(r"NVRM version:.*?\s(\d{3,}\.\d+(?:\.\d+)?)\s", _text(root / "proc/driver/nvidia/version"))
    return found[1] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def sidecar_of(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def write_engine(path: Path, engine: bytes, onnx: Path, **known: Any) -> EngineMetadata:
    """Write `path` and its sidecar, each whole or not at all; `known` are the other fields of EngineMetadata.

    The sidecar comes last: an engine without it, or with an older one, is not loaded. Raises StageError.
    """
    try:
        write_atomically(path, engine)
        metadata = EngineMetadata(sha256=file_sha256(path), onnx=onnx.name, onnx_sha256=file_sha256(onnx), **known)
        write_atomically(sidecar_of(path), metadata.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise StageError(f"cannot be written: {error.strerror}", where=str(path), hint="is the disk full?") from error
    return metadata


def read_engine(path: Path) -> EngineMetadata:
    """The metadata of an engine whose bytes are those that were written.

    Raises UsageError (no such file), or ArtifactError (no sidecar, a damaged one, or one of another engine).
    """
    if not path.is_file():
        raise UsageError("no such engine", where=str(path), hint="build it: edgekd export --target trt --build")
    sidecar = sidecar_of(path)
    try:
        metadata = EngineMetadata.model_validate(json.loads(sidecar.read_text(encoding="utf-8")))
    except OSError as error:
        what = f"has no {sidecar.name} beside it that says what it was built on"
        raise ArtifactError(what, where=str(path), hint=REBUILD) from error
    except (ValueError, ValidationError) as error:
        first = str(error).partition("\n")[0]
        raise ArtifactError(f"damaged: {first}", where=str(sidecar), hint=REBUILD) from error
    if metadata.format != FORMAT:
        what = f"engine metadata of format {metadata.format}, expected {FORMAT}"
        raise ArtifactError(what, where=str(sidecar), hint=REBUILD)
    if file_sha256(path) != metadata.sha256:
        raise ArtifactError("is not the engine of its sidecar (sha256 does not match)", where=str(path), hint=REBUILD)
    return metadata


def engine_of(file: Path, engines: str | None = None) -> Path:
    """`model.int8.engine` for itself, and for the `model.int8.onnx` that it was built from.

    It lies beside that file, or in the directory `engines` beside the artifact that holds it. Raises UsageError (there
    is none, or another kind of file), or ArtifactError (the ONNX file changed since).
    """
    if file.suffix == ".engine":
        return file
    engine = file.with_suffix(".engine")
    if engines is not None and not engine.is_file():
        engine = file.resolve().parent.parent / engines / engine.name
    if file.suffix != ".onnx" or not file.is_file():
        raise UsageError("no such file", where=str(file), hint="expected an .engine, or the .onnx that it is made from")
    if not engine.is_file():
        what = f"TensorRT runs engines, and there is no {engine.name} beside it"
        what += "" if engines is None else f" or in {engine.parent}"
        hint = "build them on this machine (edgekd export --target trt --build) and name the .onnx files of that export"
        raise UsageError(what, where=str(file), hint=hint)
    if read_engine(engine).onnx_sha256 != file_sha256(file):
        raise ArtifactError(f"was built from another {file.name}", where=str(engine), hint=REBUILD)
    return engine
