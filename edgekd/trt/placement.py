"""Rules on where quantization stands: which layers TensorRT silently leaves in float.

Each was compiled with TensorRT-RTX 1.7, and is what it does. NVIDIA's advice on placement: "Explicit Quantization" in
docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from onnx import NodeProto, TensorProto

from .findings import Finding, found
from .graph import DEQUANTIZE, MATRIX, QUANTIZE, Array, Graph, attribute, named

__all__ = ["placement_findings"]

#: TensorRT calculates these on integers: what they give is quantized as what they read.
MOVES = {
    *("Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather"),
    *("Expand", "Tile", "DepthToSpace", "SpaceToDepth", "MaxPool", "GlobalMaxPool", "ReduceMax", "Neg", "Cast", "Pad"),
}
SCALES = {"Mul", "Div"}
#: Whether these move a scale's axis elsewhere is not looked into.
RESHAPES = MOVES - {"Identity", "Dropout", "Slice", "Pad", "MaxPool", "Neg", "Cast"}
#: As far as one looks behind an operator that calculates.
FAR = 4


class Source(NamedTuple):
    """Where a factor of a product comes from: `dequantize` is None where it is float, `last` what gives it then."""

    dequantize: NodeProto | None
    between: list[NodeProto]
    last: NodeProto | None
    concat: NodeProto | None = None


def placement_findings(graph: Graph) -> Iterator[Finding]:
    """Layers that are quantized in part, or in a way that TensorRT calculates in float."""
    quantized = any(node.op_type == DEQUANTIZE for node in graph.nodes)
    for node in graph.nodes if quantized else []:
        if node.op_type in MATRIX and len(node.input) > 1:
            yield from _matrix(graph, node)
        elif node.op_type == "Add" and len(node.input) == 2:
            yield from _residual(graph, node)
            yield from _late_bias(graph, node)


def _source(graph: Graph, name: str, reader: NodeProto) -> Source:
    between: list[NodeProto] = []
    while (node := graph.producer.get(name)) is not None:
        if node.op_type == DEQUANTIZE:
            return Source(node, between, node)
        if node.op_type == "Concat":
            sources = [_source(graph, part, node) for part in node.input]
            first = sources[0].dequantize
            same = first is not None and all(_equal_scale(graph, s.dequantize, first) for s in sources)
            return Source(first if same else None, between, node, node)
        if node.op_type not in MOVES | SCALES or not _moves(graph, node, between[-1] if between else reader):
            break
        between.append(node)
        name = next((n for n in node.input if n in graph.producer), node.input[0])
    return Source(None, between, node)


def _moves(graph: Graph, node: NodeProto, reader: NodeProto) -> bool:
    if node.op_type in SCALES:  # a constant factor goes into the scale: any of a weight, one of an activation
        constant = [name for name in node.input if name not in graph.at_run_time]
        value = graph.value(constant[0]) if constant else None
        return len(constant) == 2 or (value is not None and value.size == 1)
    if node.op_type == "Pad" and attribute(node, "mode", b"constant") == b"constant":
        value = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        widths = graph.value(node.input[1]) if len(node.input) > 1 else None
        if value is None or value.any() or widths is None or reader.op_type not in ("Conv", "Add"):
            return False
        # Zeros around an image become padding of the convolution; of channels they do not.
        return reader.op_type == "Add" or not widths.reshape(2, -1)[:, :2].any()
    return True


def _equal_scale(graph: Graph, one: NodeProto | None, other: NodeProto) -> bool:
    if one is None:
        return False
    first, second = graph.value(one.input[1]), graph.value(other.input[1])
    return first is not None and second is not None and first.shape == second.shape and bool((first == second).all())


def _matrix(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    name, path = named(node), graph.path(node)
    sources = [_source(graph, factor, node) for factor in node.input[:2]]
    quantized = [source.dequantize for source in sources]
    if quantized == [None, None]:
        activations = all(factor in graph.at_run_time for factor in node.input[:2])
        product = f"{node.op_type} of two activations" if activations else node.op_type
        yield found("not-quantized", name, f"{product} is float in a quantized file", path)
        return
    if None in quantized:
        place = quantized.index(None)
        yield _one_side(graph, node, sources[place], place, path)
        return
    if any(graph.dtype(d.input[0]) in (TensorProto.INT4, TensorProto.UINT4) for d in quantized if d is not None):
        yield found("weight-only", name, f"{node.op_type} has weights of 4 bits", path)
    elif node.op_type == "ConvTranspose":
        yield found("transposed-convolution", name, "it is calculated in float though both factors are int8", path)
    else:
        for place, source in enumerate(sources):
            yield from _scales(graph, node, source, place, path)


def _one_side(graph: Graph, node: NodeProto, source: Source, place: int, path: str | None) -> Finding:
    name, part = named(node), ("input", "weight")[place]
    other = ("weight", "input")[place]
    if node.op_type in ("MatMul", "Gemm"):
        part, other = (f"factor {side}" for side in ((1, 2), (2, 1))[place])
    if _integers(graph, node.input[1 - place], node):
        return found("weight-only", name, f"{node.op_type} has weights of 4 bits", path)
    if source.concat is not None:
        sources = [_source(graph, i, source.concat) for i in source.concat.input]
        if any(s.dequantize is not None for s in sources):
            why = "of different scales" if all(s.dequantize is not None for s in sources) else "some of them float"
            return found("concat-scales", name, f"{named(source.concat)} gives it parts {why}", path)
    if source.last is not None and _dequantized_behind(graph, source.last):
        what = f"{named(source.last)} ({source.last.op_type}) stands between its {part} and DequantizeLinear"
        return found("operator-between", name, what, path)
    return found("one-side", name, f"its {other} is quantized, its {part} is float", path)


def _integers(graph: Graph, name: str, node: NodeProto) -> bool:
    dequantize = _source(graph, name, node).dequantize
    return dequantize is not None and graph.dtype(dequantize.input[0]) in (TensorProto.INT4, TensorProto.UINT4)


def _dequantized_behind(graph: Graph, node: NodeProto) -> bool:
    """Whether, behind a few operators that are no layers themselves, there is a DequantizeLinear."""
    names = list(node.input)
    for _ in range(FAR):
        nodes = [graph.producer[n] for n in names if n in graph.producer and n in graph.at_run_time]
        if any(n.op_type == DEQUANTIZE for n in nodes):
            return node.op_type not in MATRIX
        names = [n for before in nodes if before.op_type not in MATRIX for n in before.input]
    return False


def _scales(graph: Graph, node: NodeProto, source: Source, place: int, path: str | None) -> Iterator[Finding]:
    """Of one factor of a product whose factors are both int8."""
    assert source.dequantize is not None
    scale = graph.value(source.dequantize.input[1])
    if scale is None or scale.ndim != 1:  # one for the whole tensor, or one per block
        return
    convolution, name = node.op_type == "Conv", named(node)
    if convolution and place == 0:
        if scale.size == 1:
            yield found("one-element-scale", name, f"{named(source.dequantize)} has a scale of shape [1]", path)
        else:
            what = f"{named(source.dequantize)} has {scale.size} scales for its input"
            yield found("per-channel-activations", name, what, path)
        return
    axis = _axis(graph, source, scale)
    if axis is None:
        return
    rank = _rank(graph, source, node.input[place])
    if convolution:
        wrong, wanted = axis not in (0, None if rank is None else -rank), "0"
    elif rank is None:
        return
    else:
        reduced = _reduced(node, place, rank)
        wrong, wanted = axis % rank == reduced, str((2 * rank - 3 - reduced) if rank > 1 else 0)
    if wrong and node.input[place] in graph.at_run_time:
        yield found("per-channel-activations", name, f"{named(source.dequantize)} has {scale.size} scales", path)
    elif wrong:
        yield found("weight-axis", name, f"its weight has scales along axis {axis}, wanted is {wanted}", path)


def _axis(graph: Graph, source: Source, scale: Array) -> int | None:
    """The axis that several scales lie along where the product reads them; None for one scale, and if not known."""
    assert source.dequantize is not None
    if scale.size == 1:
        return None
    axis = int(attribute(source.dequantize, "axis", 1))
    for move in reversed(source.between):
        if move.op_type == "Transpose":
            permutation = list(attribute(move, "perm", []))
            if not permutation:
                return None
            axis = permutation.index(axis % len(permutation))
        elif move.op_type in RESHAPES:
            return None
    return axis


def _rank(graph: Graph, source: Source, name: str) -> int | None:
    assert source.dequantize is not None
    shape = graph.shape(name) or (graph.shape(source.dequantize.input[0]) if source.between == [] else None)
    return None if shape is None else len(shape)


def _reduced(node: NodeProto, place: int, rank: int) -> int:
    """The axis that a product sums over."""
    if node.op_type == "Gemm":
        transposed = attribute(node, ("transA", "transB")[place], 0)
        return int(bool(transposed)) if place == 1 else int(not transposed)
    if rank == 1:
        return 0
    return rank - 1 if place == 0 else rank - 2


def _residual(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    if any(name not in graph.at_run_time for name in node.input):
        return
    sources = [_source(graph, name, node) for name in node.input]
    for place in (0, 1):
        other = sources[1 - place]
        if _int8_convolution(graph, sources[place]) and other.dequantize is None:
            if sources[place].dequantize is None and sources[1 - place].concat is None and place == 0:
                both = _int8_convolution(graph, other)
            else:
                both = False
            what = "neither of its two int8 convolutions is" if both else "its other input is not"
            yield found(
                "residual-add", named(node), f"it adds an int8 convolution, but {what} quantized", _near(graph, node)
            )
            return


def _near(graph: Graph, node: NodeProto) -> str | None:
    """The convolution that is added."""
    for name in node.input:
        convolution = _convolution(graph, graph.producer.get(name))
        if convolution is not None:
            return graph.path(convolution)
    return None


def _convolution(graph: Graph, node: NodeProto | None) -> NodeProto | None:
    while node is not None and node.op_type in ("BatchNormalization", "Identity", DEQUANTIZE, QUANTIZE):
        node = graph.producer.get(node.input[0])
    return node if node is not None and node.op_type == "Conv" else None


def _int8_convolution(graph: Graph, source: Source) -> bool:
    convolution = _convolution(graph, source.last)
    return convolution is not None and all(
        _source(graph, factor, convolution).dequantize is not None for factor in convolution.input[:2]
    )


def _late_bias(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    constant = [name for name in node.input if name not in graph.at_run_time]
    computed = [name for name in node.input if name in graph.at_run_time]
    if len(constant) != 1 or len(computed) != 1:
        return
    dequantize = graph.producer.get(computed[0])
    quantize = graph.producer.get(dequantize.input[0]) if dequantize is not None else None
    if dequantize is None or dequantize.op_type != DEQUANTIZE or quantize is None or quantize.op_type != QUANTIZE:
        return
    product = graph.producer.get(quantize.input[0])
    if product is not None and product.op_type in MATRIX:
        what = f"{named(node)} adds it behind {named(dequantize)}"
        yield found("bias-behind-pair", named(product), what, graph.path(product))
