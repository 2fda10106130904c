"""Rules on operators, opsets, names, inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from ..onnx_edit import attribute, opset_of
from .findings import Finding, found
from .graph import DEQUANTIZE, QUANTIZE, Graph, named, type_name

__all__ = ["file_findings", "missing_operator", "operator_findings"]

T = TensorProto
#: Operators of ONNX that the parser does not have: docs/operators.md of onnx-tensorrt, and TensorRT-RTX 1.7 asked.
MISSING = {
    *("AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
    *("CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT", "Det"),
    *("DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix"),
    *("Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement"),
    *("QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty"),
    *("SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss"),
    *("SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique"),
}
#: The first version that has the operator: changelog and docs/operators.md of onnx-tensorrt.
SINCE = {
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), (10, 4)),
    "STFT": (10, 5),
    "Hardmax": (9, 2),
    "DeformConv": (10, 1),
}
#: TensorRT-RTX 1.7 has no plugin for them.
PLUGINS = {"NonZero", "RoiAlign", "NonMaxSuppression", "DeformConv", "LinearAttention"}
#: Operators beyond ONNX that the parser knows, whatever their domain.
EXTRA = {
    *("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4QuantizeLinear", "TRT_INT4DequantizeLinear"),
    *("TRT_FP4DynamicQuantize", "ImageScaler", "ParametricSoftplus", "ScaledTanh", "MatMulNBits"),
    *("MultiHeadAttention", "GroupQueryAttention", "SimplifiedLayerNormalization"),
}
STANDARD = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
#: TensorRT -> highest opset. Source: docs/operators.md of onnx-tensorrt; for 10.6 the ONNX release it is built with;
#: for 11 docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html
OPSETS = {(8, 5): 17, (9,): 19, (10,): 20, (10, 6): 22, (10, 15): 24, (11,): 25}
INPUTS = {T.FLOAT, T.FLOAT16, T.BFLOAT16, T.DOUBLE, T.INT8, T.UINT8, T.INT32, T.INT64, T.BOOL}
#: What reads an input of uint8; a DequantizeLinear that does has a rule of its own.
BYTE_READERS = {"Cast", "Equal", "Shape", DEQUANTIZE}
INT64 = np.iinfo(np.int64)


def _training(node: NodeProto, graph: Graph) -> bool:
    if node.op_type == "BatchNormalization":
        return bool(attribute(node, "training_mode", 0))
    if len(node.input) < 3 or not node.input[2]:
        return False
    mode = graph.value(node.input[2])
    return bool(mode.any()) if mode is not None else node.input[2] in graph.at_run_time


def _dilated(node: NodeProto, graph: Graph) -> bool:
    return any(d != 1 for d in attribute(node, "dilations", []))


def _second_output(node: NodeProto, graph: Graph) -> bool:
    return len([name for name in node.output if name]) > 1


#: What of an operator is not taken: (operators, whether a node is so, what is said).
FORMS: list[tuple[set[str], Callable[[NodeProto, Graph], bool], str]] = [
    ({"BatchNormalization", "Dropout"}, _training, "is in training mode"),
    ({"MaxPool"}, _second_output, "gives indices, too"),
    ({"LayerNormalization"}, _second_output, "gives mean or deviation, too"),
    ({"MaxPool", "AveragePool", "LpPool"}, _dilated, "is dilated"),
    ({"LpPool"}, lambda node, graph: attribute(node, "p", 2) not in (1, 2), "has another norm than 1 or 2"),
    ({"Resize"}, lambda node, graph: bool(attribute(node, "antialias", 0)), "wants antialiasing"),
    (
        {"ScatterND"},
        lambda node, graph: attribute(node, "reduction", b"none") != b"none",
        "wants a reduction",
    ),
    (
        {"Cast"},
        lambda node, graph: attribute(node, "to") in {T.INT16, T.UINT16, T.UINT32, T.UINT64},
        "casts to a type that TensorRT has not",
    ),
    (
        {name for name in STANDARD if name.startswith("Reduce")},
        lambda node, graph: len(node.input) > 1 and node.input[1] in graph.at_run_time,
        "has axes that are calculated at run time",
    ),
]


def missing_operator(node: NodeProto, version: tuple[int, ...]) -> bool:
    """Whether the parser has no operator of this name; it does not look at domains."""
    if node.op_type in MISSING or SINCE.get(node.op_type, (0,)) > version:
        return True
    return node.op_type not in STANDARD | EXTRA


def operator_findings(graph: Graph, version: tuple[int, ...]) -> Iterator[Finding]:
    """Operators that the parser has not, or not in this form."""
    for node in graph.nodes:
        if missing_operator(node, version):
            domain = f" of {node.domain}" if node.domain else ""
            yield found("operator", named(node), f"operator {node.op_type}{domain} is not known", graph.path(node))
            continue
        if node.op_type in PLUGINS or (
            node.op_type == "ScatterElements" and attribute(node, "reduction", b"none") != b"none"
        ):
            yield found("plugin", named(node), f"operator {node.op_type} is a plugin", graph.path(node))
        for operators, wrong, what in FORMS:
            if node.op_type in operators and wrong(node, graph):
                yield found("operator-form", named(node), f"{node.op_type} {what}", graph.path(node))


def file_findings(model: ModelProto, graph: Graph, version: tuple[int, ...]) -> Iterator[Finding]:
    """Opset, names, inputs, outputs and wide types of a file."""
    highest = next((opset for since, opset in sorted(OPSETS.items(), reverse=True) if version >= since), 17)
    if opset_of(model) > highest:
        told = ".".join(map(str, version))
        yield found("opset", "", f"the file is of opset {opset_of(model)}, TensorRT {told} has {highest}")
    names = Counter(node.name for node in graph.nodes if node.name and node.op_type in (QUANTIZE, DEQUANTIZE))
    for name, count in names.items():
        if count > 1:
            yield found("duplicate-names", name, f"{count} quantizing nodes are called {name}")
    for value in graph.inputs:
        yield from _input(value, graph)
    for value in model.graph.output:
        dtype = value.type.tensor_type.elem_type
        if dtype not in INPUTS | {0}:
            yield found("input-type", value.name, f"output {value.name} is {type_name(dtype)}")
    yield from _constants(graph, version)
    yield from _bytes(graph)


def _input(value: ValueInfoProto, graph: Graph) -> Iterator[Finding]:
    dtype, readers = value.type.tensor_type.elem_type, graph.readers.get(value.name, [])
    if dtype not in INPUTS:
        yield found("input-type", value.name, f"input {value.name} is {type_name(dtype)}")
    elif dtype == T.UINT8 and (others := [r for r in readers if r.op_type not in BYTE_READERS]):
        yield found("input-type", named(others[0]), f"{others[0].op_type} reads input {value.name}, which is uint8")
    elif dtype == T.DOUBLE:
        yield found("double", value.name, f"input {value.name} is float64")
    if open_axes := [axis for axis, size in enumerate(graph.shape(value.name) or []) if size is None and axis]:
        yield found("open-axes", value.name, f"input {value.name} leaves axes {', '.join(map(str, open_axes))} open")


def _constants(graph: Graph, version: tuple[int, ...]) -> Iterator[Finding]:
    for name, tensor in graph.tensors.items():
        readers = graph.readers.get(name, [])
        if tensor.data_type == T.DOUBLE and readers:
            yield found("double", named(readers[0]), f"constant {name} is float64", graph.path(readers[0]))
        if tensor.data_type == T.INT64 and version < (9,) and readers:
            values = graph.value(name)
            # Slice writes "to the end" as the largest integer, which clamping does not change.
            wide = [] if values is None else [v for v in values.ravel() if abs(int(v)) > 2**31 and v not in _ENDS]
            if wide:
                yield found("int64-range", named(readers[0]), f"constant {name} holds {wide[0]}")


_ENDS = {INT64.max, INT64.min, INT64.min + 1, INT64.max - 1}


def _bytes(graph: Graph) -> Iterator[Finding]:
    """uint8 is a type of inputs and outputs alone: a Cast to it must give an output of the file."""
    for node in graph.nodes:
        if node.op_type == "Cast" and attribute(node, "to") == T.UINT8 and node.output[0] not in graph.outputs:
            yield found("input-type", named(node), f"{named(node)} casts to uint8 within the network")
