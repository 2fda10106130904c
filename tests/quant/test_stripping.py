"""Layers taken out of an int8 file, against files that were exported with those layers in float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.onnx_file import export_onnx, optimised_layers
from edgekd.quant import SCHEMES, calibrate, convert, enable_fake_quant, placements, prepare
from edgekd.quant.stripping import in_float, integer_layers

SIZE = [3, 16, 16]


class Everything(nn.Module):
    """A residual sum behind a ReLU, a depthwise layer, hardswish, a gate, a concatenation, tokens and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.left = nn.Conv2d(8, 4, 1)
        self.mlp = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        x = F.relu(x + self.one(x))
        x = F.hardswish(self.two(x))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = torch.cat([x, F.relu(self.left(x))], 1)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + F.gelu(self.mlp(F.layer_norm(tokens, [12])))
        return self.head(tokens.mean(1))


PATHS = ["stem", "one", "two", "gate", "left", "mlp", "head"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Everything().eval()


def exported(network: nn.Module, images: Tensor, floats: list[str], path: Path) -> onnx.ModelProto:
    prepared = prepare(network, images, SCHEMES["x86-u8s8"], qat=False, float_layers=floats)
    calibrate(prepared, [images])
    enable_fake_quant(prepared)
    if not floats:
        assert [place.path for place in placements(prepared) if place.quantized] == PATHS
    preprocessing = Preprocessing(size=SIZE, mean=[0.5] * 3, std=[0.5] * 3)
    export_onnx(convert(prepared), path, size=SIZE, opset=18, classes=list("abcde"), preprocessing=preprocessing)
    return onnx.load(path)


@pytest.fixture(scope="module")
def template(network: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return exported(network, images, [], tmp_path_factory.mktemp("all") / "int8.onnx")


def run(path: Path, images: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": images.numpy()})[0])


@pytest.mark.parametrize("floats", [["one", "two"], ["gate", "mlp"], ["stem", "left", "head"]], ids=str)
def test_what_is_stripped_equals_what_is_exported_that_way(
    network: nn.Module, images: Tensor, template: onnx.ModelProto, floats: list[str], tmp_path: Path
) -> None:
    real = exported(network, images, floats, tmp_path / "real.onnx")
    stripped = in_float(template, {PATHS.index(path) for path in floats})
    onnx.checker.check_model(stripped, full_check=True)
    onnx.save(stripped, tmp_path / "stripped.onnx")
    kinds = [Counter(node.op_type for node in model.graph.node) for model in (real, stripped)]
    for kind in ("QuantizeLinear", "Conv", "MatMul", "Gemm"):
        assert kinds[0][kind] == kinds[1][kind], kind
    layers = optimised_layers(tmp_path / "stripped.onnx")
    assert layers == optimised_layers(tmp_path / "real.onnx")
    assert layers == {"int8": len(PATHS) - len(floats), "float": len(floats)}
    ours, theirs = run(tmp_path / "stripped.onnx", images), run(tmp_path / "real.onnx", images)
    assert np.abs(ours - theirs).max() < 0.06 * np.abs(theirs).max()  # weights stay rounded


def test_all_layers_in_float_are_the_float_network_but_for_rounded_weights(
    network: nn.Module, images: Tensor, template: onnx.ModelProto, tmp_path: Path
) -> None:
    assert integer_layers(template) == len(PATHS)
    before = template.SerializeToString()
    stripped = in_float(template, range(len(PATHS)))
    assert template.SerializeToString() == before
    assert integer_layers(stripped) == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in stripped.graph.node}
    onnx.save(stripped, tmp_path / "float.onnx")
    rounded = Everything().eval()
    rounded.load_state_dict(network.state_dict())
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                scale = module.weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (module.weight.dim() - 1)) / 127
                module.weight.copy_((module.weight / scale).round() * scale)
        expected = rounded(images).numpy()
    # Biases of products of two dimensions are int32 in the file: far finer than this.
    np.testing.assert_allclose(run(tmp_path / "float.onnx", images), expected, atol=1e-4, rtol=1e-4)


def test_nothing_in_float_is_the_same_file(template: onnx.ModelProto) -> None:
    stripped = in_float(template, [])
    assert [node.SerializeToString() for node in stripped.graph.node] == [
        node.SerializeToString() for node in template.graph.node
    ]
