"""Whole blocks: which ones can go, that their removal is exact, and that what is left can be stored."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from edgekd.artifact import ModelSpec
from edgekd.errors import StageError
from edgekd.models import build, changed_attributes, load_state, save_state, specify, without_blocks
from edgekd.pruning import PruningPlan, Target, carry_out, prune
from edgekd.pruning.blocks import residual_blocks
from edgekd.pruning.plan import home_of

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Stranger(nn.Module):
    """Concatenated branches, a grouped convolution, a transformer block, and blocks that only look residual."""

    class Branches(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.left = nn.Conv2d(width, width // 2, 1)
            self.right = nn.Conv2d(width, width // 2, 3, padding=1, groups=2)
            self.mix = nn.Conv2d(width, width, 1, bias=False)
            self.norm = nn.BatchNorm2d(width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.norm(self.mix(torch.cat([self.left(x), self.right(x)], 1))))

    class Scaled(nn.Module):
        """Of its own weights' zero it makes half of what came in: the identity is something else."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x / 2 + self.conv(x)

    class Encoder(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
            self.out = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.out(self.attention(y, y, y, need_weights=False)[0])

    class Gated(nn.Module):
        """Takes two tensors, so that the identity cannot stand in its place."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.conv(y)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 4, 1)
        self.body = nn.Sequential(self.Branches(16), self.Scaled(16), nn.ReLU(), self.Branches(16))
        self.gated, self.encoder = self.Gated(16), self.Encoder(16)
        self.read = self.Branches(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(torch.relu(self.stem(x)))
        x = torch.relu(self.gated(x, x))
        x = self.read(x) * self.read.norm.weight.mean()  # somebody reads a part of it: it has to stay
        return {"logits": self.head(self.encoder(x.flatten(2).transpose(1, 2)).mean(1))}


def made(use: str, **args: object) -> tuple[ModelSpec, nn.Module]:
    torch.manual_seed(0)
    spec = specify(use, args, classes=10, size=[3, 32, 32], where="model")
    return spec, build(spec).eval()


@pytest.mark.parametrize(
    ("use", "args", "blocks"),
    [
        ("cifar-resnet", {"depth": 14, "width": 4}, ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]),
        ("mobilenet", {"width": 0.5}, ["blocks.2", "blocks.4", "blocks.5", "blocks.7"]),
        ("vit", {"depth": 2, "dim": 12}, ["blocks.0", "blocks.1"]),
    ],
)
def test_blocks_with_an_identity_shortcut_are_found(use: str, args: dict[str, object], blocks: list[str]) -> None:
    _, network = made(use, **args)
    before = copy.deepcopy(network.state_dict())
    assert [block.name for block in residual_blocks(network, IMAGE)] == blocks
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_of_a_strangers_network_only_what_can_be_the_identity_is_a_block() -> None:
    torch.manual_seed(0)
    assert [b.name for b in residual_blocks(Stranger().eval(), IMAGE)] == ["body.0", "body.3", "encoder"]


def test_a_block_that_is_not_run_once_is_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, 4), nn.Linear(8, 10)
            self.block, self.unused = Stranger.Branches(8), Stranger.Branches(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(torch.relu(self.stem(x)))).mean((2, 3)))

    assert residual_blocks(Twice().eval(), IMAGE) == []


def pruned(network: nn.Module, share: float, **options: object) -> PruningPlan:
    settings = {"importance": "magnitude", "channel_multiple": 2, "keep_outputs": 10, **options}
    return prune(network, IMAGE, target=Target(macs=share), **settings)


@pytest.mark.parametrize(
    ("use", "args"),
    [
        ("cifar-resnet", {"depth": 14, "width": 16}),
        ("mobilenet", {"width": 0.5}),
        ("vit", {"depth": 3, "dim": 48}),
    ],
)
def test_a_network_without_some_blocks_reloads_bit_for_bit_and_is_pruned_again(tmp_path, use, args) -> None:
    spec, network = made(use, **args)
    # The most harmless: blocks that hardly add anything.
    silent = [block.name for block in residual_blocks(network, IMAGE)][-1]
    for parameter in network.get_submodule(silent).parameters():
        parameter.data.mul_(1e-4)
    image = torch.randn(4, 3, 32, 32)
    for share in (0.8, 0.6):
        before = copy.deepcopy(network)
        plan = PruningPlan.model_validate(json.loads(pruned(network, share, channel_multiple=8).model_dump_json()))
        removed = [block.name for block in plan.blocks if block.removed]
        again = copy.deepcopy(before)
        carry_out(again, plan, IMAGE)
        assert torch.equal(again(image), network(image))
        shallow = copy.deepcopy(before)
        without_blocks(shallow, removed)
        changes = changed_attributes(shallow, network)
        kept = {p: a for p, a in spec.attributes.items() if not any(p.startswith(f"{b}.") for b in removed)}
        attributes = {path: {**kept.get(path, {}), **changes.get(path, {})} for path in kept.keys() | changes.keys()}
        spec = spec.model_copy(update={"removed": [*spec.removed, *removed], "attributes": attributes})
    assert silent in spec.removed
    assert isinstance(network.get_submodule(silent), nn.Identity)
    save_state(network, tmp_path / "model.safetensors")
    rebuilt = build(ModelSpec.model_validate_json(spec.model_dump_json())).eval()
    assert [t.shape for t in rebuilt.state_dict().values()] == [t.shape for t in network.state_dict().values()]
    load_state(rebuilt, tmp_path / "model.safetensors")
    assert torch.equal(rebuilt(image), network(image))


def test_what_a_removed_block_costs_and_harms_stands_in_the_plan() -> None:
    _, network = made("cifar-resnet", depth=14, width=8)
    whole = copy.deepcopy(network)
    for parameter in network.layer2[1].parameters():
        parameter.data.mul_(1e-3)
    silenced = copy.deepcopy(network)
    plan = pruned(network, 0.97, channel_multiple=8)
    gone = [block for block in plan.blocks if block.removed]
    assert [block.name for block in gone] == ["layer2.1"]
    assert gone[0].saved == 2 * 16 * 16 * 9 * 16 * 16  # two 3x3 convolutions of 16 channels on 16x16 pixels
    assert gone[0].saved == plan.macs_before - plan.macs_after
    assert gone[0].saved_measured is not None
    assert gone[0].saved_measured.value == gone[0].saved
    zeroed = copy.deepcopy(silenced)
    for parameter in zeroed.layer2[1].parameters():
        parameter.data.zero_()
    image = torch.randn(3, 3, 32, 32)
    assert torch.allclose(network(image), zeroed(image), atol=1e-6)
    with torch.no_grad():
        p, q = (n(IMAGE).double().log_softmax(1) for n in (silenced, zeroed))
    assert gone[0].harm == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-9)
    inner = next(g for g in plan.groups if g.name == "layer2.1.conv1")
    assert (inner.channels_after, inner.block) == (0, "layer2.1")
    assert "went with the block layer2.1" in inner.reason_kept
    assert {b.name: b.reason_kept for b in plan.blocks if not b.removed}.keys() == {"layer1.0", "layer1.1", "layer3.1"}
    assert whole.layer2[1].conv1.out_channels == 16


def test_a_group_goes_with_the_blocks_that_it_lies_in_and_only_with_them() -> None:
    assert home_of(["a.1.conv", "a.1.bn"], ["a.1", "a.2"]) == "a.1"
    assert home_of(["a.1.conv", "a.2.conv"], ["a.2", "a.1"]) == "a.1 and a.2"
    assert home_of(["a.1.conv", "a.3.conv"], ["a.1", "a.2"]) is None
    assert home_of(["a.10.conv"], ["a.1"]) is None


def test_blocks_are_protected_by_pattern_by_what_looks_into_them_and_by_choice() -> None:
    def reasons(**options: object) -> dict[str, str | None]:
        _, network = made("cifar-resnet", depth=14, width=8)
        return {b.name: b.reason_kept for b in pruned(network, 0.9, channel_multiple=8, **options).blocks}

    found = reasons(protected=["layer1.0", "layer2.1.conv2"], tapped=["layer3.1.bn1", "layer1.1"])
    assert found["layer1.0"] == "protected by 'layer1.0'"
    assert found["layer2.1"] == "protected by 'layer2.1.conv2'"
    assert found["layer3.1"] == "an objective looks at layer3.1.bn1"
    assert found["layer1.1"] in (None, "the target was met without it")  # the block's own output is there without it
    assert reasons(depth=False) == {}
    assert reasons(strategy="uniform") == {}


def test_a_stranger_is_pruned_and_grouped_convolutions_say_why_they_stay() -> None:
    torch.manual_seed(0)
    network = Stranger().eval()
    plan = pruned(network, 0.6)
    assert plan.achieved <= 0.6
    assert network(torch.randn(2, 3, 32, 32))["logits"].shape == (2, 10)
    assert any("grouped convolution" in (g.reason_kept or "") for g in plan.groups)


def test_a_spec_that_removes_what_is_not_there_is_one_message() -> None:
    spec, _ = made("cifar-resnet", depth=8, width=4)
    with pytest.raises(StageError, match="removes 'layer9', which the network does not have"):
        build(spec.model_copy(update={"removed": ["layer9"]}))
