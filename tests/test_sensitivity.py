"""What one change does to a network's answers, against masking by hand and NumPy's own formula."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from edgekd.errors import StageError
from edgekd.pruning import candidates, sensitivity
from edgekd.pruning.prefix import Calls
from edgekd.pruning.search import Candidate
from edgekd.pruning.sensitivity import Change, effects, harm


class Block(nn.Module):
    """A residual block that changes a tensor in place, which what is kept for reuse must not notice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        y += x
        return y.relu_()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.hidden, self.norm, self.head = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn(self.stem(x)).relu_().mul_(0.5)).mean((2, 3))
        return self.head(torch.relu(self.norm(self.hidden(x))))


@pytest.fixture(scope="module")
def images() -> Tensor:
    digits = torch.tensor(load_digits().images[:48], dtype=torch.float32)[:, None] / 8 - 1
    return functional.interpolate(digits, size=16)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    made = Network()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    made.head.weight.data *= 4
    return made.train()


@pytest.fixture(scope="module")
def found(network: nn.Module, images: Tensor) -> list[Candidate]:
    made = candidates.find(network, images[:1], importance="magnitude", channel_multiple=2, keep_outputs=10)
    return made.candidates


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL of two logits in float64 NumPy."""
    a, b = (x.detach().numpy().astype(np.float64) for x in (p, q))
    a, b = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    return float((np.exp(a) * (a - b)).sum(1).mean())


def test_harm_of_an_inner_group_is_that_of_its_channels_masked_behind_the_norm(
    network: nn.Module, found: list[Candidate], images: Tensor
) -> None:
    state = {key: value.clone() for key, value in network.state_dict().items()}
    harms = harm(network, found, [images[:20], images[20:]])
    assert network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert harms == harm(network, found, [images[:20], images[20:]])
    inner = next(c for c in found if c.name == "blocks.1.conv1")
    assert inner.steps == [0, 2, 4, 6]
    whole = copy.deepcopy(network).eval()
    block = whole.blocks[1]
    norms = block.conv1.weight.detach().flatten(1).norm(dim=1).numpy()
    before = whole(images)
    assert harms["blocks.1.conv1"][0] == 0
    for gone, value in zip(inner.steps[1:], harms["blocks.1.conv1"][1:], strict=True):
        mask = torch.ones(8, 1, 1)
        mask[np.argsort(norms, kind="stable")[:gone].copy()] = 0
        handle = block.bn1.register_forward_hook(lambda _module, _args, y, mask=mask: y * mask)
        assert value == pytest.approx(divergence(before, whole(images)), rel=1e-4)
        assert value > 1e-3
        handle.remove()


def test_a_group_behind_a_layer_norm_is_measured_as_surgery_leaves_it(
    network: nn.Module, found: list[Candidate], images: Tensor
) -> None:
    group = next(c for c in found if c.name == "hidden")
    whole = copy.deepcopy(network).eval()
    before = whole(images)
    kept = sorted(np.argsort(whole.hidden.weight.detach().norm(dim=1).numpy(), kind="stable")[4:].tolist())
    features: list[Tensor] = []
    whole.hidden.register_forward_hook(lambda _module, _args, y: features.append(y))
    whole(images)
    small = functional.layer_norm(features[0][:, kept], (8,), whole.norm.weight[kept], whole.norm.bias[kept])
    after = torch.relu(small) @ whole.head.weight[:, kept].T + whole.head.bias
    measured = harm(network, [group], [images])["hidden"]
    assert measured[group.steps.index(4)] == pytest.approx(divergence(before, after), rel=1e-4)


def test_harm_of_a_block_is_that_of_the_identity_in_its_place(
    network: nn.Module, found: list[Candidate], images: Tensor
) -> None:
    assert {c.name for c in found} >= {"blocks.0", "blocks.1", "stem"}
    harms = harm(network, found, [images])
    for index in range(2):
        whole = copy.deepcopy(network).eval()
        before = whole(images)
        whole.blocks[index] = nn.Identity()
        assert harms[f"blocks.{index}"] == [0, pytest.approx(divergence(before, whole(images)), rel=1e-4)]


def test_what_runs_before_a_change_is_reused_and_changes_nothing(
    network: nn.Module, found: list[Candidate], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls.of(copy.deepcopy(network).eval(), images[:1])
    last = next(c for c in found if c.name == "blocks.1.conv1")
    assert calls.before(network, last.group.layers) == ["stem", "bn", "blocks.0"]
    assert calls.before(network, ["blocks.1.bn2", "head"]) == ["stem", "bn", "blocks.0", *_inside("blocks.1", 3)]
    assert calls.before(network, ["stem"]) == []
    fast = harm(network, found, [images])
    monkeypatch.setattr(Calls, "before", lambda *_: [])
    assert harm(network, found, [images]) == fast


def _inside(block: str, count: int) -> list[str]:
    return [f"{block}.{name}" for name in ("conv1", "bn1", "conv2")][:count]


def test_a_module_that_runs_again_behind_the_change_is_not_reused(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, 1, 1)
            self.between, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.between(torch.relu(self.shared(torch.relu(self.first(x)))))
            return self.head(self.shared(torch.relu(x)).mean((2, 3)))

    torch.manual_seed(0)
    network = Twice().eval()
    assert Calls.of(network, images[:1]).before(network, ["between"]) == ["first"]
    zeroed = copy.deepcopy(network)
    nn.init.zeros_(zeroed.between.weight)
    change = Change(lambda n: n.between.weight.data.zero_(), ("between",))
    effect = effects(network, {"between": change}, [(images, None)])["between"]
    assert effect.divergence == pytest.approx(divergence(network(images), zeroed(images)), rel=1e-4)


def test_many_steps_are_measured_at_some_points_with_straight_lines_between(network: nn.Module, images: Tensor) -> None:
    made = candidates.find(network, images[:1], importance="magnitude", channel_multiple=1, keep_outputs=10)
    group = next(c for c in made.candidates if c.name == "hidden")
    assert group.steps == list(range(12))
    every = harm(network, [group], [images], points=11)["hidden"]
    some = harm(network, [group], [images], points=3)["hidden"]
    known = [0, 4, 7, 11]
    assert [some[i] for i in known] == [every[i] for i in known]
    np.testing.assert_allclose(some, np.interp(range(12), known, [every[i] for i in known]), rtol=1e-12)
    assert some != every
    assert inspect.signature(harm).parameters["points"].default == sensitivity.POINTS


def test_a_reference_of_its_own_makes_harm_the_growth_of_the_divergence_from_it(
    network: nn.Module, found: list[Candidate], images: Tensor
) -> None:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval()
    whole, block = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    block.blocks[0] = nn.Identity()
    grown = divergence(teacher(images), block(images)) - divergence(teacher(images), whole(images))
    one = [c for c in found if c.name == "blocks.0"]
    assert harm(network, one, [images], reference=teacher) == {"blocks.0": [0, pytest.approx(grown, rel=1e-4)]}


def test_drop_is_what_the_accuracy_falls_by(network: nn.Module, images: Tensor) -> None:
    whole, changed = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    labels = whole(images).argmax(1)
    labels[:12] = (labels[:12] + 1) % 10
    changed.blocks[1] = nn.Identity()
    change = Change(lambda n: setattr(n.blocks, "1", nn.Identity()), ("blocks.1",))
    batches = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    found = effects(network, {"b": change}, batches)["b"]
    assert found.drop == pytest.approx(36 / 48 - float((changed(images).argmax(1) == labels).float().mean()))
    assert effects(network, {"b": change}, [(images, None)])["b"].drop is None


def test_no_images_and_answers_that_are_not_finite(network: nn.Module, found: list[Candidate], images: Tensor) -> None:
    with pytest.raises(StageError, match="no calibration images"):
        harm(network, found, [])
    broken = copy.deepcopy(network)
    broken.head.bias.data[0] = float("nan")
    with pytest.raises(StageError, match="not finite"):
        harm(broken, found, [images])
