"""Rules on where quantization stands: which layers TensorRT silently leaves in float.

Each was compiled with TensorRT-RTX 1.7, and is what it does. NVIDIA's advice on placement: "Explicit Quantization" in
docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from ..onnx_edit import attribute
from .additions import late_bias_findings, residual_findings
from .findings import Finding, found
from .graph import DEQUANTIZE, MATRIX, Array, Graph, named
from .sources import FAR, RESHAPES, Source, source_of

__all__ = ["placement_findings"]


def placement_findings(graph: Graph) -> Iterator[Finding]:
    """Layers that are quantized in part, or in a way that TensorRT calculates in float."""
    quantized = any(node.op_type == DEQUANTIZE for node in graph.nodes)
    for node in graph.nodes if quantized else []:
        if node.op_type in MATRIX and len(node.input) > 1:
            yield from _matrix(graph, node)
        elif node.op_type == "Add" and len(node.input) == 2:
            yield from residual_findings(graph, node)
            yield from late_bias_findings(graph, node)


def _matrix(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    name, path = named(node), graph.path(node)
    sources = [source_of(graph, factor, node) for factor in node.input[:2]]
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
        sources = [source_of(graph, i, source.concat) for i in source.concat.input]
        if any(s.dequantize is not None for s in sources):
            why = "of different scales" if all(s.dequantize is not None for s in sources) else "some of them float"
            return found("concat-scales", name, f"{named(source.concat)} gives it parts {why}", path)
    if source.last is not None and _dequantized_behind(graph, source.last):
        what = f"{named(source.last)} ({source.last.op_type}) stands between its {part} and DequantizeLinear"
        return found("operator-between", name, what, path)
    if place == 1 and node.input[1] not in graph.at_run_time and _shared(graph, node.input[0]):
        return found(
            "not-quantized", name, f"{node.op_type} has a float weight, and reads what others read as int8", path
        )
    return found("one-side", name, f"its {other} is quantized, its {part} is float", path)


def _shared(graph: Graph, name: str) -> bool:
    """Whether a quantized tensor is there for other layers, too: then a float layer that reads it is meant so."""
    return any(
        reader.op_type in MATRIX
        and len(reader.input) > 1
        and source_of(graph, reader.input[1], reader).dequantize is not None
        for reader in graph.readers.get(name, [])
    )


def _integers(graph: Graph, name: str, node: NodeProto) -> bool:
    dequantize = source_of(graph, name, node).dequantize
    return dequantize is not None and graph.dtype(dequantize.input[0]) in (TensorProto.INT4, TensorProto.UINT4)


def _dequantized_behind(graph: Graph, node: NodeProto) -> bool:
    """Whether, behind a few operators that are no layers themselves, there is a DequantizeLinear."""
    names = list(node.input)
    for _ in range(FAR):
        names = list(dict.fromkeys(names))
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
