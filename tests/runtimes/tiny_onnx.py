"""Tiny ONNX files whose outputs NumPy can compute, made without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def linear_classifier(
    path: Path,
    *,
    classes: int = 5,
    shape: tuple[int, int, int] = (1, 4, 4),
    batch: str | int = "batch",
    dtype="float32",
) -> tuple[Path, np.ndarray]:
    """image [batch, C, H, W] -> Flatten -> MatMul with the returned weights -> logits. uint8 images are cast."""
    size = int(np.prod(shape))
    weights = np.random.default_rng(1).standard_normal((size, classes)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["float_image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    if dtype == "uint8":
        nodes.insert(0, helper.make_node("Cast", ["image"], ["float_image"], to=TensorProto.FLOAT))
    else:
        nodes.insert(0, helper.make_node("Identity", ["image"], ["float_image"]))
    source = helper.make_tensor_value_info(
        "image", TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT, [batch, *shape]
    )
    target = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])
    return _saved(path, nodes, [source], [target], {"w": weights}), weights


def chain(path: Path, *, width: int, layers: int) -> Path:
    """x [batch, width] -> `layers` times (MatMul with an orthogonal matrix, Tanh) -> y."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32) for i in range(layers)}
    nodes, last = [], "x"
    for i in range(layers):
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]),
            helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]),
        ]
        last = f"t{i}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", "y")]
    return _saved(path, nodes, value[:1], value[1:], weights)


def two_inputs(path: Path) -> Path:
    """a [n, 2] + b [n, 2] -> sum."""
    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("a", "b", "sum"))
    return _saved(path, [helper.make_node("Add", ["a", "b"], ["sum"])], [a, b], [c], {})


def expanding(path: Path, *, megabytes: int) -> Path:
    """x [batch, 1] broadcast to a buffer of so many megabytes, then its mean: little on disk, much while it runs."""
    width = megabytes * 250_000
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("ReduceMean", ["wide", "axes"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in ("x", "y")]
    constants = {"shape": np.array([1, width], np.int64), "axes": np.array([1], np.int64)}
    return _saved(path, nodes, value[:1], value[1:], constants)


def logarithm(path: Path) -> Path:
    """image [batch, 1, 1, 2] -> logits = log(image) [batch, 2]: NaN for negative images."""
    source = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 1, 2])
    target = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("Log", ["flat"], ["logits"])]
    return _saved(path, nodes, [source], [target], {})


def _saved(path: Path, nodes, inputs, outputs, constants: dict[str, np.ndarray]) -> Path:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"classes": '["a", "b"]'})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
