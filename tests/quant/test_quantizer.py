"""Placement, seen from what ONNX Runtime makes of it and from the annotated graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.onnx_file import compare, export_onnx, optimised_layers
from edgekd.quant import SCHEMES, calibrate, convert, prepare
from edgekd.quant.fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize


class Mixed(nn.Module):
    """ReLU6, max pooling, concatenation, a gate, and a weight that is calculated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2))
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.right = nn.Conv2d(8, 4, 1)
        self.gate = nn.Conv2d(12, 12, 1)
        self.last = nn.Conv2d(12, 12, 1, bias=False)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.conv2d(x, self.last.weight * 0.5)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def prepared(scheme: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16) * 4
    network = prepare(Mixed().eval(), images, SCHEMES[scheme], qat=False)
    calibrate(network, [images])
    return network, images


def test_every_layer_with_a_stored_weight_becomes_integer(tmp_path: Path) -> None:
    network, images = prepared("x86-u8s8")
    converted = convert(network)
    path = tmp_path / "mixed.onnx"
    preprocessing = Preprocessing(size=[3, 16, 16], mean=[0.5] * 3, std=[0.5] * 3)
    export_onnx(converted, path, size=[3, 16, 16], opset=18, classes=list("abcde"), preprocessing=preprocessing)
    # Float: the convolution whose weight is calculated.
    assert optimised_layers(path) == {"int8": 5, "float": 1}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["QLinearConcat"] == 1
    assert kinds["QLinearMul"] == 1
    assert kinds["Clip"] == 0  # absorbed by the quantization behind it
    found = compare(path, converted, images, lambda feed: {"logits": session.run(None, feed)[0]})
    assert found["max_abs_difference"] < 0.05 * found["max_abs_logit"]


def test_pooled_and_moved_values_are_not_observed_again() -> None:
    network, _ = prepared("x86-u8s8")
    graph = network.network.graph
    modules = [
        network.network.get_submodule(n.target)
        for n in graph.nodes
        if n.op == "call_module" and isinstance(network.network.get_submodule(n.target), ActivationFakeQuantize)
    ]
    assert len(modules) == len(set(modules))


def test_tensorrt_quantizes_only_what_enters_matrix_layers() -> None:
    network, _ = prepared("trt-s8s8")
    inner = network.network
    quantized = [n for n in inner.graph.nodes if n.op == "call_module"]
    readers = {str(user.target).split(".")[1] for n in quantized for user in n.users}
    assert readers == {"conv2d", "linear"}
    kinds = Counter(type(inner.get_submodule(n.target)) for n in quantized)
    assert kinds[WeightPerChannelFakeQuantize] == 5
    assert all(
        m.zero_point.item() == 0 and m.quant_min == -128
        for m in network.modules()
        if isinstance(m, ActivationFakeQuantize)
    )
