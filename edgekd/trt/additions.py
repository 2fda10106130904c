"""Rules on additions: residual ones, and biases of their own. Seen with TensorRT-RTX 1.7, which fuses what it can."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from .findings import Finding, found
from .graph import DEQUANTIZE, MATRIX, QUANTIZE, Graph, named
from .sources import Source, source_of

__all__ = ["late_bias_findings", "residual_findings"]


def residual_findings(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    """Of an int8 convolution and what is added to it, one must be quantized: TensorRT reads it as int8."""
    first, second = node.input
    if first == second or first not in graph.at_run_time or second not in graph.at_run_time:
        return
    sources = [source_of(graph, name, node) for name in node.input]
    convolutions = [_int8_convolution(graph, source) for source in sources]
    quantized = [source.dequantize is not None for source in sources]
    # A quantized convolution beside a float branch is no better: the branch is what is read from memory.
    if (
        all(quantized)
        or not any(convolutions)
        or any(q and c for q, c in zip(quantized, reversed(convolutions), strict=True))
    ):
        return
    what = "neither of them is" if all(convolutions) else "the other branch is not"
    yield found("residual-add", named(node), f"it adds an int8 convolution, but {what} quantized", _near(graph, node))


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
        source_of(graph, factor, convolution).dequantize is not None for factor in convolution.input[:2]
    )


def late_bias_findings(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    """A bias that is added behind the pair of the product it belongs to."""
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
