"""From an ONNX file to a network, a builder's configuration and an engine's bytes, through TensorRT's own API.

`trt` is everywhere the module: `tensorrt` of 8.6, 10.x or 11, or TensorRT-RTX's `tensorrt_rtx_bindings`, which has the
same calls and needs no GPU for them.
Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import write_atomically
from ..errors import StageError
from ..profile import TensorRT
from ..runtimes.engine_file import BatchRange
from ..runtimes.tensorrt import last_error, logger_of

__all__ = ["Parsed", "configured", "parsed", "precision_flags", "ranges", "serialized", "with_profile"]

#: Refused nodes named in one message.
SHOWN = 5
COMPATIBILITY = {"same-compute-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}


@dataclass(frozen=True)
class Parsed:
    """A network in its builder; the parser stays, for its memory holds the weights."""

    builder: Any
    network: Any
    parser: Any
    typed: bool


def weakly_typed_builds(trt: Any) -> bool:
    """Whether the builder may choose types: up to TensorRT 10, where flags allow them."""
    return hasattr(trt.BuilderFlag, "FP16")


def parsed(trt: Any, file: Path, *, strongly_typed: bool) -> Parsed:
    """The network of an ONNX file, its types those of the file (`strongly_typed`) or the builder's choice.

    Raises StageError: no GPU, a TensorRT without strongly typed networks, or nodes that it refuses, each by its name.
    """
    typed = strongly_typed or not weakly_typed_builds(trt)
    kinds = trt.NetworkDefinitionCreationFlag
    if strongly_typed and not hasattr(kinds, "STRONGLY_TYPED"):
        what = f"its types are fixed, and TensorRT {trt.__version__} chooses types itself"
        raise StageError(what, where=str(file), hint="build the int8 file for it; typed ones need TensorRT 10")
    wanted = ["EXPLICIT_BATCH", *(["STRONGLY_TYPED"] if typed else [])]  # 8.6 wants the first, 10 ignores it
    flags = sum(1 << int(getattr(kinds, name)) for name in wanted if hasattr(kinds, name))
    try:
        builder = trt.Builder(logger_of(trt))
    except TypeError as error:  # the binding's way to say that there is no driver
        raise StageError(f"TensorRT {trt.__version__} finds no NVIDIA GPU: {last_error(trt)}") from error
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger_of(trt))
    if not parser.parse_from_file(str(file)):
        raise _refused([parser.get_error(i) for i in range(parser.num_errors)], file)
    if not network.num_outputs:  # any text is a model with an empty graph to the parser
        raise StageError("not an ONNX model: it has no outputs", where=str(file), hint="export it again")
    return Parsed(builder, network, parser, typed)


def _refused(errors: Sequence[Any], file: Path) -> StageError:
    if not errors:
        return StageError("TensorRT does not parse it and names no node", where=str(file), hint="is the file complete?")
    lines = [f"{file.name}:{_node(error)}: {error.desc().strip()}" for error in errors]
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return StageError(
        "\n".join([f"TensorRT refuses {len(lines)} of its nodes", *(f"  {line}" for line in lines[:SHOWN]), *more]),
        where=str(file),
        hint="edgekd verify says what TensorRT takes; a custom operator needs a plugin of its own",
    )


def _node(error: Any) -> str:
    name = error.node_name() if hasattr(error, "node_name") else ""  # since TensorRT 10
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return f"{name or f'node {error.node()}'}{f' ({operator})' if operator else ''}"


def ranges(network: Any, batches: tuple[int, int, int], file: Path) -> dict[str, BatchRange]:
    """The shapes of every input: of an open first axis from the first to the last of `batches`, tuned for the second.

    Raises StageError for another open axis: nothing says what it stands for.
    """
    found = {}
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shape = list(tensor.shape)
        if others := [axis for axis, size in enumerate(shape) if size < 0 and axis]:
            raise StageError(
                f"input {tensor.name!r} has the shape {shape}: axis {others[0]} is open, and only the batch may be",
                where=str(file),
                hint="export it with fixed sizes",
            )
        smallest, tuned, largest = ([batch if size < 0 else size for size in shape] for batch in batches)
        found[tensor.name] = BatchRange(smallest=smallest, tuned=tuned, largest=largest)
    return found


def precision_flags(name: str, typed: bool) -> list[str]:
    """The builder's flags for a file `int8`, `int8-fp16`, `fp16` or `fp32`; none where types are the file's.

    int8 goes with FP16: beside fp32 layers, int8 ones are the slow case.
    """
    if typed or name == "fp32":
        return []
    return ["FP16"] if name == "fp16" else ["INT8", "FP16"]


def configured(trt: Any, made: Parsed, wanted: TensorRT, flags: Sequence[str], cache: Path | None) -> Any:
    """The builder's configuration: what a profile's [tensorrt] says, flags, and a timing cache where there is one.

    Raises StageError for what this TensorRT or this GPU does not have.
    """
    config = made.builder.create_builder_config()
    config.builder_optimization_level = wanted.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names in the engine; its speed is the same
    if wanted.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, wanted.workspace_mb * 1_000_000)
    for name in [*flags, *(["VERSION_COMPATIBLE"] if wanted.version_compatible else [])]:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if wanted.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, COMPATIBILITY[wanted.hardware_compatibility], None)
        if level is not None:
            config.hardware_compatibility_level = level
        if level is None or config.hardware_compatibility_level != level:  # refused without an exception
            what = f"TensorRT {trt.__version__} does not build for {wanted.hardware_compatibility} here"
            raise StageError(what, where="tensorrt.hardware_compatibility", hint="none builds for this GPU alone")
    if wanted.dla is not None:
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, wanted.dla
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if cache is not None:
        config.set_timing_cache(config.create_timing_cache(_kept(cache)), ignore_mismatch=False)
    return config


def with_profile(made: Parsed, config: Any, shapes: dict[str, BatchRange]) -> None:
    """Add one optimisation profile, if an input's shape is open."""
    if all(span.smallest == span.largest for span in shapes.values()):
        return
    profile = made.builder.create_optimization_profile()
    for name, span in shapes.items():
        profile.set_shape(name, tuple(span.smallest), tuple(span.tuned), tuple(span.largest))
    config.add_optimization_profile(profile)


def serialized(trt: Any, made: Parsed, config: Any, file: Path, cache: Path | None) -> bytes:
    """The engine. What was timed is kept for the next build. Raises StageError with TensorRT's reason."""
    logger_of(trt).errors.clear()
    engine = made.builder.build_serialized_network(made.network, config)
    if engine is None:
        raise StageError(
            f"TensorRT {trt.__version__} builds no engine: {last_error(trt)}",
            where=str(file),
            hint="edgekd verify says what TensorRT takes; is there memory left on the GPU?",
        )
    if cache is not None and (timed := config.get_timing_cache()) is not None:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, bytes(timed.serialize()))
        except OSError:
            pass  # a cache: without it the next build takes longer
    return bytes(engine)


def _kept(cache: Path) -> bytes:
    try:
        return cache.read_bytes()
    except OSError:
        return b""
