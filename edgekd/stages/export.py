"""The stage `export`: one file for a runtime, checked against the network it came from."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import nn

from .. import quant
from ..artifact import Artifact, ModelSpec, TensorInfo, finish, writing
from ..bench import environment
from ..data import Dataset, Split
from ..errors import Problem, StageError
from ..onnx_edit import opset_of
from ..onnx_file import compare, export_onnx, optimised_layers
from ..profile import Profile, lowest_opset
from ..quant import scheme_named
from ..registry import register
from ..runtimes import open_session
from .backends import FILE, export_problems
from .saturating import SEVEN_BITS, saturation
from .teaching import Context, Teaching, load_network
from .tensorrt import OPSET, builders, tensorrt_problems, write_tensorrt
from .workspace import Workspace, load_prepared

__all__ = ["Export", "write_onnx"]

#: Float networks may differ by rounding only; int8 ones by a quantization step at a near-tie.
FLOAT_TOLERANCE = 1e-3
AGREEMENT = 0.995
#: Images that files for TensorRT are compared on.
COMPARED = 64


@register("stages", "export")
class Export(BaseModel):
    """Write the network as a file that the profiles' runtime loads, and compare the two on real images."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "export"
    follows: ClassVar[tuple[str, ...]] = ("teacher", "distill", "prune", "quantize", "fuse", "average")

    targets: list[Literal["onnx", "trt"]] | None = Field(
        None,
        min_length=1,
        description="trt: files for TensorRT beside it; default: onnx, and trt if a profile runs it",
    )
    opset: int | None = Field(None, ge=17, description="default: the profile's")
    input: Literal["float32", "uint8"] = Field("float32", description="uint8 bakes the normalisation into the graph")
    dynamic_batch: bool = True
    after: str | None = Field(None, description="the stage to go on from; default: the one before")
    _profiles: Sequence[Profile] = PrivateAttr(())

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """What a file that is written already cannot become, and what TensorRT refuses."""
        return context.source, [*export_problems(self, context), *tensorrt_problems(self, context)]

    def inputs(self) -> dict[str, str]:
        """The versions of TensorRT, where there are files for it."""
        return {"tensorrt": builders(self._profiles)} if "trt" in (self.targets or []) else {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Export:
        """Opset and targets from the profiles; model.onnx is always there."""
        for_tensorrt = "trt" in self.targets if self.targets else any(p.runtime == "tensorrt" for p in profiles)
        targets = ["onnx", "trt"] if for_tensorrt else ["onnx"]
        stage = self.model_copy(update={"opset": self.opset or lowest_opset(profiles), "targets": targets})
        stage._profiles = tuple(profiles)
        return stage

    def run(self, workspace: Workspace) -> Artifact:
        """Export, check, compare; a mismatch fails the stage."""
        source = workspace.parents["source"]
        with writing(workspace.destination) as directory:
            found = write_onnx(
                source,
                directory / "model.onnx",
                workspace.data,
                opset=self.opset or 18,
                input=self.input,
                dynamic_batch=self.dynamic_batch,
            )
            if found.get("opset", 0) > (self.opset or 18):
                what = f"{source.path} holds a file of ONNX opset {found['opset']}, wanted is {self.opset} at most"
                raise StageError(what, where="export.opset", hint="quantize again for the profile that wants it")
            if "trt" in (self.targets or []):
                found["tensorrt"] = self._for_tensorrt(source, directory, workspace)
            manifest = workspace.manifest(source.manifest.model, metrics={**source.manifest.metrics, **found})
            batch: str | int = "batch" if self.dynamic_batch else 1
            manifest = manifest.model_copy(
                update={
                    "quantization": source.manifest.quantization,
                    "inputs": [TensorInfo(name="image", dtype=self.input, axes=[batch, *workspace.data.size])],
                    "outputs": [TensorInfo(name="logits", dtype="float32", axes=[batch, len(workspace.data.classes)])],
                }
            )
            finish(directory, manifest)
        return Artifact.open(workspace.destination)

    def _for_tensorrt(self, source: Artifact, directory: Path, workspace: Workspace) -> dict[str, Any]:
        file, data = directory / "model.onnx", workspace.data
        if opset_of(onnx.load(file)) > OPSET:  # older forms cannot be made of it
            file = directory / ".older.onnx"
            form: dict[str, Any] = {"input": self.input, "dynamic_batch": self.dynamic_batch}
            write_onnx(source, file, data, opset=OPSET, **form)
        images = as_fed(_pool(data).images[:COMPARED], data, self.input)
        found = write_tensorrt(file, directory, workspace.profiles, images)
        (directory / ".older.onnx").unlink(missing_ok=True)
        return found


def exportable(artifact: Artifact) -> nn.Module:
    """The network of an artifact as a runtime should compute it."""
    if artifact.manifest.quantization is not None:
        return quant.convert(load_prepared(artifact))
    return load_network(artifact).eval()


def write_onnx(
    artifact: Artifact,
    path: Path,
    data: Dataset,
    *,
    opset: int,
    input: Literal["float32", "uint8"] = "float32",
    dynamic_batch: bool = True,
    images: int = 256,
) -> dict[str, Any]:
    """Export an artifact's network and compare it with the file in ONNX Runtime on real images.

    Raises StageError where they differ: more than 1e-3 of the largest logit for float networks, for quantized ones
    more than 0.5 % of the answers, and more than one, ties (see `compare`) not counted. A backend's file is copied as
    it is; `opset` is its own.
    """
    if FILE in artifact.manifest.files:  # a backend's: compared with its network when it was made
        shutil.copyfile(artifact.file(FILE), path)
        return {"layers": optimised_layers(path), "opset": opset_of(onnx.load(path))}
    network = exportable(artifact)
    export_onnx(
        network,
        path,
        size=data.size,
        opset=opset,
        classes=data.classes,
        preprocessing=artifact.manifest.preprocessing,
        input=input,
        dynamic_batch=dynamic_batch,
    )
    pool = _pool(data)
    with contextlib.closing(open_session(path)) as session:
        found = compare(path, network, normalised(pool.images[:images], data), session.run)
    quantized = artifact.manifest.quantization is not None
    limit = FLOAT_TOLERANCE * max(1.0, found["max_abs_logit"])
    # Of a network that is hardly trained most answers are ties, which rounding decides. Written so that NaN is wrong.
    unequal = round((1 - found["argmax_agreement"]) * found["images"]) - found["ties"]
    right = found["max_abs_difference"] <= (np.inf if quantized else limit)
    if quantized and unequal > max(1, (1 - AGREEMENT) * found["images"]):
        right = False
    if not right:
        raise StageError(
            f"the exported file does not compute what the network computes: {found['argmax_agreement']:.1%} equal "
            f"answers, largest difference {found['max_abs_difference']:.3g} on {found['images']} images",
            where=str(path.name),
            hint=_why_different(artifact),
        )
    return {**found, "layers": optimised_layers(path)}


def _pool(data: Dataset) -> Split:
    return data.validation if len(data.validation) else data.train


def _why_different(artifact: Artifact) -> str:
    quantization = artifact.manifest.quantization
    if quantization is not None:
        why = saturation(scheme_named(quantization["scheme"], str(artifact.path)), environment())
        if why is not None:
            return f"{why}; {SEVEN_BITS} has weights that do not"
    return "please report this network: edgekd's export or the runtime is wrong about it"


def normalised(images: torch.Tensor, data: Dataset) -> torch.Tensor:
    """Raw images (uint8, or float in [0, 1]) [N, C, H, W] -> the network's float32 input."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    return (scaled - mean) / std


def as_fed(images: torch.Tensor, data: Dataset, input: str) -> NDArray[Any]:
    """Raw images (uint8, or float in [0, 1]) [N, C, H, W] as a file takes them: bytes, or float32 normalised."""
    if input == "float32":
        return normalised(images, data).contiguous().numpy()
    return (images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)).contiguous().numpy()
