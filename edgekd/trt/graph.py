"""An ONNX graph as the rules look at it: producers, constants, types, and which module a node was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ..onnx_edit import attribute
from ..runtimes.onnx_model import module_path

__all__ = ["DEQUANTIZE", "MATRIX", "QUANTIZE", "Array", "Graph", "graphs", "named", "type_name"]

Array = np.ndarray[Any, Any]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
MATRIX = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
#: Their outputs may differ from run to run though their inputs are constant.
NOT_CONSTANT = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "If", "Loop", "Scan"}
#: From a weight to the constant that holds it.
STILL = {QUANTIZE, DEQUANTIZE, "Transpose", "Reshape", "Identity", "Cast", "Mul"}


def type_name(dtype: int) -> str:
    """`int8` for TensorProto.INT8."""
    return str(TensorProto.DataType.Name(dtype)).lower()


def named(node: NodeProto) -> str:
    """What TensorRT's parser calls a node."""
    return node.name or (f"node_of_{node.output[0]}" if node.output else node.op_type)


class Graph:
    """One graph; those in branches and loops know the constants of the graphs around them."""

    def __init__(self, proto: GraphProto, types: dict[str, Any], ours: bool, outer: Graph | None = None) -> None:
        self.ours = ours
        self.nodes = list(proto.node)
        self.inputs = [i for i in proto.input if i.name not in {t.name for t in proto.initializer}]
        self.outputs = {o.name for o in proto.output}
        self.tensors: dict[str, TensorProto] = dict(outer.tensors) if outer else {}
        self.tensors |= {t.name: t for t in proto.initializer}
        self.tensors |= {
            node.output[0]: value
            for node in self.nodes
            if node.op_type == "Constant" and (value := attribute(node, "value")) is not None
        }
        self.producer: dict[str, NodeProto] = dict(outer.producer) if outer else {}
        self.producer |= {name: node for node in self.nodes for name in node.output if name}
        self.types = types
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in filter(None, node.input):
                self.readers[name].append(node)
        #: Tensors that depend on an input of the file, or on chance.
        self.at_run_time: set[str] = (set(outer.at_run_time) if outer else set()) | {i.name for i in self.inputs}
        for node in self.nodes:
            if node.op_type in NOT_CONSTANT or any(name in self.at_run_time for name in node.input):
                self.at_run_time |= set(node.output)

    def value(self, name: str) -> Array | None:
        """A stored constant, also behind Identity and Cast between floats; None for anything else."""
        while name not in self.tensors and (node := self.producer.get(name)) is not None:
            if node.op_type not in ("Identity", "Cast"):
                return None
            name = node.input[0]
        tensor = self.tensors.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    def dtype(self, name: str) -> int:
        """TensorProto.DataType of a tensor, 0 where it is not known. Of a DequantizeLinear: that of its scale."""
        node = self.producer.get(name)
        if node is not None and node.op_type == DEQUANTIZE:
            return attribute(node, "output_dtype", 0) or self.dtype(node.input[1])
        if name in self.tensors:
            return int(self.tensors[name].data_type)
        return int(self.types[name].tensor_type.elem_type) if name in self.types else 0

    def shape(self, name: str) -> list[int | None] | None:
        """The axes of a tensor, None for an open one; None where not even the rank is known."""
        if name in self.tensors:
            return list(self.tensors[name].dims)
        if name not in self.types or not self.types[name].tensor_type.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else None for d in self.types[name].tensor_type.shape.dim]

    def path(self, node: NodeProto) -> str | None:
        """The module that a matrix layer was; of another node, the module that reads what it gives."""
        seen = node
        for _ in range(4):
            if seen.op_type in MATRIX:
                return module_path(seen, self._weight(seen), self.ours)
            readers = [r for name in seen.output for r in self.readers.get(name, [])]
            if not readers:
                break
            seen = next((r for r in readers if r.op_type in MATRIX), readers[0])
        return None

    def _weight(self, node: NodeProto) -> str:
        for name in reversed(node.input[:2]):
            while name not in self.tensors and (producer := self.producer.get(name)) is not None:
                if producer.op_type not in STILL:
                    break
                name = producer.input[0]
            if name in self.tensors:
                return str(name)
        return ""


def graphs(model: ModelProto) -> list[Graph]:
    """The graph of a model and those in its branches and loops, the outermost first."""
    main = Graph(model.graph, _types(model), model.producer_name == "edgekd")
    return [main, *_inner(main)]


def _inner(graph: Graph) -> Iterator[Graph]:
    for node in graph.nodes:
        for value in node.attribute:
            for proto in [*([value.g] if value.HasField("g") else []), *value.graphs]:
                inner = Graph(proto, graph.types, graph.ours, graph)
                yield inner
                yield from _inner(inner)


def _types(model: ModelProto) -> dict[str, Any]:
    """TypeProto of every tensor, as far as it is known or can be inferred."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, ValueError):  # not valid, or too large to be copied
        graph = model.graph
    return {v.name: v.type for v in [*graph.value_info, *graph.input, *graph.output]}
