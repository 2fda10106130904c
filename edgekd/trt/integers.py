"""Rules on QuantizeLinear and DequantizeLinear, whatever they stand in front of.

Source: QuantDequantLinearHelper of github.com/onnx/onnx-tensorrt (TensorRT 8.6 and 11), each tried with TensorRT-RTX.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from ..onnx_edit import attribute
from .findings import Finding, found
from .graph import DEQUANTIZE, MATRIX, QUANTIZE, Array, Graph, named, type_name
from .operators import missing_operator

__all__ = ["integer_findings"]

T = TensorProto
DYNAMIC = "DynamicQuantizeLinear"
#: Constants that no TensorRT imports.
NO_TYPES = {T.INT16, T.UINT16, T.UINT32, T.UINT64, T.UINT4, T.STRING, T.COMPLEX64, T.COMPLEX128}
QUANTIZED = {T.INT8, T.INT4, T.FLOAT8E4M3FN}
FLOATS = {T.FLOAT, T.FLOAT16, T.BFLOAT16, T.DOUBLE}
#: Beside matrix layers: all their inputs must be of one type.
SAME_TYPES = {"Add", "Sub", "Mul", "Div", "Min", "Max", "Concat"}


def integer_findings(graph: Graph, version: tuple[int, ...]) -> Iterator[Finding]:
    """What TensorRT refuses about the quantizing nodes, the constants and the float types of a graph."""
    yield from _constants(graph)
    for node in graph.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            if not _repeats(graph, node):
                yield from _parameters(graph, node, version)
            yield from _stored(graph, node)
        elif not missing_operator(node, version):
            yield from _read_constants(graph, node)
            yield from _mixed(graph, node)


def _constants(graph: Graph) -> Iterator[Finding]:
    for name, tensor in graph.tensors.items():
        readers = graph.readers.get(name, [])
        if tensor.data_type in NO_TYPES and readers:
            reader = next((r for r in readers if r.op_type == QUANTIZE), readers[0])
            what = f"constant {name} is {type_name(tensor.data_type)}"
            yield found("data-type", named(reader), what, graph.path(reader))


def _repeats(graph: Graph, node: NodeProto) -> bool:
    """A DequantizeLinear with the scale and zero point of the QuantizeLinear in front of it: said once."""
    before = graph.producer.get(node.input[0])
    if node.op_type != DEQUANTIZE or before is None or before.op_type != QUANTIZE:
        return False
    if len(before.input) != len(node.input):
        return False
    return all(_same(graph, *names) for names in zip(before.input[1:], node.input[1:], strict=True))


def _same(graph: Graph, one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = graph.value(one), graph.value(other)
    return first is not None and second is not None and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")


def _parameters(graph: Graph, node: NodeProto, version: tuple[int, ...]) -> Iterator[Finding]:
    name, path = named(node), graph.path(node)
    given = [n for n in node.input[1:] if n]
    if dynamic := [n for n in given if n in graph.at_run_time]:
        if graph.producer.get(dynamic[0], node).op_type == DYNAMIC:  # which is refused itself
            return
        part = "zero point" if dynamic[0] != node.input[1] else "scale"
        yield found("dynamic-scale", name, f"the {part} {dynamic[0]} is calculated at run time", path)
        return
    scale = graph.value(node.input[1])
    zero = graph.value(given[1]) if len(given) > 1 else None
    if scale is not None and scale.dtype.kind == "f":
        yield from _scales(scale, name, path)
        yield from _sizes(graph, node, scale, zero)
    if version < (9,) and graph.dtype(node.input[1]) == T.FLOAT16:
        yield found("half-scale", name, "its scale is float16", path)
    if len(given) == 1 and version < (9,):
        yield found("no-zero-point", name, "it has no zero point", path)
    if zero is not None and zero.size and zero.dtype.kind in "iu" and zero.any():
        values = sorted({int(v) for v in zero.ravel()})
        several = f"zero points are {values[0]} to {values[-1]}" if len(values) > 1 else f"zero point is {values[0]}"
        yield found("zero-point", name, f"its {several}, not 0", path)
    elif node.op_type == QUANTIZE:
        yield from _target(graph, node, given, version)


def _scales(scale: Array, name: str, path: str | None) -> Iterator[Finding]:
    bad = ~((scale > 0) & np.isfinite(scale))
    if bad.any():
        value = scale[bad].ravel()[0]
        where = "" if scale.size == 1 else f" ({int(bad.sum())} of {scale.size} channels)"
        yield found("scale", name, f"its scale is {value:g}{where}", path)


def _sizes(graph: Graph, node: NodeProto, scale: Array, zero: Array | None) -> Iterator[Finding]:
    name, path = named(node), graph.path(node)
    if zero is not None and zero.size != scale.size:
        yield found("scale-size", name, f"it has {scale.size} scales and {zero.size} zero points", path)
        return
    shape = graph.shape(node.input[0])
    if scale.ndim != 1 or scale.size == 1 or shape is None:
        return
    axis = attribute(node, "axis", 1)
    if not -len(shape) <= axis < len(shape):
        yield found("scale-size", name, f"its axis {axis} is none of a tensor of {len(shape)} axes", path)
    elif shape[axis] not in (None, scale.size):
        yield found("scale-size", name, f"it has {scale.size} scales, its axis {axis} is {shape[axis]} long", path)


def _target(graph: Graph, node: NodeProto, given: list[str], version: tuple[int, ...]) -> Iterator[Finding]:
    """What a QuantizeLinear makes: without zero point and output_dtype it is uint8 by ONNX's definition."""
    wanted = graph.dtype(given[1]) if len(given) > 1 else attribute(node, "output_dtype", 0) or T.UINT8
    name, path = named(node), graph.path(node)
    if wanted == T.UINT8 and (len(given) > 1 or version >= (9,)):
        said = "it quantizes to uint8" if len(given) > 1 else "it has no zero point, which means uint8"
        yield found("uint8", name, said, path)
    elif wanted in NO_TYPES and len(given) == 1:
        yield found("data-type", name, f"it quantizes to {type_name(wanted)}", path)


def _stored(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    """What a DequantizeLinear reads that no QuantizeLinear of the file made."""
    producer = graph.producer.get(node.input[0])
    if node.op_type != DEQUANTIZE or (producer is not None and producer.op_type in (QUANTIZE, DYNAMIC)):
        return
    dtype, name = graph.dtype(node.input[0]), named(node)
    if dtype == T.INT32:
        readers = [
            r for r in graph.readers.get(node.output[0], []) if len(r.input) > 2 and r.input[2] == node.output[0]
        ]
        kind = "a bias" if readers else "a tensor"
        yield found("int32-bias", name, f"it dequantizes {kind} of int32", graph.path(node))
    elif dtype == T.UINT8:
        yield found("uint8", name, "it dequantizes uint8", graph.path(node))


def _read_constants(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    for name in node.input:
        if name in graph.tensors and graph.tensors[name].data_type in QUANTIZED and node.op_type not in MATRIX:
            if all(output not in graph.readers and output not in graph.outputs for output in node.output):
                continue
            if node.op_type == "Identity" and all(_only_zero_point(graph, output) for output in node.output):
                continue
            what = f"{node.op_type} reads {name}, a constant of {type_name(graph.tensors[name].data_type)}"
            yield found("quantized-constant", named(node), what, graph.path(node))


def _only_zero_point(graph: Graph, name: str) -> bool:
    return all(r.op_type in (QUANTIZE, DEQUANTIZE) and r.input[0] != name for r in graph.readers.get(name, []))


def _mixed(graph: Graph, node: NodeProto) -> Iterator[Finding]:
    if node.op_type not in MATRIX | SAME_TYPES:
        return
    types = [graph.dtype(name) for name in node.input if name]
    known = [dtype for dtype in types if dtype in FLOATS]
    if len({T.FLOAT if dtype == T.DOUBLE else dtype for dtype in known}) > 1:
        said = ", ".join(type_name(dtype) for dtype in types if dtype in FLOATS)
        yield found("mixed-types", named(node), f"{node.op_type} reads {said}", graph.path(node))
