"""Build engines where a GPU and TensorRT are, and keep those only that compute what their files say."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.cache import cache_directory
from ..errors import EdgekdError, MissingExtra, StageError, UsageError
from ..profile import Profile, TensorRT
from ..runtimes import Feed, open_session
from ..runtimes.engine_file import EngineMetadata, Here, sidecar_of, write_engine
from ..runtimes.tensorrt import here, load_tensorrt
from .answers import Agreement, agreement, outputs_of
from .dla import dla_problems
from .files import TrtFile
from .network import configured, parsed, precision_flags, ranges, serialized, with_profile

__all__ = ["Engine", "batches_of", "build_engines", "check_machine", "keeping", "timing_cache"]


@dataclass(frozen=True)
class Engine:
    """An engine that was built here, and how near its outputs are to ONNX Runtime's."""

    name: str
    path: Path
    metadata: EngineMetadata
    agreement: Agreement


def build_engines(
    files: Sequence[TrtFile],
    profile: Profile,
    directory: Path,
    inputs: Feed,
    emit: Callable[[dict[str, Any]], None] = lambda event: None,
) -> list[Engine]:
    """Build `NAME.engine` with its sidecar in `directory` from every file, and compare each on `inputs`.

    For a DLA, which takes nothing else, from the fp16 file alone; layers that it does not have run on the GPU.
    inputs: real ones, [N, ...] by name, as the files take them. An engine whose outputs are zero, NaN or far from
    ONNX Runtime's is removed. Raises UsageError (a profile without TensorRT, a DLA that cannot), MissingExtra (no
    TensorRT) or StageError (no GPU, another TensorRT or GPU than the profile's, a node that TensorRT refuses, wrong
    outputs); each says which files were kept.
    """
    made: list[Engine] = []
    with keeping([file.path for file in files], made):
        files = _suited(files, profile)
        wanted = _wanted(profile, files)
        trt = load_tensorrt()
        machine = here(trt)
        check_machine(profile, machine)
        for file in files:
            emit({"event": "build", "file": str(file.path), "backend": "tensorrt"})
            made.append(_built(trt, file, profile, wanted, machine, directory, inputs))
    return made


def _suited(files: Sequence[TrtFile], profile: Profile) -> Sequence[TrtFile]:
    """Of the files of a DLA's profile the one that it takes; all of them where that is not there, to be refused."""
    if profile.tensorrt is None or profile.tensorrt.dla is None:
        return files
    return [file for file in files if file.name == "fp16"] or files


def _wanted(profile: Profile, files: Sequence[TrtFile]) -> TensorRT:
    if profile.tensorrt is None:
        hint = 'runtime = "tensorrt" and a table [tensorrt] with its version'
        raise UsageError("says nothing of TensorRT", where=f"profile {profile.name}", hint=hint)
    if profile.tensorrt.dla is not None:
        for file in files:
            problems = dla_problems(profile, precision=file.name, dynamic_batch=False)
            if problems:
                raise UsageError(problems[0].what, where=problems[0].where, hint=problems[0].hint)
    return profile.tensorrt


def check_machine(profile: Profile, machine: Here) -> None:
    """Raise StageError where an engine built here would not be one for the profile's device."""
    wanted = profile.tensorrt
    if wanted is not None and not f"{machine.tensorrt}.".startswith(f"{wanted.version}."):
        raise StageError(
            f"profile {profile.name} has TensorRT {wanted.version}, here is {machine.tensorrt}: engines run with the "
            "version that built them",
            where="tensorrt.version",
            hint="build on the device (edgekd export --target trt --bundle), or change the profile's version",
        )
    if profile.compute_capability not in (None, machine.compute_capability):
        raise StageError(
            f"profile {profile.name} has compute capability {profile.compute_capability}, here is {machine.gpu} "
            f"({machine.compute_capability}): engines are not portable",
            where="compute_capability",
            hint="build on the device: edgekd export --target trt --bundle",
        )


def batches_of(profile: Profile) -> tuple[int, int, int]:
    """Smallest, tuned and largest batch of a dynamic engine: what the profile's protocol measures."""
    protocol = profile.protocol
    return 1, protocol.batch, max(protocol.batch, *protocol.batches)


def timing_cache(machine: Here) -> Path:
    """What TensorRT found out about kernels: for one GPU model and one version of TensorRT."""
    gpu = re.sub(r"\W+", "-", machine.gpu).strip("-")
    return cache_directory() / "tensorrt" / f"{gpu}-{machine.compute_capability}-{machine.tensorrt}.timing"


def _built(
    trt: Any, file: TrtFile, profile: Profile, wanted: TensorRT, machine: Here, directory: Path, inputs: Feed
) -> Engine:
    cache = timing_cache(machine)
    network = parsed(trt, file.path, strongly_typed=file.strongly_typed)
    shapes = ranges(network.network, batches_of(profile), file.path)
    if wanted.dla is not None and any(span.smallest != span.largest for span in shapes.values()):
        what = f"the DLA takes static shapes only, and {file.path.name} has a dynamic batch"
        raise UsageError(what, where=f"profile {profile.name}: tensorrt.dla", hint="dynamic_batch = false in export")
    flags = precision_flags(file.name, network.typed)
    config = configured(trt, network, wanted, flags, cache)
    with_profile(network, config, shapes)
    path = directory / file.path.with_suffix(".engine").name
    metadata = write_engine(
        path,
        serialized(trt, network, config, file.path, cache),
        file.path,
        **vars(machine),
        precision=file.name,
        strongly_typed=network.typed,
        flags=flags,
        optimization_level=wanted.optimization_level,
        workspace_mb=wanted.workspace_mb,
        version_compatible=wanted.version_compatible,
        hardware_compatibility=wanted.hardware_compatibility,
        dla=wanted.dla,
        gpu_fallback=wanted.dla is not None,
        inputs=shapes,
    )
    tuned = next(iter(shapes.values())).tuned[0]
    return Engine(file.name, path, metadata, compared(path, file.path, file.name, inputs, tuned))


def compared(engine: Path, onnx: Path, precision: str, inputs: Feed, batch: int) -> Agreement:
    """An engine beside ONNX Runtime; a wrong engine is removed before StageError is raised."""
    try:
        with contextlib.closing(open_session(onnx)) as session:
            expected = outputs_of(session, inputs, batch)
        with contextlib.closing(open_session(engine, runtime="tensorrt")) as session:
            found = outputs_of(session, inputs, batch)
        if found.keys() != expected.keys() and len(found) == len(expected):  # Torch-TensorRT has names of its own
            found = dict(zip(expected, found.values(), strict=True))
        return agreement(found, expected, precision, str(engine))
    except EdgekdError:
        engine.unlink(missing_ok=True)
        sidecar_of(engine).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def keeping(files: Sequence[Path], made: Sequence[Engine]) -> Iterator[None]:
    """Let what goes wrong inside say which files and engines are there all the same."""
    try:
        yield
    except (MissingExtra, StageError, UsageError) as error:
        names = ", ".join(path.name for path in (*files, *(engine.path for engine in made)) if path.is_file())
        if not names:
            raise
        problem = error.problem
        hint = f"{problem.hint}\n  kept: {names}" if problem.hint else f"kept: {names}"
        raise type(error)(problem.what, where=problem.where, hint=hint) from error
