from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models import build, count, load_weights, specify

SIZE = [3, 32, 32]
DATA = Path(os.environ.get("EDGEKD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
with_data = pytest.mark.skipif(
    not (DATA / "teachers").is_dir(), reason="EDGEKD_DATA names no directory with teachers/ and cifar10/"
)


def network(use: str, **args: object) -> nn.Module:
    return build(specify(use, args, classes=10, size=SIZE, where="m"))


def images() -> tuple[Tensor, Tensor]:
    """25 CIFAR-10 test images of each class, normalised as the networks were trained."""
    from PIL import Image

    mosaics = [np.asarray(Image.open(file).convert("RGB")) for file in sorted((DATA / "cifar10").glob("test-*.webp"))]
    tiles = [m.reshape(50, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(2500, 3, 32, 32) for m in mosaics]
    pixels = np.concatenate(tiles)[::40]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(pixels).float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    labels = np.load(DATA / "cifar10" / "test-labels.npy")[::40].astype(np.int64)
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels)


def published_forward(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """He et al.'s CIFAR ResNet, option A, written down a second time on the bare tensors."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"module.{conv}.weight"], stride=stride, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"module.{bn}.{name}"] for name in names))

    x = conv_bn(x, "conv1", "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            path = f"layer{stage}.{block}"
            y = conv_bn(x, f"{path}.conv1", f"{path}.bn1", stride).clamp(min=0)
            y = conv_bn(y, f"{path}.conv2", f"{path}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + y).clamp(min=0)
    return F.linear(x.mean((2, 3)), state["module.linear.weight"], state["module.linear.bias"])


@with_data
@pytest.mark.parametrize(
    ("depth", "file", "correct"),
    # 91.73 % and 93.39 % of all 10,000 images, as published; these are 250 of them.
    [(20, "resnet20-12fca82f.th", 232), (56, "resnet56-4bfd9763.th", 229)],
)
def test_published_networks_load_and_predict_as_published(depth: int, file: str, correct: int) -> None:
    teacher = network("cifar-resnet", depth=depth)
    load_weights(teacher, DATA / "teachers" / file)
    teacher.eval().to(memory_format=torch.channels_last)
    x, labels = images()
    with torch.no_grad():
        logits = teacher(x)
        state = torch.load(DATA / "teachers" / file, map_location="cpu", weights_only=True)["state_dict"]
        reference = published_forward(state, x[:8].contiguous(), (depth - 2) // 6)
    assert int((logits.argmax(1) == labels).sum()) == correct
    torch.testing.assert_close(logits[:8], reference, rtol=1e-4, atol=1e-4)


def test_resnet20_counts_equal_the_sum_over_its_layers() -> None:
    stem = 16 * 3 * 9 * 32 * 32
    stage1 = 6 * 16 * 16 * 9 * 32 * 32
    stage2 = 32 * 16 * 9 * 16 * 16 + 5 * 32 * 32 * 9 * 16 * 16
    stage3 = 64 * 32 * 9 * 8 * 8 + 5 * 64 * 64 * 9 * 8 * 8
    resnet = network("cifar-resnet", depth=20).train()
    resnet.bn1.eval()
    assert count(resnet, SIZE) == (269_722, stem + stage1 + stage2 + stage3 + 64 * 10)  # 0.27 M as in the paper
    assert resnet.training
    assert not resnet.bn1.training


def test_attention_counts_in_macs() -> None:
    tokens, dim, hidden = 64, 96, 192
    block = tokens * dim * (3 * dim + dim + 2 * hidden) + 2 * tokens * tokens * dim
    vit = network("vit", depth=2)
    assert count(vit, SIZE)[1] == tokens * 4 * 4 * 3 * dim + 2 * block + dim * 10


def test_depthwise_convolutions_count_one_input_each() -> None:
    mobile = network("mobilenet")
    seen = []
    for module in mobile.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, i, o: seen.append(m.weight.numel() * o[0].numel() // o.shape[1]))
    assert count(mobile, SIZE)[1] == sum(seen)
    depthwise = [m.weight.shape for n, m in mobile.named_modules() if n.endswith("depthwise.0")]
    assert [tuple(shape[1:]) for shape in depthwise] == [(1, 3, 3)] * 3 + [(1, 5, 5)] * 5
    assert len(seen) == 1 + 2 + 7 * 3 + 6 * 2 + 1 + 1


def test_shortcuts() -> None:
    block = network("cifar-resnet", depth=8).layer2[0]
    x = torch.randn(1, 16, 4, 4)
    padded = block.shortcut(x)
    assert torch.equal(padded[:, 8:24], x[:, :, ::2, ::2])
    assert padded[:, :8].abs().sum() == padded[:, 24:].abs().sum() == 0
    odd = network("cifar-resnet", depth=8, width=5)
    assert odd(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    plain, convolved = network("cifar-resnet", depth=8), network("cifar-resnet", depth=8, shortcut="conv")
    extra = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert count(convolved, SIZE)[0] - count(plain, SIZE)[0] == extra


def test_vit_attention_is_softmax_attention() -> None:
    attention = network("vit", depth=1).blocks[0].attn
    x = torch.randn(2, 5, 96)
    q, k, v = attention.qkv(x).chunk(3, -1)
    heads = []
    for h in range(3):
        part = slice(32 * h, 32 * h + 32)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 32**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, -1)), rtol=1e-4, atol=1e-5)


def test_convolutions_start_as_he_et_al_propose() -> None:
    weight = network("cifar-resnet", depth=8).layer3[0].conv2.weight
    assert weight.detach().std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


@pytest.mark.parametrize("use", ["cifar-resnet", "mobilenet", "vit"])
def test_gradients_reach_every_parameter(use: str) -> None:
    net = network(use, **({"depth": 2} if use == "vit" else {})).train()
    F.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
