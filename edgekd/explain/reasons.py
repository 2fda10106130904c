"""Why ONNX Runtime leaves a layer in float, found from the graph that it was given.

Its rules are those of its QDQ selectors (onnxruntime/core/optimizer/qdq_transformer/selectors_actions), each seen
with ONNX Runtime 1.32 on x86-64.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from .constants import QUANTIZE, Graph, attribute
from .kernels import Kernel
from .stored import StoredLayer

__all__ = ["advice", "placed_for_tensorrt", "reasons"]

NO_KERNEL = {"ConvTranspose", "Attention", "MultiHeadAttention"}
EIGHT_BITS = {"u8", "s8"}
ABSORBED = {"Relu", "Clip"}
MATRIX = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
X86 = {"x86_64", "AMD64", "i686", "i386"}

NOT_QUANTIZED = "not quantized: neither its input nor its weight has Q/DQ"
INPUT = "its input has no Q/DQ"
WEIGHT = "its weight has no Q/DQ"
COMPUTED = "its weight is computed, not a constant: both factors need Q/DQ"
NOT_OUTPUT = "its output has no Q/DQ"
SIGNED = "its activations are signed (s8): on x86 they are fused only where one layer alone reads the tensor"
CHANNELS = "its activations have a scale per channel: integer kernels take one scale"
BIAS = "its bias is not int32 behind a DQ"
BY_CHOICE = (
    "kept float by choice: its weight is float, and its input's equal scales keep the runtime from changing that"
)
MERGED = "the runtime merged it with other layers"


def reasons(layer: StoredLayer, graph: Graph, kernel: Kernel | None, machine: str | None = None) -> list[str]:
    """Why the layer is not computed in integers, in words; empty for one that is. `machine`: default this one's."""
    if kernel is None:
        return [MERGED]
    if kernel.precision != "float":
        return []
    if layer.x is None and layer.w is None:
        return [NOT_QUANTIZED]
    if layer.w is None and layer.x is not None and layer.x.per_channel and layer.x.same_scales:
        return [BY_CHOICE]
    found = []
    if layer.op in NO_KERNEL:
        found.append(f"ONNX Runtime has no integer {layer.op} on CPUs")
    if layer.x is None:
        found.append(INPUT)
    behind = _output_problem(layer, graph)
    whole = layer.x is not None and behind is None
    # A constant float weight or bias between quantized tensors is quantized by ONNX Runtime itself, but of MatMul's.
    itself = whole and layer.op in {"Conv", "Gemm"} and layer.weight is not None
    if layer.w is None and not itself:
        found.append(WEIGHT if layer.weight is not None else COMPUTED)
    wrong = sorted({i.dtype for i in (layer.x, layer.w) if i is not None and i.dtype not in EIGHT_BITS})
    if wrong:
        found.append(f"its integers are {' and '.join(wrong)}: the kernels take 8 bits")
    if layer.x is not None and layer.x.per_channel:
        found.append(CHANNELS)
    if layer.op == "Conv" and layer.x is not None and behind is not None:
        found.append(behind)
    if layer.bias not in ("none", "int32") and not (layer.bias == "float" and whole):
        found.append(BIAS)
    if layer.op == "Gemm" and not (attribute(layer.node, "alpha", 1.0) == attribute(layer.node, "beta", 1.0) == 1.0):
        found.append("its factors alpha and beta are not 1")
    if not found and (machine or platform.machine()) in X86 and layer.x is not None and layer.x.dtype == "s8":
        found.append(SIGNED)
    return found or ["all of it is quantized, yet this version of ONNX Runtime does not fuse it here"]


def _output_problem(layer: StoredLayer, graph: Graph) -> str | None:
    """What keeps the Q behind a layer from being absorbed by it; None for nothing."""
    name, absorbed = layer.node.output[0], None
    while True:
        if name in graph.outputs:
            return f"{NOT_OUTPUT}: it is an output of the network"
        readers = graph.readers.get(name, [])
        quantizers = [r for r in readers if r.op_type == QUANTIZE]
        others = sorted({r.op_type for r in readers if r.op_type != QUANTIZE})
        if quantizers and others:
            return f"its output is read in float too, by {', '.join(others)}"
        if len(quantizers) > 1:
            return "its output is quantized more than once, with different scales"
        if quantizers:
            return _absorption_problem(absorbed, quantizers[0], graph)
        if len(readers) != 1 or readers[0].op_type not in ABSORBED or absorbed is not None:
            break
        absorbed = readers[0]
        name = absorbed.output[0]
    if len(readers) == 1:
        behind = graph.readers.get(readers[0].output[0], [])
        if readers[0].op_type not in MATRIX and behind and all(r.op_type == QUANTIZE for r in behind):
            return f"{readers[0].op_type} stands between its output and the Q"
    return f"{NOT_OUTPUT}: {', '.join(others)} reads it in float" if others else NOT_OUTPUT


def _absorption_problem(absorbed: Any, quantizer: Any, graph: Graph) -> str | None:
    """A ReLU goes away when no integer of the Q behind it stands for a negative value."""
    integers = graph.integers_of(quantizer)
    if absorbed is None or absorbed.op_type != "Relu" or integers is None or integers.zero_point is None:
        return None
    zero, lowest = int(integers.zero_point.min()), integers.limits[0]
    return None if zero == lowest else f"the Relu behind it needs a Q with zero point {lowest}, not {zero}"


def placed_for_tensorrt(layers: Sequence[StoredLayer]) -> bool:
    """Whether the Q/DQ are where TensorRT wants them: symmetric, inputs and weights, and hardly an output."""
    quantized = [x for x in layers if x.op == "Conv" and x.x is not None and x.w is not None]
    symmetric = all(x.x is not None and x.x.dtype == "s8" and x.x.symmetric for x in quantized)
    return bool(quantized) and symmetric and all(x.bias in ("none", "float") for x in quantized)


def advice(layers: Sequence[StoredLayer], why: Sequence[Sequence[str]]) -> str | None:
    """One sentence: what to change so that more of the file runs in integers; None where nothing is left."""
    given = [text for texts in why for text in texts]
    if not given:
        return None
    if all(text == NOT_QUANTIZED for text in given):
        if len(given) < len(layers):
            return "quantize the layers that have no Q/DQ, if they cost time"
        return "this is a float file: edgekd quantize, with the profile of the device that runs it"
    output = any(word in text for text in given for word in (NOT_OUTPUT, "stands between", "needs a Q", "in float too"))
    if output and placed_for_tensorrt(layers):
        return 'this file is placed for TensorRT; for ONNX Runtime on x86 quantize with scheme = "x86-u8s8"'
    if SIGNED in given:
        return 'quantize with unsigned activations: scheme = "x86-u8s8"'
    if output:
        return "put a Q/DQ pair behind each convolution, after its batch norm (folded) and ReLU, and nothing in between"
    if INPUT in given or WEIGHT in given:
        return "quantize both input and weight of each layer"
    return None
