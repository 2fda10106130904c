"""Networks as files, single kernels built node by node, and a device with round figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd.artifact import Preprocessing
from edgekd.onnx_file import export_onnx
from edgekd.profile import Profile

#: 8 TOPS, 4 and 1 TFLOPS, 10 GB/s: a millisecond is 8e9, 4e9 or 1e9 operations, or 10^7 bytes.
SHEET = {"int8_tops": 8.0, "fp16_tflops": 4.0, "fp32_tflops": 1.0, "bandwidth_gb_s": 10.0, "source": "made up"}


def device(**changes: Any) -> Profile:
    sheet = {**SHEET, **changes.pop("datasheet", {})}
    table = {"name": "board", "description": "a board", "runtime": "onnxruntime", "datasheet": sheet, **changes}
    return Profile.model_validate(table)


def write(network: nn.Module, path: Path, size: list[int], **options: Any) -> Path:
    half = [0.5] * size[0]
    preprocessing = Preprocessing(size=size, mean=half, std=half)
    classes = [str(i) for i in range(10)]
    export_onnx(network, path, size=size, opset=18, classes=classes, preprocessing=preprocessing, **options)
    return path


def save(path: Path, nodes: list[Any], given: dict[str, list[Any]], made: list[str], **constants: Any) -> Path:
    """given: the shapes of float inputs; constants: arrays by name."""
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    kind = TensorProto.FLOAT16 if any(w.data_type == TensorProto.FLOAT16 for w in weights) else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in given.items()]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in made]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    onnx.save(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("them", 1)], ir_version=9
        ),
        path,
    )
    return path


def convolution(path: Path, kernel: int = 3, dtype: Any = np.float32, batch: Any = "n", **attributes: Any) -> Path:
    """x [n, 8, 16, 16] -> y [n, 32, 16, 16], 1x1 or 3x3 with padding, with a bias and a ReLU."""
    pads = [kernel // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=pads, **attributes),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    w, b = np.ones((32, 8, kernel, kernel), dtype), np.zeros(32, dtype)
    return save(path, nodes, {"x": [batch, 8, 16, 16]}, ["y"], w=w, b=b)
