"""Layers that stay float: what ONNX Runtime makes of them, and what `placements` says."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.artifact import ModelSpec, Preprocessing
from edgekd.errors import UsageError
from edgekd.models import Tapped, build
from edgekd.onnx_file import export_onnx, optimised_layers
from edgekd.quant import SCHEMES, calibrate, convert, enable_fake_quant, matrix_layers, placements, prepare
from edgekd.quant.fake_quantize import ActivationFakeQuantize

X86 = SCHEMES["x86-u8s8"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """A stem, two residual blocks, a concatenation, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(image)))
        x = self.mix(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1))
        flat = x.flatten(2)
        x = torch.matmul(flat.softmax(2), flat.transpose(1, 2)).mean(2)
        return self.head(x)


ALL = [
    *("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"),
    *("left", "right", "mix", "head"),
]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def quantized(network: nn.Module, images: Tensor, scheme: str, float_layers: Collection[str]) -> nn.Module:
    prepared = prepare(network, images, SCHEMES[scheme], qat=False, float_layers=float_layers)
    calibrate(prepared, [images])
    return prepared.eval()


@pytest.mark.parametrize(
    ("float_layers", "floats"),
    [
        ((), ()),
        (("stem",), ("stem",)),
        (("blocks.0.conv2",), ("blocks.0.conv2",)),
        (("blocks.0",), ("blocks.0.conv1", "blocks.0.conv2")),
        (("right", "blocks.1.conv1"), ("blocks.1.conv1", "right")),
        (("head", "mix"), ("mix", "head")),
    ],
)
def test_only_what_was_named_stays_float_in_the_runtime(
    network: nn.Module, images: Tensor, tmp_path: Path, float_layers: tuple[str, ...], floats: tuple[str, ...]
) -> None:
    prepared = quantized(network, images, "x86-u8s8", float_layers)
    found = placements(prepared)
    assert [p.path for p in found if p.operation != "matmul"] == ALL
    assert [p.path for p in found if not p.quantized and p.operation != "matmul"] == list(floats)
    assert all(p.reason == "kept in float by choice" for p in found if p.path in floats)
    assert [p.reason for p in found if p.operation == "matmul"] == ["a product of two activations"]
    path = tmp_path / "net.onnx"
    preprocessing = Preprocessing(size=[3, 16, 16], mean=[0.5] * 3, std=[0.5] * 3)
    export_onnx(
        convert(prepared), path, size=[3, 16, 16], opset=18, classes=list("0123456789"), preprocessing=preprocessing
    )
    # All others are fused: a Q/DQ pair missing before or behind a float layer would leave its neighbour float too.
    # One more is float: the product of activations.
    assert optimised_layers(path) == {"int8": len(ALL) - len(floats), "float": len(floats) + 1}


def test_with_every_layer_float_nothing_is_quantized(network: nn.Module, images: Tensor) -> None:
    prepared = prepare(network, images, X86, qat=False, float_layers=ALL)
    calibrate(prepared, [images])
    prepared.eval()
    assert not any(isinstance(m, ActivationFakeQuantize) for m in prepared.modules())
    assert torch.allclose(prepared(images)["logits"], network(images), atol=1e-5)


def test_tensorrt_leaves_the_skip_branch_alone_where_the_convolution_is_float(
    network: nn.Module, images: Tensor
) -> None:
    def count(float_layers: Collection[str]) -> int:
        prepared = quantized(network, images, "trt-s8s8", float_layers)
        adds = [n for n in prepared.network.graph.nodes if str(n.target) == "aten.add.Tensor"]
        return sum(any(a.op == "call_module" for a in n.args) for n in adds)

    assert count(()) == 2
    assert count(["blocks.1.conv2"]) == 1


def test_a_float_layer_computes_with_its_float_weight(network: nn.Module, images: Tensor) -> None:
    prepared = quantized(network, images, "x86-u8s8", [path for path in ALL if path != "mix"])
    with torch.no_grad():
        error = (prepared(images)["logits"] - network(images)).abs().max()
        enable_fake_quant(prepared, False, False)
        assert torch.allclose(prepared(images)["logits"], network(images), atol=1e-5)
    assert 0 < error < 0.05


def test_paths_of_a_tapped_network_and_of_attention() -> None:
    spec = ModelSpec(use="vit", args={"dim": 16, "depth": 1, "heads": 2, "patch": 8})
    vit, x = build(spec).eval(), torch.randn(2, 3, 32, 32)
    found = matrix_layers(Tapped(vit, ["blocks.0"]), x, X86)
    assert found == matrix_layers(vit, x, X86)
    prepared = prepare(Tapped(vit, ["blocks.0"]), x, X86, qat=True, float_layers=["blocks.0"])
    floats = [p for p in placements(prepared) if not p.quantized]
    assert {p.path.rpartition(".")[0] for p in floats} >= {"blocks.0.attn", "blocks.0"}
    assert [p.path for p in placements(prepared) if p.quantized] == [f for f in found if "blocks.0" not in f]


def test_an_unknown_path_is_refused_with_the_nearest(network: nn.Module, images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"(?s)no module 'blocks\.0\.conv3'.*blocks\.0\.conv"):
        prepare(network, images, X86, qat=True, float_layers=["blocks.0.conv3"])
