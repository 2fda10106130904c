"""What is measured over ssh: linear classifiers of digits in ONNX, and a recipe and profiles to measure them by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from loopback import Server
from onnx import TensorProto, helper, numpy_helper

from edgekd.data.digits import digits

RECIPE = """\
version = 1
name = "small"
data = { use = "digits", size = 16, batch = 128 }
profiles = ["quick.toml"]
[teacher]
model = { use = "cifar-resnet", depth = 8, width = 4 }
epochs = 1
[[stage]]
use = "export"
[gate]
size_mb = { max = 1.0 }
"""
PROFILE = """\
extends = "cpu-x86"
[protocol]
rounds = {rounds}
precision = 10.0
block_s = {block}
warmup_s = 0.01
cap_s = 600.0
batches = [1]
"""
QUICK = ["bench", "fitted.onnx", "--recipe", "recipe.toml", "--profile", "quick.toml", "--host", "device"]


def write_work(directory: Path) -> None:
    """A recipe, profiles, and two linear classifiers of digits: fitted, and the same with noise."""
    (directory / "recipe.toml").write_text(RECIPE)
    (directory / "quick.toml").write_text(PROFILE.format(rounds=3, block=0.01))
    (directory / "slow.toml").write_text(PROFILE.format(rounds=40, block=0.05))
    data = digits(16)
    images = (data.train.images.numpy().reshape(len(data.train), -1) / 255 - 0.5) / 0.25
    answers = np.eye(10)[data.train.labels.numpy()]
    weights = np.linalg.lstsq(images, answers, rcond=1e-3)[0].astype(np.float32)
    noise = np.random.default_rng(0).normal(0, weights.std(), weights.shape).astype(np.float32)
    for name, values in (("fitted", weights), ("noisy", weights + 2 * noise)):
        graph = helper.make_graph(
            [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])],
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
            [numpy_helper.from_array(values, "w")],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
                  directory / f"{name}.onnx")  # fmt: skip


def there(server: Server) -> list[Path]:
    """The bundles that lie on the device."""
    return [path.parent for path in server.home.glob(".cache/edgekd/*/bundle.json")]


def variants(file: Path) -> dict[str, Any]:
    document = json.loads(file.read_text())
    (profile,) = document["profiles"]
    return {v["name"]: v for v in profile["variants"]}
