"""The stage `quantize` by other tools' backends: its artifact holds an ONNX file instead of a network that trains."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..artifact import Artifact, finish, write_atomically, writing
from ..errors import Problem, StageError, UsageError
from ..onnx_file import compare, export_onnx, optimised_layers
from ..profile import lowest_opset
from ..quant import Scheme
from ..quant.backends import neural_compressor, onnxruntime, weights
from ..quant.mixed import PrecisionRecord
from ..runtimes import Session, open_session
from .mixing import DOCUMENT, save_float, verdict
from .paying import compared, measuring_profile
from .teaching import Context, load_network
from .workspace import Workspace

__all__ = ["FILE", "Backend", "Mode", "Tuning", "backend_problems", "export_problems", "quantize_elsewhere"]

Backend = Literal["edgekd", "onnxruntime", "neural-compressor"]
Mode = Literal["static", "dynamic", "weight-only"]
#: What such an artifact holds instead of weights.
FILE = "model.onnx"
#: What the files are compared and tuned on, at most.
IMAGES = 2048


class Tuning(BaseModel):
    """Neural Compressor's accuracy-driven tuning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_drop: float = Field(0.01, gt=0, lt=1, description="of the accuracy on the validation images, 0.01 is a point")


def backend_problems(stage: Any, scheme: Scheme, context: Context) -> Iterator[Problem]:
    """Fields of a quantize stage that do not go together with its backend and mode."""
    where = context.where
    if stage.backend == "edgekd":
        if stage.mode != "static":
            hint = f'backend = "onnxruntime" makes {stage.mode} files'
            yield Problem(f"{where}.mode", f"backend edgekd quantizes statically, got {stage.mode!r}", hint)
        if stage.tune is not None:
            yield Problem(f"{where}.tune", "is for another backend", 'backend = "neural-compressor"')
        return
    if stage.heal.epochs:
        what = f"backend {stage.backend} leaves no network that trains, got {stage.heal.epochs} epochs"
        hint = 'heal = { epochs = 0 }, or backend = "edgekd" for quantization-aware training'
        yield Problem(f"{where}.heal.epochs", what, hint)
    for field in ("learned", "warmup", "corrections", "float_layers", "mixed"):
        if getattr(stage, field):
            yield Problem(f"{where}.{field}", f"backend {stage.backend} knows nothing of it", 'backend = "edgekd" does')
    if scheme.placement != "onnxruntime":
        what = f"scheme {scheme.name} is placed for {scheme.placement}, backend {stage.backend} does not do that"
        yield Problem(f"{where}.scheme", what, 'backend = "edgekd" places for every runtime')
    if stage.backend == "onnxruntime":
        if stage.tune is not None:
            yield Problem(f"{where}.tune", "ONNX Runtime has no tuning", 'backend = "neural-compressor"')
        if stage.mode == "dynamic" and scheme.activation_dtype != "uint8":
            what = f"dynamic quantization makes uint8 activations, scheme {scheme.name} has {scheme.activation_dtype}"
            yield Problem(f"{where}.mode", what, f'mode = "static" makes {scheme.name} files')
        yield from _ranges_problems(stage, onnxruntime.METHODS, where)
        return
    if stage.mode != "static":
        what = f"backend neural-compressor quantizes statically, got {stage.mode!r}"
        yield Problem(f"{where}.mode", what, f'backend = "onnxruntime" makes {stage.mode} files')
    if scheme.name != "x86-u8s8":
        what = f"backend neural-compressor makes uint8 activations and 8-bit weights, not {scheme.name}"
        yield Problem(f"{where}.scheme", what, 'scheme = "x86-u8s8", or backend = "onnxruntime"')
    yield from _ranges_problems(stage, neural_compressor.METHODS, where)


def _ranges_problems(stage: Any, methods: dict[str, str], where: str) -> Iterator[Problem]:
    if stage.mode == "static" and stage.ranges not in methods:
        what = f"backend {stage.backend} has no ranges {stage.ranges!r}"
        yield Problem(f"{where}.ranges", what, f"it has {', '.join(methods)}")


def quantize_elsewhere(stage: Any, scheme: Scheme, workspace: Workspace) -> Artifact:
    """Export the float network, let the backend quantize it, compare the file with the network, and store it.

    With `keep_float` the file is timed beside the float one, and the float network stored where the file is both
    slower and less accurate; weights alone are there for the file's size, and not compared.

    The artifact's `quantization` names backend, version, mode, scheme and options; its metrics hold `float_agreement`,
    the share of images that file and float network answer alike, and the integer and float layers that ONNX Runtime
    makes of it. Raises StageError where the backend fails or tuning misses its goal, UsageError for calibration images
    that are not finite.
    """
    source = workspace.parents["source"]
    images = _calibration(workspace, stage.calibration) if stage.mode == "static" else []
    network = load_network(source).eval()
    package = "onnxruntime" if stage.backend == "onnxruntime" else "neural-compressor"
    with tempfile.TemporaryDirectory() as scratch:
        exported, file = Path(scratch) / "exported.onnx", Path(scratch) / FILE
        if stage.backend == "onnxruntime":
            _export(network, source, workspace, exported)
            model, options = _by_onnxruntime(stage, scheme, images, exported)
        else:
            converted, options = _by_neural_compressor(stage, network, images, workspace)
            _export(converted, source, workspace, exported)
            model = onnx.load(exported)
            weights.fold_quantized_weights(model)
        _write(model, like=exported, path=file)
        decided = None
        if stage.mode != "weight-only":
            decided = _decided(stage, scheme, network, workspace, file)
            if decided.kept_float is not None:
                return save_float(workspace, network, decided)
        metrics = _compared(file, network, workspace)
        record = {
            "backend": stage.backend,
            "version": importlib.metadata.version(package),
            "mode": stage.mode,
            "scheme": None if stage.mode == "weight-only" else scheme.name,  # that computes in float
            "options": options,
        }
        with writing(workspace.destination) as directory:
            shutil.copyfile(file, directory / FILE)
            if decided is not None:
                text = json.dumps(decided.model_dump(mode="json"), indent=1) + "\n"
                (directory / DOCUMENT).write_text(text, encoding="utf-8")
            finish(directory, workspace.manifest(source.manifest.model, metrics=metrics, quantization=record))
    return Artifact.open(workspace.destination)


class _Running(nn.Module):
    """A file as a network: images [N, C, H, W] -> {"logits": [N, K]}."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.from_numpy(self.session.run({"image": image.contiguous().numpy()})["logits"])}


def _decided(stage: Any, scheme: Scheme, network: nn.Module, workspace: Workspace, file: Path) -> PrecisionRecord:
    """What the file is worth beside the float network's, on the first profile that is here."""
    record = PrecisionRecord(scheme=scheme.name)
    profile, why = measuring_profile(workspace.profiles)
    if not stage.keep_float or profile is None:
        return record.model_copy(update={"not_measured": why or "keep_float = false"})
    plain = file.with_name("float.onnx")
    _export(network, workspace.parents["source"], workspace, plain)
    record = record.model_copy(update={"measured": compared(plain, file, profile)})
    with contextlib.closing(open_session(file)) as session:
        return verdict(record, workspace, network, _Running(session))


def _by_onnxruntime(
    stage: Any, scheme: Scheme, images: list[Tensor], exported: Path
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    quantized = exported.with_name("quantized.onnx")
    if stage.mode == "weight-only":
        model = onnx.load(exported)
        if not weights.store_weights_as_int8(model):
            raise StageError("no weight is large enough to be stored as int8", where="quantize.mode")
        return model, {}
    if stage.mode == "dynamic":
        options = onnxruntime.quantize_dynamic(exported, quantized, scheme)
    else:
        arrays = [batch.numpy() for batch in images]
        options = onnxruntime.quantize_static(exported, quantized, arrays, scheme, stage.ranges, stage.percentile)
    return onnx.load(quantized), options


def _by_neural_compressor(
    stage: Any, network: nn.Module, images: list[Tensor], workspace: Workspace
) -> tuple[nn.Module, dict[str, Any]]:
    if stage.tune is None:
        options = {"ranges": stage.ranges}
        return neural_compressor.quantize(network, workspace.example, images, options["ranges"]), options
    known, labels = _judged(workspace)

    def accuracy(candidate: nn.Module) -> float:
        with torch.no_grad():
            answers = torch.cat([candidate(part)["logits"].argmax(1) for part in known.split(256)])
        return float((answers == labels).float().mean())

    converted, tuned = neural_compressor.tune(network, workspace.example, images, accuracy, stage.tune.max_drop)
    if not tuned["reached"]:
        lost = tuned["float"] - tuned["trials"][tuned["taken"]]
        what = f"no configuration of Neural Compressor loses at most {stage.tune.max_drop:g} of the accuracy: "
        what += f"the nearest, {tuned['taken']}, loses {lost:.4f}"
        hint = f'max_drop = {math.ceil(lost * 1e4 - 1e-6) / 1e4:g}, or backend = "edgekd" with healing'
        raise StageError(what, where="quantize.tune.max_drop", hint=hint)
    return converted, {"tune": tuned}


def _export(network: nn.Module, source: Artifact, workspace: Workspace, path: Path) -> None:
    export_onnx(
        network,
        path,
        size=workspace.data.size,
        opset=lowest_opset(workspace.profiles),
        classes=workspace.data.classes,
        preprocessing=source.manifest.preprocessing,
    )


def _write(model: onnx.ModelProto, like: Path, path: Path) -> None:
    """Write a checked file with the metadata of the exported one, which tools drop or add to."""
    plain = onnx.load(like, load_external_data=False)
    del model.metadata_props[:], model.graph.value_info[:]
    model.metadata_props.extend(plain.metadata_props)
    model.producer_name, model.producer_version = plain.producer_name, plain.producer_version
    model.graph.doc_string = model.doc_string = ""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"the quantized file is not valid ONNX: {error}", where="quantize.backend") from error
    write_atomically(path, model.SerializeToString())


def _calibration(workspace: Workspace, images: int) -> list[Tensor]:
    """Batches of images [N, C, H, W]. Raises UsageError for NaN and infinity."""
    batches = [batch["image"] for batch in workspace.calibration(images)]
    for index, batch in enumerate(batches):
        if not torch.isfinite(batch).all():
            raise UsageError(f"calibration batch {index} holds NaN or infinity", where="calibration data")
    return batches


def _judged(workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Images, normalised, and labels that tuning judges by: the validation split, where there is one."""
    data = workspace.data
    pool = data.validation if len(data.validation) else data.train
    raw, labels = pool.images[:IMAGES], pool.labels[:IMAGES]
    scaled = raw.float() / 255 if raw.dtype == torch.uint8 else raw
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    known = labels >= 0  # unlabelled rows judge nothing
    return ((scaled - mean) / std)[known], labels[known]


def _compared(file: Path, network: nn.Module, workspace: Workspace) -> dict[str, Any]:
    images, _ = _judged(workspace)
    with contextlib.closing(open_session(file)) as session:
        found = compare(file, network, images, session.run)
    return {
        "float_agreement": found["argmax_agreement"],
        "max_abs_difference": found["max_abs_difference"],
        "images": found["images"],
        "layers": optimised_layers(file),
    }


def export_problems(stage: Any, context: Context) -> Iterator[Problem]:
    """What the stage `export` cannot change about a file that a backend wrote: only pass it on."""
    if not context.finished:
        return
    hint = 'backend = "edgekd" in the quantize stage leaves a network that can be exported in every form'
    if stage.input != "float32":
        yield Problem(f"{context.where}.input", "a backend's file takes float32 images, normalised", hint)
    if not stage.dynamic_batch:
        yield Problem(f"{context.where}.dynamic_batch", "a backend's file takes batches of any size", hint)
    written = lowest_opset(context.profiles)
    if stage.opset not in (None, written):
        what = f"the backend before it writes the profiles' opset {written}, got {stage.opset}"
        yield Problem(f"{context.where}.opset", what, "leave it out, or use a profile with that opset")
