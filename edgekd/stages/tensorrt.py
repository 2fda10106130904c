"""What the stage `export` writes for TensorRT beside `model.onnx`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .. import trt
from ..errors import Problem
from ..onnx_file import read
from ..profile import Profile
from ..quant import scheme_named
from .teaching import Context

__all__ = ["OPSET", "builders", "tensorrt_problems", "write_tensorrt"]

#: From here every form can be written: older ones, and those with typed scales.
OPSET = 18
SCHEME = "trt-s8s8"


def tensorrt_problems(stage: Any, context: Context) -> Iterator[Problem]:
    """A network quantized for another runtime, whose zero points and biases TensorRT refuses; a DLA that cannot."""
    if "trt" not in (stage.targets or []):
        return
    where = f"{context.where}.targets"
    if context.scheme is not None and scheme_named(context.scheme, where).placement != "tensorrt":
        yield Problem(
            where,
            f"files for TensorRT need the quantization scheme {SCHEME}, the network has {context.scheme}",
            f'quantize with scheme = "{SCHEME}", or for a profile that runs TensorRT, or export a float stage',
        )
    for profile in context.profiles:
        if profile.tensorrt is not None and profile.tensorrt.dla is not None:
            yield from trt.dla_problems(profile, precision="fp16", dynamic_batch=stage.dynamic_batch)


def builders(profiles: Sequence[Profile]) -> str:
    """The TensorRT versions that files are made for: what the set of files depends on beside the network."""
    wanted = [p.tensorrt for p in profiles if p.tensorrt is not None]
    return ", ".join(sorted({v.version + " DLA" * (v.dla is not None) for v in wanted})) or "none named"


def write_tensorrt(
    file: Path, directory: Path, profiles: Sequence[Profile], images: NDArray[Any]
) -> dict[str, dict[str, Any]]:
    """Write the files for TensorRT of `file`, which is at most of opset 18, into `directory`.

    images: [N, C, H, W] as the file takes them. Returns what the manifest tells of each by its name: file, opset,
    strongly_typed, and how it compared in ONNX Runtime. Raises StageError as `trt.write_files` does.
    """
    return {
        made.name: {
            "file": made.path.name,
            "opset": made.opset,
            "strongly_typed": made.strongly_typed,
            **made.compared,
        }
        for made in trt.write_files(read(file), directory, profiles, images)
    }
