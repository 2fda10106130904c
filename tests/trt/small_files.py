"""A small residual network as an ONNX file, float or Q/DQ, from one set of weights; real digits to feed it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

CHANNELS = 6


def digits(count: int = 64) -> NDArray[np.float32]:
    """[count, 1, 8, 8] from 0 to 1."""
    return (load_digits().images[:count, None] / 16).astype(np.float32)


def outputs(model: onnx.ModelProto, images: NDArray[Any]) -> NDArray[Any]:
    """What ONNX Runtime gives for the first output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {model.graph.input[0].name: images})[0])


def small_file(
    quantized: bool, *, opset: int = 18, dtype: type = np.int8, batch: str | int = "batch", bias: str = "float"
) -> onnx.ModelProto:
    """conv1 -> relu -> conv2 + skip -> mean -> linear, on digits. Both forms have the same weights: integers times
    their scales. dtype: of activations; bias: float, or int32 with the scale of input times weight."""
    made = _File(quantized, dtype, bias)
    x = made.layer("Conv", "conv1", "image", (CHANNELS, 1, 3, 3), 1 / 127, pads=[1, 1, 1, 1])
    skip = made.node("Relu", [x])
    x = made.layer("Conv", "conv2", skip, (CHANNELS, CHANNELS, 3, 3), 0.02, pads=[1, 1, 1, 1])
    x = made.node("Add", [x, made.pair(skip, 0.02)])
    axes = made.constant("axes", np.asarray([2, 3], np.int64))
    x = made.node("ReduceMean", [x, axes], keepdims=0)
    x = made.layer("Gemm", "linear", x, (10, CHANNELS), 0.02, transB=1)
    made.nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        made.nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        made.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


class _File:
    def __init__(self, quantized: bool, dtype: type, bias: str) -> None:
        self.quantized, self.dtype, self.bias = quantized, dtype, bias
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        name = attributes.pop("name", f"node_{len(self.nodes)}")
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def pair(self, x: str, scale: float) -> str:
        """x behind Q and DQ, whose zero point is 0, or 128 for uint8 around it."""
        if not self.quantized:
            return x
        n = len(self.nodes)
        s = self.constant(f"scale_{n}", np.asarray(scale, np.float32))
        z = self.constant(f"zero_{n}", np.asarray(128 if self.dtype is np.uint8 else 0, self.dtype))
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, s, z]), s, z])

    def layer(self, kind: str, name: str, x: str, shape: tuple[int, ...], scale: float, **attributes: Any) -> str:
        integers = self.random.integers(-127, 128, shape).astype(np.int8)
        scales = (self.random.uniform(0.2, 1, shape[0]) * 2 / 127 / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        weight = (integers * scales.reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)
        bias = np.rint(self.random.normal(0, 0.1, shape[0]) / (scales * scale)).astype(np.int32)
        floats = (bias * (scales * np.float32(scale))).astype(np.float32)
        if self.quantized:
            zeros = self.constant(f"{name}.zeros", np.zeros(shape[0], np.int8))
            stored = [self.constant(f"{name}.weight", integers), self.constant(f"{name}.scales", scales), zeros]
            w = self.node("DequantizeLinear", stored, axis=0)
        else:
            w = self.constant(f"{name}.weight", weight)
        if self.quantized and self.bias == "int32":
            s = self.constant(f"{name}.bias_scales", scales * np.float32(scale))
            b = self.node("DequantizeLinear", [self.constant(f"{name}.bias", bias), s], axis=0)
        else:
            b = self.constant(f"{name}.bias", floats)
        return self.node(kind, [self.pair(x, scale), w, b], name=name, **attributes)
