"""ONNX Runtime's own quantization of a float ONNX file: static and dynamic."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...errors import StageError
from ..quiet import quiet
from ..scheme import Scheme

__all__ = ["METHODS", "quantize_dynamic", "quantize_static"]

#: A stage's `ranges` -> ONNX Runtime's calibration method.
METHODS = {"min-max": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
Array = np.ndarray[Any, Any]


def quantize_static(
    source: Path,
    destination: Path,
    batches: Sequence[Array],
    scheme: Scheme,
    ranges: str = "min-max",
    percentile: float = 99.99,
) -> dict[str, Any]:
    """Write the float file `source` with Q/DQ pairs whose ranges come from `batches` of images [N, C, H, W].

    Batch norms are folded and shapes inferred first (`quant_pre_process`); weights get one scale per channel. In a
    network with attention only the products with weights become integers: quantizing all else made a small ViT 0.85x
    as fast as in float, this 1.19x (one thread, AVX-512 VNNI). `percentile`: (100 - this) % of the values are left out
    at each end where `ranges` asks for percentiles. Returns the options that were used; raises StageError
    where ONNX Runtime fails.
    """
    from onnxruntime import quantization

    unsigned = scheme.activation_dtype == "uint8"
    options: dict[str, Any] = {
        "ActivationSymmetric": scheme.activation_symmetric,
        # Its percentiles are symmetric by default, which wastes half the range behind a ReLU.
        "CalibTensorRangeSymmetric": False,
        # One batch at a time: histograms would keep every activation of all of them.
        "CalibStridedMinMax": 1,
        # Of both ends together.
        "CalibPercentile": 100 - 2 * (100 - percentile),
    }
    with tempfile.TemporaryDirectory() as scratch:
        prepared = _prepared(source, Path(scratch) / "prepared.onnx")
        chosen = _products_with_weights(onnx.load(prepared))
        if chosen:
            options["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
        _run(
            quantization.quantize_static,
            str(prepared),
            str(destination),
            _Images(batches),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=scheme.weight_bits == 7,
            activation_type=quantization.QuantType.QUInt8 if unsigned else quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[METHODS[ranges]],
            op_types_to_quantize=["MatMul", "Gemm"] if chosen else None,
            nodes_to_quantize=chosen or None,
            extra_options=options,
        )
    record: dict[str, Any] = {"activations": scheme.activation_dtype, "ranges": ranges}
    if ranges == "percentile":
        record["percentile"] = percentile
    return {**record, "only": "weights' products"} if chosen else record


def quantize_dynamic(source: Path, destination: Path, scheme: Scheme) -> dict[str, Any]:
    """Write the float file with int8 weights in its matrix products; inputs get their range at every call.

    Convolutions stay float: dynamic ones (ConvInteger) were measured 14 to 25 times slower than float, while the
    products alone made a small ViT 1.3x faster. Of the scheme only the weights' bits count: ranges at every call are
    always uint8. Raises StageError where ONNX Runtime fails.
    """
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as scratch:
        prepared = _prepared(source, Path(scratch) / "prepared.onnx")
        _run(
            quantization.quantize_dynamic,
            str(prepared),
            str(destination),
            op_types_to_quantize=["MatMul"],  # Gemm becomes MatMul and Add
            per_channel=True,
            reduce_range=scheme.weight_bits == 7,
            weight_type=quantization.QuantType.QInt8,
        )
    return {"activations": "uint8", "only": "matrix products"}


class _Images:
    """What ONNX Runtime reads calibration images from: a `CalibrationDataReader`."""

    def __init__(self, batches: Sequence[Array]) -> None:
        self.batches = batches
        self.set_range(0, len(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left: Iterator[Array] = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.left, None)
        return None if batch is None else {"image": batch}


def _prepared(source: Path, destination: Path) -> Path:
    """Batch norms folded, constants calculated, shapes inferred."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        with quiet():
            quant_pre_process(str(source), str(destination))
    except Exception:  # its symbolic shapes do not know every operator; the plain ones do for most networks
        _run(quant_pre_process, str(source), str(destination), skip_symbolic_shape=True)
    return destination


def _products_with_weights(model: onnx.ModelProto) -> list[str]:
    """Of a network with attention, the matrix products of which one side is a weight; else none."""
    if all(node.op_type != "Softmax" for node in model.graph.node):
        return []
    weights = {tensor.name for tensor in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]


def _run(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    try:
        with quiet():
            call(*args, **options)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise StageError(
            f"ONNX Runtime cannot quantize this network: {first}",
            where="quantize.backend",
            hint='backend = "edgekd" quantizes it by other means',
        ) from error
