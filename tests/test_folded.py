"""Folding batch norms into a teacher's convolutions: same answers, same paths, the original untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgekd.artifact import ModelSpec
from edgekd.models import Tapped, build
from edgekd.teachers import Frozen
from edgekd.teachers.folded import folded


def warmed(network: nn.Module) -> nn.Module:
    """With statistics, scales and shifts that are not those of a fresh norm."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize(("use", "size"), [("cifar-resnet", 32), ("mobilenet", 32)])
def test_a_folded_network_answers_the_same_and_has_no_norms_left(use: str, size: int) -> None:
    # In float64: how float32 rounds depends on the number of threads, and deep networks magnify it.
    network = warmed(build(ModelSpec(use=use, args={"num_classes": 10, "in_channels": 3}))).double()
    before = copy.deepcopy(network.state_dict())
    image = torch.randn(4, 3, size, size, dtype=torch.float64)
    made = folded(network)
    assert norms(network) > 0
    assert norms(made) == 0
    torch.testing.assert_close(made(image), network(image), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert {p for p, _ in network.named_modules()} == {p for p, _ in made.named_modules()}


def test_tapped_layers_give_what_they_gave() -> None:
    network = warmed(build(ModelSpec(use="cifar-resnet", args={"depth": 8, "num_classes": 10, "in_channels": 3})))
    image, taps = torch.randn(2, 3, 32, 32), ["layer1.0.conv1", "layer2.0.bn2", "layer3"]
    expected = Tapped(network, taps)(image)
    source = Frozen(Tapped(network, taps))
    [found] = source({"image": image}, [{}])
    assert norms(source) == 1  # the one behind the tapped convolution
    for name in ("logits", *taps):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """One convolution feeds two layers, one is used twice, and one network looks at its input."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.shared, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.mean() > 0:
            x = x + 1
        y = self.shared(x)
        z = self.norm(y) + y
        return (self.after(self.twice(self.twice(z)))).mean(dim=(2, 3))


@pytest.mark.parametrize("looks", [False, True])
def test_what_cannot_be_folded_stays(looks: bool) -> None:
    network = warmed(Odd(looks))
    image = torch.randn(2, 3, 8, 8)
    made = folded(network)
    assert norms(made) == 2
    assert torch.equal(made(image), network(image))


class Pair(nn.Module):
    """One convolution in a block of its own and its norm; some networks read a tensor of either elsewhere."""

    def __init__(self, read: str = "") -> None:
        super().__init__()
        self.block, self.norm = nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.block(x))
        if self.read:
            path, _, name = self.read.rpartition(".")
            y = y + getattr(self.get_submodule(path), name).sum()
        return y.mean(dim=(2, 3))


@pytest.mark.parametrize("read", ["", "block.0.weight", "block.0.bias", "norm.weight", "norm.running_mean"])
def test_tensors_that_are_read_elsewhere_stay(read: str) -> None:
    network = warmed(Pair(read))
    image = torch.randn(2, 3, 8, 8)
    made = folded(network)
    assert norms(made) == (1 if read else 0)
    torch.testing.assert_close(made(image), network(image), rtol=1e-5, atol=1e-5)


def normed(network: Pair) -> None:
    # What a checkpoint that is loaded leaves: nothing has been computed with a gradient yet.
    with torch.no_grad(), pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(network.block[0])


HOOKS: dict[str, Callable[[Pair], Any]] = {
    "weight norm": normed,
    "spectral norm": lambda n: nn.utils.spectral_norm(n.block[0]),
    "parametrized": lambda n: nn.utils.parametrizations.weight_norm(n.block[0]),
    "what comes out is changed": lambda n: n.block[0].register_forward_hook(lambda *given: given[2] * 2),
    "and of the block around it": lambda n: n.block.register_forward_hook(lambda *given: given[2] + 1),
    "what goes in is changed": lambda n: n.norm.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    "and what the norm gives": lambda n: n.norm.register_forward_hook(lambda *given: given[2] + 1),
}


@pytest.mark.parametrize("name", HOOKS)
def test_layers_with_hooks_stay(name: str) -> None:
    network = Pair()
    HOOKS[name](network)
    network = warmed(network)
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(image)
        made = folded(network)
        torch.testing.assert_close(made(image), expected, rtol=1e-5, atol=1e-5)
    assert norms(made) == 1


def test_a_tapped_block_gives_what_its_convolution_gave() -> None:
    network = warmed(Pair())
    image = torch.randn(2, 3, 8, 8)
    expected = Tapped(network, ["block"])(image)
    [found] = Frozen(Tapped(network, ["block"]))({"image": image}, [{}])
    for name in ("logits", "block"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
