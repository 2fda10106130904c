"""Whether TensorRT takes an ONNX file, and in which precision it would run each matrix layer: known before a device is.

Two judges: rules that hold without any compiler (`rules.py`), and TensorRT-RTX, where it is installed. Neither says how
fast a file is, and what is fused is TensorRT-RTX's choice, not that of every TensorRT.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx

from ..errors import MissingExtra, StageError, UsageError
from ..profile import Profile
from ..runtimes.onnx_model import read_onnx
from .compiler import INSTALL, Compiled, compile_onnx, nearest_target
from .findings import Finding
from .graph import named
from .layers import engine_layers
from .matrix import distinct, matrix_nodes
from .placing import placed
from .rules import check
from .verification import MatrixLayer, Verification

__all__ = ["verify"]

#: Where neither the profile nor the user says a compute capability: Ampere, as in most Jetsons of today.
USUAL = "8.6"
#: TensorRT-RTX refuses fp32 matrix products for Turing; by its support matrix TensorRT has them there.
TURING, BEYOND_TURING, NO_FLOAT_PRODUCTS = "7.5", "8.0", "FP32 GEMM is not supported"
#: protobuf's limit on one file.
LARGEST = 2**31 - 1


def verify(path: Path, profile: Profile, *, compute_capability: str | None = None) -> Verification:
    """Judge one file by the rules, and by the compiler where the extra `trt-verify` is installed.

    compute_capability: instead of the profile's; the nearest that the compiler has is taken. Raises UsageError for a
    profile without TensorRT and for what is no ONNX file; a file that TensorRT refuses is no exception. One with open
    axes beside the batch, and one that the compiler crashes on, are judged by the rules alone, with a note.
    """
    if profile.tensorrt is None:
        what = f"profile {profile.name} runs {profile.runtime}, not TensorRT"
        raise UsageError(what, where="--profile", hint="edgekd profiles list has those of GPUs and Jetsons")
    if compute_capability is not None and not re.fullmatch(r"\d+\.\d", compute_capability):
        what = f"expected a compute capability such as 8.6, got {compute_capability!r}"
        raise UsageError(what, where="--compute-capability", hint="leave it out to take the profile's")
    model = read_onnx(path)
    apart = distinct(model)  # its layers are told apart by name
    nodes = matrix_nodes(apart or model)
    static = Verification(
        file=str(path),
        profile=profile.name,
        tensorrt=profile.tensorrt.version,
        compute_capability=compute_capability or profile.compute_capability,
        origin="static",
        findings=check(model, profile.tensorrt.version),
        layers=[MatrixLayer(node=n.node, path=n.path, op=n.op, wanted=n.wanted, why=n.why) for n in nodes],
        wanted=_counted(node.wanted for node in nodes),
    )
    if unknown := _without_size(static.findings):
        return static.model_copy(update={"notes": [f"judged by rules alone, sizes are not known: {unknown}"]})
    try:
        compiled, notes = _compiled(path, static.compute_capability)
        log = compiled.log if apart is None or not compiled.ok else _log(apart, path.name, compiled.compute_capability)
    except MissingExtra as error:
        note = f"judged by rules alone: {error.problem.what}; {INSTALL}"
        return static.model_copy(update={"notes": [note]})
    except StageError as error:  # a compiler that ended by itself has judged nothing
        note = f"judged by rules alone, {error.problem.what}"
        return static.model_copy(update={"notes": [note]})
    layers = placed(nodes, engine_layers(log), {named(node): node.op_type for node in (apart or model).graph.node})
    if any(layer.got == "fp32" for layer in layers) and not profile.tensorrt.strongly_typed:
        notes.append("types are those of the file; TensorRT 10 and older may run in fp16 what is fp32 here")
    return static.model_copy(
        update={
            "origin": "compiled",
            "compiler": f"TensorRT-RTX {compiled.version}",
            "compiled_for": compiled.compute_capability,
            "compiled": compiled.ok,
            "why": None if compiled.ok else _why(compiled),
            "refused": compiled.refused,
            "layers": layers,
            "got": _counted(layer.got for layer in layers if layer.got is not None),
            "seconds": round(compiled.seconds, 3),
            "notes": notes,
        }
    )


def _without_size(findings: Iterable[Finding]) -> str | None:
    """What keeps the compiler from building a file that a builder with a profile of shapes may well take."""
    return next((f"{found.what}; {found.hint}" for found in findings if found.rule == "open-axes"), None)


def _compiled(path: Path, capability: str | None) -> tuple[Compiled, list[str]]:
    """What the compiler made of a file, and how far that holds for the device."""
    target, notes = nearest_target(capability or USUAL), []
    if capability is None:
        notes.append(f"the profile names no compute capability: compiled for {target}")
    elif target != capability:
        notes.append(f"compiled for {target}, the nearest that the compiler has; the device is {capability}")
    compiled = compile_onnx(path, target)
    if target == TURING and any(NO_FLOAT_PRODUCTS in text for text in compiled.errors):
        compiled = compile_onnx(path, BEYOND_TURING)
        what = f"TensorRT-RTX, unlike TensorRT, multiplies no fp32 matrices for {TURING}"
        notes.append(f"compiled for {BEYOND_TURING}: {what}")
    return compiled, notes


def _log(model: onnx.ModelProto, name: str, target: str) -> str:
    """Of the build of a model that is no file yet."""
    if model.ByteSize() > LARGEST:
        what = "two nodes have one name, or it has functions, and it is too large to be written again"
        raise UsageError(what, where=name, hint="give every node a name of its own")
    with tempfile.TemporaryDirectory() as directory:
        onnx.save(model, copy := Path(directory) / name)
        return compile_onnx(copy, target).log


def _why(compiled: Compiled) -> str:
    if compiled.refused:
        return f"the parser refuses {len(compiled.refused)} node{'s' * (len(compiled.refused) > 1)}"
    return compiled.errors[-1] if compiled.errors else "the builder gave no engine and no reason"


def _counted(precisions: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(precisions).items()))
