"""What the static rules say of a file, and the list of those rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

__all__ = ["RULES", "Finding", "Rule", "Severity", "found", "summarised"]

Severity = Literal["refused", "float", "note"]
ORT = "ONNX Runtime's quantize_static:"
SYMMETRIC = (
    f'{ORT} activation_type and weight_type QInt8, extra_options={{"ActivationSymmetric": True}}; '
    "PyTorch: observers with dtype torch.qint8 and qscheme per_tensor_symmetric"
)
#: Findings of more nodes than these are counted, not named.
NAMED = 3


class Rule(NamedTuple):
    """One thing that TensorRT does not take or does not run in int8; `seen`: by which TensorRT or in which source."""

    severity: Severity
    what: str
    seen: str
    hint: str


RTX = "TensorRT-RTX 1.7"
PARSER = f"{RTX}; onnx-tensorrt 8.6 and 11"
#: "onnx-tensorrt" is QuantDequantLinearHelper of github.com/onnx/onnx-tensorrt (builtin_op_importers.cpp in 8.6,
#: onnxOpImporters.cpp later) and its docs/operators.md. What is marked TensorRT-RTX was compiled with it.
RULES: dict[str, Rule] = {
    "zero-point": Rule(
        "refused",
        "a zero point that is not 0: TensorRT quantizes symmetrically only",
        PARSER,
        f"{SYMMETRIC}; edgekd: scheme trt-s8s8",
    ),
    "uint8": Rule(
        "refused",
        "uint8: stored weights and inputs are refused; of a QuantizeLinear with zero point 0 or none, TensorRT 9 and "
        "later make int8, and cut off what is above 127 steps",
        PARSER,
        f"{SYMMETRIC}; edgekd: scheme trt-s8s8; give QuantizeLinear an int8 zero point",
    ),
    "int32-bias": Rule(
        "refused",
        "a DequantizeLinear of int32, which ONNX Runtime makes of biases",
        f"{RTX}; TensorRT 10",
        f'{ORT} extra_options={{"QuantizeBias": False}}, so that biases stay float',
    ),
    "data-type": Rule(
        "refused",
        "a constant or quantization in a type that TensorRT has not: int16, uint16, uint32, uint64, uint4, strings",
        RTX,
        "quantize to int8; store indices as int64",
    ),
    "scale": Rule(
        "refused",
        "a scale that is 0, negative, infinite or not a number: a dead channel, or no calibration",
        PARSER,
        "prune dead channels or give their weights a small positive scale; calibrate with more images",
    ),
    "dynamic-scale": Rule(
        "refused",
        "a scale or zero point that is calculated at run time",
        f"{RTX}, whose parser crashes",
        "quantize statically: calibrate, and store scales and zero points as initializers",
    ),
    "scale-size": Rule(
        "refused",
        "as many scales as the axis is long are wanted, and as many zero points",
        PARSER,
        "set `axis` to the axis that the scales belong to",
    ),
    "no-zero-point": Rule(
        "refused",
        "QuantizeLinear and DequantizeLinear without a zero point",
        "onnx-tensorrt 8.6",
        "give them an int8 zero point of 0, or build with TensorRT 10",
    ),
    "half-scale": Rule(
        "refused",
        "float16 scales: the parser reads them as float32",
        "onnx-tensorrt 8.6",
        "use the file with float32 scales and allow fp16 when building; typed fp16 needs TensorRT 10",
    ),
    "quantized-constant": Rule(
        "refused",
        "an int8 constant read by something else than a DequantizeLinear",
        RTX,
        "put the DequantizeLinear right behind the constant and move values after it; "
        "store as float what is to stay float",
    ),
    "mixed-types": Rule(
        "refused",
        "input, weight and bias of a layer in different float types: networks are strongly typed",
        RTX,
        "DequantizeLinear gives the type of its scale: store scales, weights and biases of a layer in one type",
    ),
    "operator": Rule(
        "refused",
        "an operator that the parser does not have",
        f"{RTX}; onnx-tensorrt, docs/operators.md",
        f"{ORT} quant_format=QuantFormat.QDQ instead of QOperator, and no optimised file; others need a plugin",
    ),
    "operator-form": Rule(
        "refused",
        "an operator in a form that the parser does not take: training mode, indices, dilated pooling, antialiasing",
        f"{RTX}; onnx-tensorrt, docs/operators.md",
        "export the network in evaluation mode; replace the layer",
    ),
    "opset": Rule(
        "refused",
        "an ONNX opset above the one that this TensorRT has; operators of a newer form are refused or misread",
        "onnx-tensorrt, docs/operators.md",
        "export with the opset of the profile; onnx.version_converter may lower it",
    ),
    "input-type": Rule(
        "refused",
        "an input or output in a type that TensorRT has not, or uint8 that is not cast at once",
        RTX,
        "feed float32, float16, int32, int64, bool, or uint8 that a Cast reads",
    ),
    "duplicate-names": Rule(
        "refused",
        "two quantizing nodes with one name",
        RTX,
        "give every node a name of its own",
    ),
    "per-channel-activations": Rule(
        "float",
        "activations with one scale per channel",
        f"{RTX}; NVIDIA: activations are quantized per tensor",
        f"{ORT} per_channel is for weights; one scale per activation tensor",
    ),
    "one-element-scale": Rule(
        "float",
        "the scale of a convolution's input as a list of one: it is taken for one per channel",
        RTX,
        "store the scale and zero point as scalars, shape []",
    ),
    "one-side": Rule(
        "float",
        "only one of two factors is quantized",
        RTX,
        "quantize input and weight of every matrix layer, or neither",
    ),
    "weight-axis": Rule(
        "float",
        "scales of a weight along another axis than the output's",
        RTX,
        "axis 0 for Conv and Gemm with transB=1, the last one for MatMul and Gemm; "
        f'{ORT} extra_options={{"QDQOpTypePerChannelSupportToAxis": {{"MatMul": 1}}}}',
    ),
    "transposed-convolution": Rule(
        "float",
        "a transposed convolution",
        RTX,
        "leave it float, or use Resize or DepthToSpace and a convolution",
    ),
    "operator-between": Rule(
        "float",
        "an operator that calculates stands between DequantizeLinear and the layer",
        RTX,
        "move QuantizeLinear and DequantizeLinear behind ReLU, average pooling, resizing and additions",
    ),
    "concat-scales": Rule(
        "float",
        "parts of different scales, or float ones, are concatenated right in front of the layer",
        RTX,
        "quantize what Concat gives, with one scale",
    ),
    "residual-add": Rule(
        "float",
        "an int8 convolution is added to a branch that is not quantized: the branch is stored and read as float",
        f"{RTX}; NVIDIA: quantize the residual input",
        f"quantize the skip branch in front of the addition; {ORT} add 'Add' to op_types_to_quantize",
    ),
    "weight-only": Rule(
        "note",
        "weights of 4 bits: they are stored so, and the product is calculated in float",
        f"{RTX}; NVIDIA: INT4 is for weights only",
        "int8 weights and activations, where the product should be faster",
    ),
    "not-quantized": Rule(
        "note",
        "a matrix layer without quantization in a quantized file",
        RTX,
        "nothing to do where it is to stay float",
    ),
    "bias-behind-pair": Rule(
        "note",
        "a bias is added behind QuantizeLinear and DequantizeLinear of the product: rounded once more than needed",
        RTX,
        "add the bias first; keep it in the convolution or Gemm",
    ),
    "open-axes": Rule(
        "note",
        "an input has open axes beside the batch",
        RTX,
        "export with a fixed size, or give trtexec --minShapes, --optShapes and --maxShapes",
    ),
    "double": Rule(
        "note",
        "float64 is calculated in float32",
        f"{RTX}; onnx-tensorrt, docs/operators.md",
        "export in float32",
    ),
    "int64-range": Rule(
        "note",
        "int64 constants out of the range of int32 are clamped",
        "onnx-tensorrt 8.6, docs/operators.md",
        "keep integers within 32 bits",
    ),
    "plugin": Rule(
        "note",
        "an operator for which TensorRT has a plugin and TensorRT-RTX has none",
        RTX,
        "verify with TensorRT itself, on a machine with a GPU",
    ),
}


@dataclass(frozen=True)
class Finding:
    """What a rule says of one node (of several, once summarised).

    severity: "refused" (TensorRT does not build it, or builds something that calculates other values), "float" (it
    builds and this layer silently is not int8) or "note". node: as TensorRT's parser calls it, "" for the whole file;
    path: the module that it was, or that reads it, where the file has it.
    """

    rule: str
    severity: Severity
    node: str
    what: str
    hint: str
    path: str | None = None


def found(rule: str, node: str, what: str, path: str | None = None, hint: str | None = None) -> Finding:
    """A finding with the severity and hint of its rule."""
    return Finding(rule, RULES[rule].severity, node, what, hint or RULES[rule].hint, path)


def summarised(findings: Sequence[Finding]) -> list[Finding]:
    """One finding per rule and hint, for screens: what the first one says, and how many nodes it holds for."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.rule, finding.hint), []).append(finding)
    return [_merged(group) for group in groups.values()]


def _merged(group: list[Finding]) -> Finding:
    places = list(dict.fromkeys(f.path or f.node for f in group if f.path or f.node))
    first = group[0]
    if len(places) < 2:
        return first
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return replace(first, what=f"{first.what}; the same in {len(places)} layers: {', '.join(places[:NAMED])}{more}")
