"""An ONNX graph with a size for every tensor, and the tensors that stand in memory behind what nodes read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference

from ..errors import UsageError
from ..onnx_file import read

__all__ = ["DEQUANTIZE", "QUANTIZE", "Graph", "attribute", "read_graph"]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
#: Operators that runtimes carry out by reading elsewhere: what they give stands where their input stands.
VIEWS = {
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Concat", "Slice", "Split"),
    *("Gather", "Expand", "Tile", "Pad", "DepthToSpace", "SpaceToDepth"),
}
#: Known from shapes alone.
SHAPES = {"Shape", "Size"}
RANDOM = {"RandomNormal", "RandomUniform"}
Type = onnx.TensorProto
BITS = {
    **dict.fromkeys((Type.INT4, Type.UINT4, Type.FLOAT4E2M1), 4),
    **dict.fromkeys((Type.INT8, Type.UINT8, Type.BOOL), 8),
    **dict.fromkeys((Type.FLOAT8E4M3FN, Type.FLOAT8E4M3FNUZ, Type.FLOAT8E5M2, Type.FLOAT8E5M2FNUZ), 8),
    **dict.fromkeys((Type.INT16, Type.UINT16, Type.FLOAT16, Type.BFLOAT16), 16),
    **dict.fromkeys((Type.INT64, Type.UINT64, Type.DOUBLE), 64),
}


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def read_graph(path: Path, batch: int) -> Graph:
    """A file's graph for so many images at once, or for as many as it is made for.

    Raises UsageError: no ONNX file, sizes beside the batch that are open, or operators whose output's size ONNX does
    not know.
    """
    model = read(path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return Graph(model, batch, str(path))


class Graph:
    """`batch` is that of the file where it is fixed, and the wanted one otherwise."""

    def __init__(self, model: onnx.ModelProto, batch: int, where: str) -> None:
        graph = model.graph
        self.weights = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
        self.inputs = [i for i in graph.input if i.name not in self.weights]
        self.batch = _fixed(self.inputs, batch, where)
        # What the exporter noted speaks of an open batch.
        del graph.value_info[:]
        for output in graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        except Exception as error:
            raise UsageError(f"its sizes cannot be told: {_first(error)}", where=where) from error
        self.where = where
        self.outputs = [o.name for o in graph.output]
        self.ends = {*(i.name for i in self.inputs), *self.outputs}
        self.nodes = _needed(graph.node, self.outputs)
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self._types = {v.name: v.type.tensor_type for v in [*known.value_info, *known.output, *self.inputs]}
        self._tensors = {t.name: (t.data_type, list(t.dims)) for t in graph.initializer}
        self.constants = set(self.weights)
        for node in self.nodes:
            read = [i for i in node.input if i]
            if node.op_type in SHAPES or (node.op_type not in RANDOM and all(i in self.constants for i in read)):
                self.constants.update(node.output)

    def working(self) -> Iterator[Any]:
        """The nodes that something is calculated in at run time, in the file's order."""
        for node in self.nodes:
            free = node.op_type in VIEWS or node.op_type == DEQUANTIZE
            if not free and not all(o in self.constants for o in node.output):
                yield node

    def shape(self, name: str) -> list[int]:
        """Raises UsageError where it is not known."""
        if name in self._tensors:
            return self._tensors[name][1]
        if not self._sized(name):
            node = next((n for n in self.nodes if not all(self._sized(o) for o in n.output if o)), None)
            what = f"what {node.op_type} {node.name!r} gives" if node is not None else repr(name)
            raise UsageError(
                f"the size of {what} is not known",
                where=self.where,
                hint="estimates need ONNX's own operators and fixed sizes; the batch alone may be open",
            )
        return [d.dim_value for d in self._types[name].shape.dim]

    def _sized(self, name: str) -> bool:
        if name in self._tensors:
            return True
        found = self._types.get(name)
        return found is not None and found.HasField("shape") and all(d.HasField("dim_value") for d in found.shape.dim)

    def count(self, name: str) -> int:
        """Elements of a tensor."""
        return math.prod(self.shape(name))

    def element(self, name: str) -> int:
        """The type of a tensor's elements, as ONNX numbers them."""
        if name in self._tensors:
            return self._tensors[name][0]
        found = self._types.get(name)
        return found.elem_type if found is not None and found.elem_type else Type.FLOAT

    def bits(self, name: str, wide: int) -> int:
        """Bits of an element: `wide` for 32 bit floats, but not for those that the file is given or gives."""
        kind = self.element(name)
        return wide if kind == Type.FLOAT and name not in self.ends else BITS.get(kind, 32)

    def stored(self, name: str) -> list[str]:
        """The tensors in memory that stand behind one: through Q/DQ and views; several behind a Concat."""
        node = self.producer.get(name)
        if node is None or name in self.constants:
            return [name]
        if node.op_type == DEQUANTIZE:
            return self.stored(node.input[0])
        if node.op_type in VIEWS:
            read = node.input if node.op_type == "Concat" else node.input[:1]
            return list(dict.fromkeys(s for i in read for s in self.stored(i)))
        return [name]

    def part(self, name: str) -> int:
        """Elements that are read where one tensor stands behind: of a slice its own, of an expanded one those there."""
        node, least = self.producer.get(name), self.count(name)
        if node is None or not (node.op_type == DEQUANTIZE or node.op_type in VIEWS):
            return least
        return min(least, self.part(node.input[0]))

    def weight(self, name: str) -> str:
        """The constant as the runtime keeps it: the integers behind a DequantizeLinear."""
        node = self.producer.get(name)
        if node is None or node.op_type not in VIEWS | {DEQUANTIZE, "Cast"} or not node.input:
            return name
        return node.input[0] if node.op_type == DEQUANTIZE else self.weight(node.input[0])


def _needed(nodes: Any, outputs: list[str]) -> list[Any]:
    """Without those that lead to no output: a runtime takes them away."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        inner = [g for a in node.attribute for g in [*([a.g] if a.HasField("g") else []), *a.graphs]]
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(node.input, *(n.input for g in inner for n in g.node))
    return kept[::-1]


def _fixed(inputs: list[Any], batch: int, where: str) -> int:
    """Give every input a size; the batch that it is then."""
    found = batch
    for info in inputs:
        dims = info.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value") and len(dims) > 1:
            found = dims[0].dim_value
        elif dims:
            dims[0].dim_value = batch
        if any(not d.HasField("dim_value") for d in dims):
            raise UsageError(
                f"input {info.name!r} has open sizes beside the batch",
                where=where,
                hint="export it with the size of image that it will be given",
            )
    return found


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
