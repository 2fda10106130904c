"""One matrix layer and a ReLU behind it as an ONNX file, with the Q/DQ pairs that a test wants around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

SHAPES = {"Conv": (8, 4, 3, 3), "ConvTranspose": (4, 8, 3, 3), "Gemm": (32, 16), "MatMul": (32, 16)}
OUTPUTS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


def write_layer(
    path: Path,
    op: str = "Conv",
    *,
    quantized: str = "both",
    dtype: type = np.float32,
    weight_dtype: type = np.int8,
    input_scale: float | list[float] = 0.02,
    shape: tuple[int | str, ...] | None = None,
    name: str = "the.layer",
    opset: int = 19,
) -> Path:
    """x -> layer -> relu -> y, x of [1, 4, 8, 8] or [3, 32]; quantized: "both", "input", "weight" or "none"."""
    rng = np.random.default_rng(0)
    float_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    factors, nodes = ["x", "w"], []
    tensors = [numpy_helper.from_array(rng.normal(size=SHAPES[op]).astype(dtype), "w")]
    if quantized in ("both", "input"):
        scale = np.array(input_scale, dtype)
        tensors += [numpy_helper.from_array(scale, "x.scale")]
        tensors += [numpy_helper.from_array(np.zeros(scale.shape, np.int8), "x.zero")]
        nodes += [helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.q"], "x.quantize")]
        nodes += [helper.make_node("DequantizeLinear", ["x.q", "x.scale", "x.zero"], ["x.dq"], "x.dequantize")]
        factors[0] = "x.dq"
    if quantized in ("both", "weight"):
        channels = SHAPES[op][OUTPUTS[op]]
        tensors = [numpy_helper.from_array(rng.integers(1, 127, SHAPES[op]).astype(weight_dtype), "w"), *tensors[1:]]
        tensors += [numpy_helper.from_array(rng.uniform(0.01, 0.02, channels).astype(dtype), "w.scale")]
        tensors += [numpy_helper.from_array(np.zeros(channels, weight_dtype), "w.zero")]
        weight = helper.make_node("DequantizeLinear", ["w", "w.scale", "w.zero"], ["w.dq"], "w.dq", axis=OUTPUTS[op])
        nodes, factors[1] = [*nodes, weight], "w.dq"
    nodes += [helper.make_node(op, factors, ["product"], name), helper.make_node("Relu", ["product"], ["y"], "relu")]
    size = shape or ((1, 4, 8, 8) if op.startswith("Conv") else (3, 32))
    value = helper.make_tensor_value_info("x", float_type, size)
    graph = helper.make_graph(nodes, "layer", [value], [helper.make_tensor_value_info("y", float_type, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, path)
    return path
