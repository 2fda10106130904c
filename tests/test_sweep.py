"""The sweep of a network: its figures against changes made by hand, and what it says of what stays."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from edgekd.errors import StageError
from edgekd.report.sensitivity import harm_at
from edgekd.sweep import sweep


class Network(nn.Module):
    """A stem, a residual block and two linear layers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
            self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 8, 3, 2, 1), self.Block()
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.block(torch.relu(self.stem(x))).mean((2, 3)))))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    made = Network()
    for norm in (made.block.bn1, made.block.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    made.head.weight.data *= 6
    return made.train()


def batches(first: int, count: int, labelled: bool = True) -> list[dict[str, Tensor]]:
    data = load_digits()
    images = torch.tensor(data.images[first : first + count], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target[first : first + count]) if labelled else torch.full((count,), -1)
    images = functional.interpolate(images, size=16)
    half = count // 2
    return [{"image": images[:half], "label": labels[:half]}, {"image": images[half:], "label": labels[half:]}]


OPTIONS: dict[str, Any] = {"channel_multiple": 4, "scheme": "x86-u8s8", "keep_outputs": 10}


@pytest.fixture(scope="module")
def document(network: nn.Module) -> dict[str, Any]:
    return sweep(network, batches(0, 60), calibration=batches(60, 60), **OPTIONS)


def whole(found: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([b["image"] for b in found]), torch.cat([b["label"] for b in found])


def effect(before: Tensor, after: Tensor, labels: Tensor) -> tuple[float, float]:
    """KL in nats and the drop of the accuracy, in NumPy."""
    a, b = (x.detach().double().numpy() for x in (before, after))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    right = [(x.argmax(1) == labels.numpy()).mean() for x in (a, b)]
    return float((np.exp(p) * (p - q)).sum(1).mean()), float(right[0] - right[1])


def test_channels_and_blocks_are_those_of_surgery_by_hand(network: nn.Module, document: dict[str, Any]) -> None:
    images, labels = whole(batches(0, 60))
    plain = copy.deepcopy(network).eval()
    before = plain(images)
    assert document["accuracy"] == pytest.approx(float((before.argmax(1) == labels).float().mean()))
    macs = 64 * (72 + 2 * 8 * 12 * 9) + 8 * 16 + 16 * 10
    assert document["macs"] == macs
    inner = next(g for g in document["groups"] if g["name"] == "block.conv1")
    assert [step["left"] for step in inner["steps"]] == [12, 8, 4]
    order = plain.block.conv1.weight.detach().flatten(1).norm(dim=1).argsort()
    for step in inner["steps"]:
        masked = copy.deepcopy(plain)
        gone = order[: 12 - step["left"]]
        masked.block.conv2.weight.data[:, gone] = 0
        assert (step["harm"], step["drop"]) == pytest.approx(effect(before, masked(images), labels), rel=1e-4, abs=1e-9)
        assert step["macs"] == pytest.approx(1 - 64 * 2 * 8 * 9 * len(gone) / macs)
    [block] = document["blocks"]
    shortcut = copy.deepcopy(plain)
    shortcut.block = nn.Identity()
    assert (block["harm"], block["drop"]) == pytest.approx(effect(before, shortcut(images), labels), rel=1e-4)
    assert block["macs"] == pytest.approx(64 * 2 * 8 * 12 * 9 / macs)
    assert block["harm"] > 1e-3


def test_a_layer_in_int8_is_the_network_with_that_layer_rounded_by_hand(
    network: nn.Module, document: dict[str, Any]
) -> None:
    assert {row["name"] for row in document["layers"]} == {"stem", "block.conv1", "block.conv2", "hidden", "head"}
    images, labels = whole(batches(0, 60))
    plain = copy.deepcopy(network).eval()
    read: dict[str, list[Tensor]] = {"hidden": [], "head": []}
    rounded = copy.deepcopy(plain)
    for name in read:
        plain.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: read[name].append(args[0]))
    with torch.no_grad():
        for batch in batches(60, 60):
            plain(batch["image"])
        for name in read:
            # Activations behind ReLUs: from 0 to the mean of each batch's largest, in 255 steps.
            scale = float(torch.stack([x.max() for x in read[name]]).mean()) / 255
            layer = rounded.get_submodule(name)
            weight = layer.weight.detach()
            step = weight.abs().amax(1, keepdim=True) / 127
            one = copy.deepcopy(rounded)
            one.get_submodule(name).weight.data = (weight / step).round() * step
            one.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, scale=scale: ((args[0] / scale).round().clamp(0, 255) * scale,)
            )
            row = next(r for r in document["layers"] if r["name"] == name)
            assert (row["harm"], row["drop"]) == pytest.approx(effect(plain(images), one(images), labels), rel=0.1)
            assert row["harm"] > 1e-7


def test_lists_begin_with_what_is_most_harmful_and_nothing_is_changed(
    network: nn.Module, document: dict[str, Any]
) -> None:
    harms = [row["harm"] for row in document["layers"]]
    assert harms == sorted(harms, reverse=True)
    halves = [harm_at(g, 0.5) for g in document["groups"] if g["steps"]]
    assert halves == sorted(halves, key=lambda value: -(value or 0.0))
    assert [g["name"] for g in document["groups"] if g["reason"]] == ["head"]
    assert network.training
    again = sweep(network, batches(0, 60), calibration=batches(60, 60), **OPTIONS)
    assert json.loads(json.dumps(again)) == document


def test_images_without_labels_have_harm_and_no_drop(network: nn.Module) -> None:
    found = sweep(network, batches(0, 20, labelled=False), calibration=batches(60, 20), **OPTIONS)
    assert found["accuracy"] is None
    rows = [*found["blocks"], *found["layers"], *(s for g in found["groups"] for s in g["steps"])]
    assert {row["drop"] for row in rows} == {None}
    assert max(row["harm"] for row in rows) > 0


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_importances_that_need_labels_say_so_where_there_are_none(network: nn.Module, importance: Any) -> None:
    options = {**OPTIONS, "importance": importance}
    found = sweep(network, batches(0, 20), calibration=batches(60, 20, labelled=False), **options)
    assert found["not_pruned"] == f'importance = "{importance}" needs labels, and no calibration image has one'
    assert (found["groups"], found["blocks"]) == ([], [])


def test_what_cannot_be_quantized_can_still_be_pruned_and_the_document_says_why() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3, 2), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return self.b(y.mean((2, 3)) if float(y.detach().sum()) >= 0 else y.amax((2, 3)))

    torch.manual_seed(0)
    found = sweep(Choosing().eval(), batches(0, 20), calibration=batches(60, 20), **OPTIONS)
    assert found["layers"] == []
    assert found["not_quantized"].startswith("torch.export cannot trace")
    assert found["not_pruned"] is None
    assert [g["name"] for g in found["groups"] if g["steps"]] == ["a"]


def test_a_network_without_a_layer_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(256, 10))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.matrix

    with pytest.raises(StageError, match="nothing to sweep: no layer was found") as raised:
        sweep(Bare().eval(), batches(0, 4), calibration=batches(60, 4), **OPTIONS)
    assert raised.value.problems[0].where == "sensitivity"
