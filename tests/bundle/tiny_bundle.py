"""Digits in a linear network, float and int8, and a bundle of both that is measured within a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.data import Dataset, load
from edgekd.profile import Profile, load_profile
from edgekd.recipe import DataSpec

QUICK = {"rounds": 3, "precision": 10.0, "block_s": 0.01, "warmup_s": 0.01, "cap_s": 5.0}


def digits() -> Dataset:
    return load(DataSpec(use="digits"), 0)


def quick_profile(name: str = "cpu-x86", **protocol: Any) -> Profile:
    profile = load_profile(name)
    return profile.model_copy(update={"protocol": profile.protocol.model_copy(update={**QUICK, **protocol})})


def normalised(images: np.ndarray, data: Dataset) -> np.ndarray:
    scaled = images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)
    return (scaled - np.float32(data.mean[0])) / np.float32(data.std[0])


def linear(path: Path, data: Dataset, *, int8: bool = False, batch: str | int = "batch") -> Path:
    """image -> (Q/DQ) -> Flatten -> MatMul with least-squares weights (Q/DQ) -> logits."""
    images = normalised(data.train.images.numpy(), data).reshape(len(data.train), -1)
    targets = np.eye(10, dtype=np.float32)[data.train.labels.numpy()]
    weights = np.linalg.lstsq(images, targets - 0.1, rcond=1e-3)[0].astype(np.float32)
    nodes, constants = [], {"w": weights}
    image, weight = "image", "w"
    if int8:
        constants |= {"sx": np.float32(np.abs(images).max() / 127), "sw": np.float32(np.abs(weights).max() / 127)}
        constants |= {"zero": np.int8(0)}
        for name, scale in (("image", "sx"), ("w", "sw")):
            nodes.append(helper.make_node("QuantizeLinear", [name, scale, "zero"], [f"{name}_q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", scale, "zero"], [f"{name}_d"]))
        image, weight = "image_d", "w_d"
    nodes.append(helper.make_node("Flatten", [image], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", weight], ["logits"]))
    source = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, *data.size])
    target = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "linear", [source], [target], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run(bundle: Path, *options: str, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """`python run.py`, without edgekd in reach."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-P", str(bundle / "run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables, cwd="/", **more)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def results(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text())
