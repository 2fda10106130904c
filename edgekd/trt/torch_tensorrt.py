"""Torch-TensorRT: an engine, or a program with engines in it, from the PyTorch network itself.

Written to torch_tensorrt.dynamo of 2.14, which has strongly typed builds only, and of earlier releases that are told
to build so: types are those of the network.
Source: https://docs.pytorch.org/TensorRT/py_api/dynamo.html
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EdgekdError, MissingExtra, StageError, UsageError
from ..profile import Profile, TensorRT
from ..runtimes import Feed, doctor, open_session
from ..runtimes.engine_file import BatchRange, Here, write_engine
from ..runtimes.tensorrt import here
from ..runtimes.torch_session import DTYPES, Precision
from .answers import Agreement, agreement, outputs_of
from .build import Engine, batches_of, check_machine, compared, timing_cache

__all__ = ["build_program", "build_with_torch_tensorrt", "exported", "load_torch_tensorrt", "settings_of"]

#: What torch.export lets the batch be.
MOST_IMAGES = 65536


class InPrecision(nn.Module):
    """image float32 [batch, C, H, W] -> logits float32 [batch, K], computed in one precision."""

    def __init__(self, network: nn.Module, kind: torch.dtype) -> None:
        super().__init__()
        self.network, self.kind = network.to(kind), kind

    def forward(self, image: Tensor) -> Tensor:
        outputs = self.network(image.to(self.kind))
        return (outputs["logits"] if isinstance(outputs, dict) else outputs).float()


def load_torch_tensorrt() -> Any:
    """The module `torch_tensorrt`. Raises MissingExtra (not installed) or StageError (it does not work here).

    Without CUDA its import raises Exception, AssertionError or OSError, or ends the process: one of its own tries.
    """
    status = doctor.status_of("torch-tensorrt")
    if status.available:
        import torch_tensorrt

        return torch_tensorrt
    error = MissingExtra if status.why == "not installed" else StageError
    raise error(f"Torch-TensorRT does not run here: {status.why}", where="torch-tensorrt", hint=status.install)


def exported(network: nn.Module, example: Tensor, precision: Precision) -> Any:
    """A torch.export.ExportedProgram of a network in one precision, for any batch; example: [N >= 2, C, H, W].

    `network` itself is converted. Raises StageError where it cannot be exported.
    """
    wrapped = InPrecision(network, getattr(torch, DTYPES[precision])).eval().to(example.device)
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        return torch.export.export(wrapped, (example,), dynamic_shapes={"image": {0: batch}})
    except Exception as error:  # its exceptions have no common base class
        raise StageError(
            f"the network cannot be exported: {_first(error)}",
            where=type(network).__name__,
            hint="no branches on tensor values; torch.export's documentation says what else it cannot take",
        ) from error


def settings_of(wanted: TensorRT, cache: Path, function: Callable[..., Any]) -> dict[str, Any]:
    """A profile's [tensorrt] as the keyword arguments of a torch_tensorrt.dynamo function, of any release."""
    given = {
        "optimization_level": wanted.optimization_level,
        "workspace_size": (wanted.workspace_mb or 0) * 1_000_000,  # 0: as much as there is
        "version_compatible": wanted.version_compatible,
        "hardware_compatible": wanted.hardware_compatibility == "ampere-plus",
        "timing_cache_path": str(cache),
        "require_full_compilation": True,
        "use_explicit_typing": True,  # later releases have no other builds, and no such argument
    }
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in known}


def build_with_torch_tensorrt(
    network: nn.Module, onnx: Path, profile: Profile, directory: Path, inputs: Feed, precision: Precision = "fp16"
) -> Engine:
    """Build `STEM.PRECISION.torch-tensorrt.engine` from a float network and compare it with ONNX Runtime on `inputs`.

    `onnx` is the float32 file of the same network; inputs {"image": [N, C, H, W] float32}. `network` is converted.
    Raises like `build_engines`, without what was kept, and UsageError for settings that Torch-TensorRT does not have.
    """
    wanted = _wanted(profile)
    compiler, machine, program, span = _prepared(network, profile, inputs, precision)
    convert = compiler.dynamo.convert_exported_program_to_serialized_trt_engine
    settings = settings_of(wanted, timing_cache(machine), convert)
    try:
        engine = convert(program, arg_inputs=[_input(compiler, span)], **settings)
    except Exception as error:  # its exceptions have no common base class
        raise _failed(error, onnx) from error
    path = directory / f"{_stem(onnx)}.{precision}.torch-tensorrt.engine"
    metadata = write_engine(
        path,
        engine,
        onnx,
        **vars(machine),
        backend="torch-tensorrt",
        precision=precision,
        strongly_typed=True,
        optimization_level=wanted.optimization_level,
        workspace_mb=wanted.workspace_mb,
        version_compatible=wanted.version_compatible,
        hardware_compatibility=wanted.hardware_compatibility,
        inputs={"image": span},
    )
    return Engine(precision, path, metadata, compared(path, onnx, precision, inputs, span.tuned[0]))


def build_program(
    network: nn.Module, onnx: Path, profile: Profile, directory: Path, inputs: Feed, precision: Precision = "fp16"
) -> tuple[Path, Agreement]:
    """The same as an exported program, `STEM.PRECISION.torch-tensorrt.pt2`: PyTorch runs what TensorRT has not.

    `torch_tensorrt.load` opens it. It is compared before it is written. Raises like `build_with_torch_tensorrt`.
    """
    wanted = _wanted(profile)
    compiler, machine, program, span = _prepared(network, profile, inputs, precision)
    settings = settings_of(wanted, timing_cache(machine), compiler.dynamo.compile)
    example = torch.zeros(span.tuned, device="cuda")
    path = directory / f"{_stem(onnx)}.{precision}.torch-tensorrt.pt2"
    try:
        compiled = compiler.dynamo.compile(
            program, arg_inputs=[_input(compiler, span)], **settings | {"require_full_compilation": False}
        )
        with contextlib.closing(open_session(onnx)) as session:
            expected = outputs_of(session, inputs, span.tuned[0])
        found = _logits(compiled, inputs["image"], span.tuned[0])
        near = agreement(dict.fromkeys(expected, found), expected, precision, str(path))
        compiler.save(compiled, str(path), output_format="exported_program", arg_inputs=[example])
    except EdgekdError:
        raise
    except Exception as error:  # its exceptions have no common base class
        raise _failed(error, onnx) from error
    return path, near


def _stem(onnx: Path) -> str:
    """`model` of model.fp32.onnx."""
    return onnx.name.partition(".")[0]


def _logits(compiled: nn.Module, images: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """Logits [N, K] of images [N, C, H, W], `batch` at a time; the last ones are filled up."""
    parts = []
    for start in range(0, len(images), batch):
        chosen = np.minimum(np.arange(start, start + batch), len(images) - 1)
        outputs = compiled(torch.from_numpy(images[chosen]).cuda())
        parts.append((outputs[0] if isinstance(outputs, tuple | list) else outputs).cpu().numpy())
    return np.concatenate(parts)[: len(images)]


def _wanted(profile: Profile) -> TensorRT:
    """Raise UsageError for what Torch-TensorRT does not have."""
    wanted, where = profile.tensorrt, f"profile {profile.name}: tensorrt"
    if wanted is None:
        raise UsageError(
            "says nothing of TensorRT", where=f"profile {profile.name}", hint="it needs a table [tensorrt]"
        )
    if wanted.dla is not None:
        what = "engines for a DLA are built from ONNX files only"
        raise UsageError(what, where=f"{where}.dla", hint="use the backend tensorrt")
    if wanted.hardware_compatibility == "same-compute-capability":
        what = "Torch-TensorRT builds for one GPU model, or for ampere-plus"
        raise UsageError(what, where=f"{where}.hardware_compatibility", hint="use the backend tensorrt")
    return wanted


def _prepared(
    network: nn.Module, profile: Profile, inputs: Feed, precision: Precision
) -> tuple[Any, Here, Any, BatchRange]:
    """Torch-TensorRT, this machine, the exported program on the GPU, and the shapes that it is built for."""
    compiler = load_torch_tensorrt()
    import tensorrt  # which Torch-TensorRT has imported

    machine = here(tensorrt)
    check_machine(profile, machine)
    size = list(inputs["image"].shape[1:])
    program = exported(network, torch.zeros(2, *size, device="cuda"), precision)
    smallest, tuned, largest = ([batch, *size] for batch in batches_of(profile))
    return compiler, machine, program, BatchRange(smallest=smallest, tuned=tuned, largest=largest)


def _input(compiler: Any, span: BatchRange) -> Any:
    if span.smallest == span.largest:
        return compiler.Input(tuple(span.tuned), dtype=torch.float32)
    return compiler.Input(
        min_shape=tuple(span.smallest),
        opt_shape=tuple(span.tuned),
        max_shape=tuple(span.largest),
        dtype=torch.float32,
    )


def _failed(error: Exception, onnx: Path) -> StageError:
    return StageError(
        f"Torch-TensorRT builds nothing: {_first(error)}",
        where=onnx.name,
        hint="the backend tensorrt builds from the ONNX file and names the node that it refuses",
    )


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
