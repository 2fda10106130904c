"""An int8 ONNX file with some layers back in float, in milliseconds: what candidates of a mixture are timed with.

Exporting each candidate takes seconds. This takes Q/DQ pairs out of one file that has them all, by the rules of
`quantizer`; the weights of such a file are rounded, so it tells latencies, and what is chosen is exported for itself.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.helper import make_node

__all__ = ["in_float", "integer_layers"]

CONVOLUTION, PRODUCTS = "Conv", ("Gemm", "MatMul")
#: Between an operator and the Q behind it: the runtime computes them in one.
ABSORBED = ("Relu", "Clip")
#: Quantized where one input is, where all are, or where the first is; anything else is float, whatever it reads.
ANY, ALL = ("Add", "Mul"), ("Concat",)
FIRST = {
    *("Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "ReduceMean", "AveragePool", "MaxPool"),
    *("GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Pad"),
    *("DepthToSpace", "SpaceToDepth", "Identity"),
}


def integer_layers(model: onnx.ModelProto) -> int:
    """How many matrix layers have integer weights, counted as `placements` counts them."""
    return len(_File(model).layers)


def in_float(model: onnx.ModelProto, layers: Collection[int]) -> onnx.ModelProto:
    """A copy in which these layers (0 is the first one with integer weights, in the order of the graph) are float.

    Elementwise operators between them lose their Q/DQ pairs too, as they would in a network prepared that way.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    file = _File(copy)
    chosen = {id(node) for i, node in enumerate(file.layers) if i in layers}
    for node in file.layers:
        if id(node) in chosen:
            file.dequantize(node)
    quantized: set[str] = set()  # tensors that leave their operator through a Q
    integer: set[int] = set()  # operators that run in integers
    for node in copy.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        sources = {i: file.pairs[name] for i, name in enumerate(node.input) if name in file.pairs}
        held = [source in quantized for source in sources.values()]
        if file.is_layer(node):
            runs = id(node) not in chosen
        elif node.op_type in ANY:
            runs = any(held)
        elif node.op_type in ALL:
            runs = all(held)
        else:
            runs = node.op_type in FIRST and sources.get(0) in quantized
        if runs and sources:
            integer.add(id(node))
        for i, source in sources.items():
            if not runs and source not in quantized:
                node.input[i] = source
            elif not runs and i == 0 and file.is_layer(node) and node.op_type != "MatMul":
                node.input[i] = file.per_channel(node, node.input[i])
        root = file.root(node)
        if root is not None and id(root) in integer and root.op_type not in PRODUCTS:
            quantized.update(node.output)
    file.write()
    return copy


class _File:
    """A file's Q/DQ pairs: `pairs` maps what a DQ gives to what its Q took, `layers` are those with integer weights."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.pairs: dict[str, str] = {}
        for node in model.graph.node:
            before = self.producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if before is not None and before.op_type == "QuantizeLinear":
                self.pairs[node.output[0]] = before.input[0]
        self.layers = [node for node in model.graph.node if self._weight(node) is not None]
        self._layers = {id(node) for node in self.layers}
        self.added: list[onnx.NodeProto] = []

    def is_layer(self, node: onnx.NodeProto) -> bool:
        return id(node) in self._layers

    def _weight(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The DQ of a matrix layer's integer weight."""
        if node.op_type != CONVOLUTION and node.op_type not in PRODUCTS:
            return None
        found = self.producers.get(node.input[1])
        if found is not None and found.op_type == "Transpose":
            found = self.producers.get(found.input[0])
        return found if found is not None and self._constant(found) else None

    def _constant(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "DequantizeLinear" and node.input[0] in self.initializers

    def dequantize(self, layer: onnx.NodeProto) -> None:
        """Weight and bias of a layer as float constants, under the names that their DQs gave them."""
        bias = self.producers.get(layer.input[2]) if len(layer.input) > 2 else None
        for node in (self._weight(layer), bias):
            if node is None or not self._constant(node) or node.output[0] in self.initializers:
                continue
            integers, scale, zero = (numpy_helper.to_array(self.initializers[name]) for name in node.input)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if d == axis else 1 for d in range(integers.ndim)] if scale.ndim else []
            values = (integers.astype(np.float32) - zero.reshape(shape)) * scale.reshape(shape)
            tensor = numpy_helper.from_array(values.astype(np.float32), node.output[0])
            self.initializers[tensor.name] = tensor
            self.graph.initializer.append(tensor)

    def per_channel(self, layer: onnx.NodeProto, name: str) -> str:
        """The same DQ with one equal scale per channel: ONNX Runtime would quantize the layer's weight by itself."""
        node = self.producers[name]
        scale, zero = (numpy_helper.to_array(self.initializers[n]) for n in node.input[1:3])
        groups = next((a.i for a in layer.attribute if a.name == "group"), 1)
        shape = numpy_helper.to_array(self.initializers[layer.input[1]]).shape
        transposed = any(a.name == "transB" and a.i for a in layer.attribute)
        channels = shape[1] * groups if layer.op_type == CONVOLUTION or transposed else shape[0]
        out = f"{name}.{len(self.added)}.channels"
        values = [np.full(channels, scale), np.full(channels, zero)]
        names = [f"{out}.scale", f"{out}.zero"]
        for value, one in zip(values, names, strict=True):
            self.graph.initializer.append(numpy_helper.from_array(value, one))
        self.added.append(make_node("DequantizeLinear", [node.input[0], *names], [out], axis=1))
        return out

    def root(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The operator that a ReLU behind it is computed with; the node itself otherwise."""
        while node.op_type in ABSORBED and node.input[0] not in self.pairs:
            before = self.producers.get(node.input[0])
            if before is None:
                return None
            node = before
        return node

    def write(self) -> None:
        """Put the graph back in order, without what nobody reads any more."""
        nodes = []
        added = {node.input[0]: [] for node in self.added}  # type: ignore[var-annotated]
        for node in self.added:
            added[node.input[0]].append(node)
        for node in self.graph.node:
            if node.output[0] in self.initializers:
                continue  # a DQ that has become a constant
            nodes += [node, *added.get(node.output[0], ())]
        read = {output.name for output in self.graph.output}
        kept = []
        for node in reversed(nodes):
            if read.intersection(node.output):
                read.update(node.input)
                kept.append(node)
        names = {tensor.name for tensor in self.graph.initializer}
        constants = [tensor for tensor in self.graph.initializer if tensor.name in read and tensor.name in names]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        held = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(copies)
        self.graph.initializer.extend(held)
