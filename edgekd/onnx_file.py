"""ONNX files: write one from a float or converted network, compare it with the network, look into it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxscript
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import __version__
from .artifact import Preprocessing, write_atomically
from .errors import StageError, UsageError
from .onnx_edit import opset_of
from .onnx_fusible import fusible
from .onnx_opset import downgraded
from .quant.quiet import quiet
from .runtimes.metadata import parse_metadata
from .runtimes.onnx_model import read_onnx as read
from .runtimes.optimised import FLOAT_KERNELS, INTEGER_KERNELS, optimised_graph

__all__ = ["compare", "export_onnx", "optimised_layers", "read", "read_metadata", "stored_bytes", "stored_precision"]

#: TensorRT 8.6 takes no newer one.
LOWEST_OPSET = 17
#: PyTorch's exporter writes this opset by itself; its conversion to an older one leaves the file as it was.
EXPORTED_OPSET = 18
#: protobuf's limit on one file.
LARGEST = 2**31 - 1
MOST_IMAGES = 65536
#: Of the largest logit: a file that differs by less and answers otherwise has chosen between classes that are level.
TIE = 0.03
HALVES = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}

#: Operators behind which a constant is still the same weight.
STILL = {"DequantizeLinear", "Transpose", "Identity", "Cast", "Reshape"}

Translations = dict[Callable[..., Any], Callable[..., Any]]


class _Deployed(nn.Module):
    """What a file computes: an image, normalised here if it comes as bytes -> logits alone."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing

    def forward(self, image: Tensor) -> Tensor:
        if self.preprocessing is not None:
            image = _normalised(image, self.preprocessing)
        outputs = self.network(image)
        return outputs["logits"] if isinstance(outputs, dict) else outputs


def _normalised(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (image.float() / 255 - mean) / std


def export_onnx(
    module: nn.Module,
    path: Path,
    *,
    size: list[int],
    opset: int,
    classes: list[str],
    preprocessing: Preprocessing,
    input: Literal["float32", "uint8"] = "float32",
    dynamic_batch: bool = True,
) -> None:
    """Write `module` (float, or what `quant.convert` returned) as one checked ONNX file.

    size: [C, H, W]. The file takes "image" [batch, C, H, W] and gives "logits" [batch, K]; with input="uint8" the
    image is raw bytes 0..255 and the normalisation is part of the graph; without dynamic_batch the batch is 1.
    Version, preprocessing and class names go into its metadata. Raises UsageError for an opset that cannot be
    written, StageError when the network cannot be exported or the result is not valid ONNX.
    """
    exported = max(opset, EXPORTED_OPSET)
    if not LOWEST_OPSET <= opset <= onnx.defs.onnx_opset_version() or not hasattr(onnxscript, f"opset{exported}"):
        raise UsageError(
            f"ONNX opset {opset} cannot be written",
            where="opset",
            hint=f"choose one from {LOWEST_OPSET} to {_highest_opset()}",
        )
    deployed = _Deployed(module, preprocessing if input == "uint8" else None).eval()
    # Two images, as torch.export takes an axis of length 1 for a constant.
    example = torch.zeros(2 if dynamic_batch else 1, *size, dtype=torch.uint8 if input == "uint8" else torch.float32)
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        with quiet():
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=exported,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes={"image": {0: batch}} if dynamic_batch else None,
                custom_translation_table=_translations(exported),
            )
        if program is None:
            raise RuntimeError("the exporter returned nothing")
        model = program.model_proto
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise StageError(
            f"the network cannot be exported to ONNX: {first}",
            where=type(module).__name__,
            hint="use operators that ONNX has, and no branches on tensor values",
        ) from error
    _name_layers(model, getattr(module, "layers", []))
    _clean(model)
    fusible(model)
    model.producer_name, model.producer_version = "edgekd", __version__
    onnx.helper.set_model_props(
        model,
        {
            "edgekd.version": __version__,
            "preprocessing": preprocessing.model_dump_json(),
            "classes": json.dumps(classes),
            "input": input,
        },
    )
    model = downgraded(model, opset)
    _check(model, opset)
    write_atomically(path, model.SerializeToString())


def _highest_opset() -> int:
    return max(n for n in range(EXPORTED_OPSET, onnx.defs.onnx_opset_version() + 1) if hasattr(onnxscript, f"opset{n}"))


def _translations(opset: int) -> Translations:
    """The quantized_decomposed operators of a converted network as QuantizeLinear and DequantizeLinear.

    Built for one opset: operators of another one would mix versions in the file, which the exporter then upgrades.
    """
    op = getattr(onnxscript, f"opset{opset}")
    operators = torch.ops.quantized_decomposed
    if not hasattr(operators, "quantize_per_tensor"):  # torchao, which defines them, has made no network here
        return {}

    def constants(scale: float, zero_point: int, dtype: int) -> tuple[Any, Any]:
        return (
            op.Constant(value=onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [scale])),
            op.Constant(value=onnx.helper.make_tensor("zero_point", int(dtype), [], [zero_point])),
        )

    def quantize(x: Any, scale: float, zero_point: int, low: int, high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, *constants(scale, zero_point, dtype))

    def dequantize(x: Any, scale: float, zero_point: int, low: int, high: int, dtype: int, **_: Any) -> Any:
        return op.DequantizeLinear(x, *constants(scale, zero_point, dtype))

    def quantize_channels(x: Any, scales: Any, zero_points: Any, axis: int, low: int, high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, scales, op.Cast(zero_points, to=int(dtype)), axis=axis)

    def dequantize_channels(
        x: Any, scales: Any, zero_points: Any, axis: int, low: int, high: int, dtype: int, **_: Any
    ) -> Any:
        return op.DequantizeLinear(x, scales, op.Cast(zero_points, to=int(dtype)), axis=axis)

    return {
        operators.quantize_per_tensor.default: quantize,
        operators.dequantize_per_tensor.default: dequantize,
        operators.quantize_per_channel.default: quantize_channels,
        operators.dequantize_per_channel.default: dequantize_channels,
    }


def _name_layers(model: onnx.ModelProto, paths: Sequence[str]) -> None:
    """Call matrix layers by their module paths, which profilers, viewers and `edgekd show` then tell.

    `paths` are those of the layers with a weight, in order; what they do not know is in the exporter's notes.
    """
    nodes = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name for tensor in model.graph.initializer}

    def constant(name: str) -> bool:
        node = nodes.get(name)
        return name in weights if node is None else node.op_type in STILL and constant(node.input[0])

    layers = [n for n in model.graph.node if n.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}]
    weighted = [node for node in layers if constant(node.input[1])]
    known = dict(zip(map(id, weighted), paths, strict=True)) if len(paths) == len(weighted) else {}
    taken = {node.name for node in model.graph.node}
    for node in layers:
        path = known.get(id(node)) or _noted_path(node)
        if path and path not in taken:
            node.name = path
            taken.add(path)


def _noted_path(node: onnx.NodeProto) -> str:
    """A weight's name tells more than the exporter's scopes, which are those of a batch norm that was folded in."""
    name = node.input[1].removeprefix("network.")
    if name.endswith(".weight"):
        return name.removesuffix(".weight")
    notes = {p.key: p.value for p in node.metadata_props}
    scopes = re.findall(r"'network\.([^']+)'", notes.get("pkg.torch.onnx.name_scopes", ""))
    return scopes[-1] if scopes and scopes[-1].partition(".")[0] != "network" else ""


def _clean(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes about itself: stack traces, with the paths of whoever ran it, and source modules."""
    del model.metadata_props[:]
    model.doc_string = ""
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            graphs += [a.g for a in node.attribute if a.HasField("g")]
        values = [*graph.value_info]
        if isinstance(graph, onnx.GraphProto):
            values += [*graph.input, *graph.output, *graph.initializer]
        for value in values:
            value.doc_string = ""
            del value.metadata_props[:]


def _check(model: onnx.ModelProto, opset: int) -> None:
    written = opset_of(model)
    if written != opset:
        raise StageError(f"the exporter wrote opset {written} instead of {opset}", where="opset")
    if model.ByteSize() > LARGEST:
        raise StageError("the network is larger than 2 GB, too large for one ONNX file", where="export")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"the exported file is not valid ONNX: {error}", where="export") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """{"classes": [...], "preprocessing": {...}, "input": "float32"|"uint8", "version": ...} as far as the file says.

    {} for files that another tool wrote. Raises UsageError when it is no ONNX file.
    """
    return parse_metadata({p.key: p.value for p in read(Path(path)).metadata_props})


def compare(
    path: Path,
    module: nn.Module,
    images: Tensor,
    session_run: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]],
) -> dict[str, float]:
    """The file's logits, as `session_run({"image": ...})` gives them, against those of `module` on the same images.

    images: [N, C, H, W] float, normalised. For a file that takes bytes they are turned back into bytes, and the
    module sees what those bytes stand for. Returns max_abs_difference, max_abs_logit (of the module),
    argmax_agreement (0..1), images, and ties: images whose answer is another, though all their logits are within 3 %
    of max_abs_logit of the module's.
    Raises UsageError without images, StageError when the shapes of the outputs differ.
    """
    model = read(Path(path))
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    chunk = fixed or 256
    feed: Tensor = images
    if model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        preprocessing = Preprocessing.model_validate(read_metadata(path)["preprocessing"])
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        feed = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        images = _normalised(feed, preprocessing)
    whole = len(images) - len(images) % fixed if fixed else len(images)
    module.eval()
    difference, largest, seen = 0.0, 0.0, 0
    apart: list[float] = []  # of images with another answer
    if not whole:
        raise UsageError(
            f"{len(images)} images are too few to compare with", where="comparison", hint=f"give at least {fixed or 1}"
        )
    for start in range(0, whole, chunk):
        part = images[start : min(start + chunk, whole)]
        with torch.no_grad():
            outputs = module(part)
        expected = (outputs["logits"] if isinstance(outputs, dict) else outputs).float().cpu().numpy()
        found = session_run({"image": feed[start : start + len(part)].contiguous().cpu().numpy()})["logits"]
        if found.shape != expected.shape:
            raise StageError(f"the file gives logits {list(found.shape)}, the network {list(expected.shape)}")
        # np.maximum, as max(0.0, nan) is 0.0.
        difference = float(np.maximum(difference, np.abs(found - expected).max()))
        largest = float(np.maximum(largest, np.abs(expected).max()))
        apart += np.abs(found - expected).max(1)[found.argmax(1) != expected.argmax(1)].tolist()
        seen += len(part)
    return {
        "max_abs_difference": difference,
        "max_abs_logit": largest,
        "argmax_agreement": 1 - len(apart) / seen,
        "images": seen,
        "ties": sum(d <= TIE * largest for d in apart),  # written so that NaN is none
    }


def optimised_layers(path: Path) -> dict[str, int]:
    """{"int8": n, "float": m}: matrix layers that ONNX Runtime computes in integers and in float on this machine.

    Counted in the graph after its own optimisation. Raises UsageError when it is no ONNX file, StageError when
    ONNX Runtime cannot load it.
    """
    read(Path(path))
    kinds = Counter(node.op_type for node in optimised_graph(Path(path)).node)
    return {
        "int8": sum(n for kind, n in kinds.items() if kind in INTEGER_KERNELS),
        "float": sum(n for kind, n in kinds.items() if kind in FLOAT_KERNELS),
    }


def stored_precision(path: Path) -> str:
    """What an ONNX file says of its layers: fp32, fp16, bf16, or int8, with +fp16 where the rest of it is typed so."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {a.t.data_type for node in graph.node if node.op_type == "Constant" for a in node.attribute}
    half = next((name for kind, name in HALVES.items() if kind in types), "")
    if any(kind in ("QuantizeLinear", "DequantizeLinear") or kind in INTEGER_KERNELS for kind in kinds):
        return f"int8+{half}" if half else "int8"
    return half or "fp32"


def stored_bytes(path: Path) -> int:
    """The size of an ONNX file and of the files beside it that hold its weights."""
    graph = onnx.load(path, load_external_data=False).graph
    places = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    return path.stat().st_size + sum((path.parent / place).stat().st_size for place in places)
