"""The set of files for TensorRT: int8 in the form that the builder takes, and its fp16 and fp32 siblings.

int8 is often slower than fp16, so both are always there. A builder that may choose types (weakly typed, TensorRT up to
10) gets Q/DQ over float32 and may use float16 for the rest; a strongly typed one runs every layer in the types of the
file, so the rest must be float16 in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ..artifact import Artifact, write_atomically
from ..errors import StageError
from ..onnx_edit import copied, lift_constants, opset_of
from ..onnx_opset import downgraded
from ..profile import Profile, TensorRT
from ..runtimes import open_session
from .half import LARGEST_HALF, in_half
from .plain import fold_constants, without_integers

__all__ = ["FORMS", "WEAK_OPSET", "TrtFile", "files_of", "suited", "write_files"]

#: The files that there may be: what others are compared with first, what a profile is for last.
FORMS = ("fp32", "fp16", "int8", "int8-fp16")
#: TensorRT 8.6 reads no newer one, and 10.x reads it as well.
WEAK_OPSET = 17
BATCH = 32
#: float16 keeps 11 bits: a hundred layers of it lose less than this share of the largest logit.
HALF_TOLERANCE = 0.05
#: Rounding to float16 moves integers by one where a value is near a tie: so far, of what int8 itself moves logits.
TIES = 2.0
#: A sibling further away than this share of the largest logit is another network.
ANOTHER = 0.5


@dataclass(frozen=True)
class TrtFile:
    """One file, and how its outputs in ONNX Runtime differ from those of what it was made from.

    compared: "with" (the file it is held against), max_abs_difference, max_abs_logit, argmax_agreement, images.
    """

    name: Literal["int8", "int8-fp16", "fp16", "fp32"]
    path: Path
    opset: int
    strongly_typed: bool
    compared: dict[str, Any]


def write_files(
    model: onnx.ModelProto, directory: Path, profiles: Sequence[Profile], images: NDArray[Any]
) -> list[TrtFile]:
    """Write `model` (float, or Q/DQ by the scheme trt-s8s8) as `directory`/model.NAME.onnx in the forms for `profiles`.

    images: real ones [N, C, H, W], as the file takes them. Profiles without TensorRT do not count; where none is left
    the builder is taken to be strongly typed. Where all are of DLAs there is no int8 file. Every file is run on the
    images and compared: int8 with `model`, bit for bit; int8-fp16 with `model`; fp32 with `model`; fp16 with fp32.
    Raises StageError: what cannot be written so (see `downgraded`, `in_half`, `without_integers`), a value that
    float16 cannot hold on these images, and outputs that differ by more than rounding explains.
    """
    versions = [p.tensorrt for p in profiles if p.tensorrt is not None]
    weak = [v for v in versions if not v.strongly_typed]
    of_gpus = [v for v in versions if v.dla is None]  # a DLA takes fp16 only
    # Before version 10 a network could not be strongly typed at all.
    typed = all(int(v.version.partition(".")[0]) >= 10 for v in versions)
    model = _unbiased(downgraded(model, WEAK_OPSET) if weak else model)
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    expected = _outputs(model, directory, images)
    plain = without_integers(model) if quantized else model
    floats = _outputs(plain, directory, images) if quantized else expected
    _raise_beyond_half(plain, directory, images)

    def write(name: Any, content: onnx.ModelProto, strongly: bool, held: str, reference: Any, limit: float) -> TrtFile:
        path = directory / f"model.{name}.onnx"
        write_atomically(path, content.SerializeToString())
        compared = _compared(path, images, reference, limit)
        return TrtFile(name, path, opset_of(content), strongly, {"with": held, **compared})

    largest, rounding = float(np.abs(expected).max()), float(np.abs(expected - floats).max())
    found = []
    if quantized and any(not v.strongly_typed for v in of_gpus):
        found.append(write("int8", model, False, "model", expected, 0.0))
    if quantized and (not versions or any(v.strongly_typed for v in of_gpus)):
        limit = TIES * rounding + HALF_TOLERANCE * largest
        found.append(write("int8-fp16", in_half(model), True, "model", expected, limit))
    found.append(write("fp16", in_half(plain), typed, "fp32", floats, HALF_TOLERANCE * float(np.abs(floats).max())))
    found.append(write("fp32", plain, typed, "model", expected, ANOTHER * largest if quantized else 0.0))
    return found


def files_of(artifact: Artifact) -> list[TrtFile]:
    """The files for TensorRT of an `export` artifact, as `write_files` returned them; [] where it has none."""
    rows = artifact.manifest.metrics.get("tensorrt", {})
    taken = ("file", "opset", "strongly_typed")
    return [
        TrtFile(
            name,
            artifact.file(row["file"]),
            row["opset"],
            row["strongly_typed"],
            {key: value for key, value in row.items() if key not in taken},
        )
        for name, row in rows.items()
    ]


def suited(files: Mapping[str, Path], tensorrt: TensorRT) -> dict[str, Path]:
    """Files by name without the int8 form of another TensorRT, where this one's is there; for a DLA, fp16 alone."""
    if tensorrt.dla is not None:
        return {name: path for name, path in files.items() if name == "fp16"}
    own, other = ("int8-fp16", "int8") if tensorrt.strongly_typed else ("int8", "int8-fp16")
    return {name: path for name, path in files.items() if name != other or own not in files}


def _unbiased(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its int32 biases, which TensorRT refuses, as the float32 values that they stand for."""
    if not any(t.data_type == TensorProto.INT32 for t in model.graph.initializer):
        return model
    model = copied(model)
    lift_constants(model.graph)
    fold_constants(model.graph, integers={TensorProto.INT32})
    return model


def _compared(path: Path, images: NDArray[Any], expected: NDArray[Any], limit: float) -> dict[str, Any]:
    found = _run(path, images)
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("nan")
    agreement = float((found.argmax(1) == expected.argmax(1)).mean())
    if not difference <= limit:  # written so that NaN is wrong
        raise StageError(
            f"{path.name} does not compute what it was made from: largest difference {difference:.3g}, "
            f"{agreement:.1%} equal answers on {len(images)} images, expected {limit:.3g} at most",
            where=path.name,
            hint="float16 does not suit this network, or please report it",
        )
    return {
        "max_abs_difference": difference,
        "max_abs_logit": float(np.abs(expected).max()),
        "argmax_agreement": agreement,
        "images": len(images),
    }


def _raise_beyond_half(model: onnx.ModelProto, directory: Path, images: NDArray[Any]) -> None:
    """Run a float32 file on the images and raise StageError for the first tensor that float16 cannot hold."""
    typed = onnx.shape_inference.infer_shapes(model).graph.value_info
    names = [v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    names = [name for name in names if any(name in node.output for node in model.graph.node)]
    probe = copied(model)
    for index, name in enumerate(names):
        # The extremes alone leave the session, so that no activation has to be kept.
        for kind in ("ReduceMax", "ReduceMin"):
            output = f"{kind}_{index}"
            probe.graph.node.append(onnx.helper.make_node(kind, [name], [output], keepdims=0))
            probe.graph.output.append(onnx.helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    for found in _chunks(probe, directory, images):
        for index, name in enumerate(names):
            largest = max(abs(float(found[f"{kind}_{index}"])) for kind in ("ReduceMax", "ReduceMin"))
            if not largest <= LARGEST_HALF:
                source = next(n for n in model.graph.node if name in n.output)
                raise StageError(
                    f"{name} reaches {largest:.3g} on real images, beyond float16's {LARGEST_HALF:.0f}",
                    where=source.name or source.op_type,
                    hint="normalise in front of that layer, or train with weight decay",
                )


def _outputs(model: onnx.ModelProto, directory: Path, images: NDArray[Any]) -> NDArray[np.float32]:
    return np.concatenate([found["logits"] for found in _chunks(model, directory, images)])


def _chunks(model: onnx.ModelProto, directory: Path, images: NDArray[Any]) -> Any:
    path = directory / ".probe.onnx"
    try:
        write_atomically(path, model.SerializeToString())
        yield from _run_chunks(path, images)
    finally:
        path.unlink(missing_ok=True)


def _run(path: Path, images: NDArray[Any]) -> NDArray[np.float32]:
    return np.concatenate([found["logits"] for found in _run_chunks(path, images)])


def _run_chunks(path: Path, images: NDArray[Any]) -> Any:
    with contextlib.closing(open_session(path)) as session:
        step = 1 if isinstance(session.inputs[0].axes[0], int) else BATCH
        for start in range(0, len(images), step):
            yield session.run({session.inputs[0].name: images[start : start + step]})
