"""Pruning: what is removed, how near the target it comes, and that what remains still computes the same."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from edgekd.errors import StageError, UsageError
from edgekd.pruning import PruningPlan, Target, count_macs, count_parameters, prune
from edgekd.registry import validation_problems

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block of a CIFAR ResNet; its shortcut is a 1x1 convolution, or a slice and a pad without weights."""

    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 and not padded else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.down is not None:
            x = self.down(x)
        elif self.stride > 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, width: int = 16, padded: bool = True, inputs: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1, padded),
            Block(width, 2 * width, 2, padded),
            Block(2 * width, 4 * width, 2, padded),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


class Mobile(nn.Module):
    """Two inverted residuals with depthwise convolutions and squeeze-excite."""

    class Cell(nn.Module):
        def __init__(self, width: int, hidden: int) -> None:
            super().__init__()
            self.expand, self.bn1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
            self.depth = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
            self.bn2 = nn.BatchNorm2d(hidden)
            self.squeeze, self.excite = nn.Conv2d(hidden, 16, 1), nn.Conv2d(16, hidden, 1)
            self.project, self.bn3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.hardswish(self.bn1(self.expand(x)))
            y = functional.hardswish(self.bn2(self.depth(y)))
            gate = functional.hardsigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
            return x + self.bn3(self.project(y * gate))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 4, 1)
        self.cells = nn.Sequential(self.Cell(32, 96), self.Cell(32, 64))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.cells(self.stem(x)).mean((2, 3)))}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, self.num_heads * self.head_dim))


class ViT(nn.Module):
    class Layer(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
            self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 96), nn.Linear(96, width)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.place = nn.Parameter(torch.randn(1, 17, 32))
        self.layers = nn.Sequential(self.Layer(32, 4), self.Layer(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.layers(x))[:, 0])


class Chain(nn.Sequential):
    """Convolutions without normalisation, of the given widths, and a classifier."""

    def __init__(self, *widths: int) -> None:
        pairs = itertools.pairwise((3, *widths))
        layers = [layer for i, o in pairs for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.ReLU())]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


#: What makes the residual stream of a ResNet without padded shortcuts.
STREAM = ["conv", "blocks.*.conv2", "blocks.*.down"]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def pruned(
    make: Callable[[], nn.Module], share: float, multiple: int = 16, **options: object
) -> tuple[nn.Module, PruningPlan]:
    network = seeded(make)
    settings = {"target": Target(macs=share), "importance": "magnitude", "keep_outputs": 10, "depth": False, **options}
    return network, prune(network, IMAGE, channel_multiple=multiple, **settings)


def group(plan: PruningPlan, name: str):
    return next(g for g in plan.groups if g.name == name)


@pytest.mark.parametrize(
    ("make", "share", "multiple"),
    [
        (ResNet, 0.7, 16),
        (lambda: ResNet(32), 0.5, 16),
        (lambda: ResNet(16, padded=False), 0.45, 8),
        (lambda: ResNet(16, padded=False), 0.5, 1),
        (Mobile, 0.6, 16),
        (Mobile, 0.5, 1),
        (ViT, 0.6, 16),
        (ViT, 0.5, 4),
    ],
)
def test_measured_share_is_just_below_the_target_and_widths_are_multiples(make, share, multiple) -> None:
    network, plan = pruned(make, share, multiple)
    assert share * (0.85 if multiple > 4 else 0.95) < plan.achieved <= share
    assert plan.achieved == count_macs(network, IMAGE) / count_macs(seeded(make), IMAGE)
    assert plan.parameters_after == sum(p.numel() for p in network.parameters()) < plan.parameters_before
    for g in plan.removed():
        assert g.channels_after % multiple == 0
        assert g.channels_after == g.channels_before - len(g.removed)
        assert network.get_submodule(g.name).weight.shape[0] == g.channels_after
        assert g.reason_kept is None
        assert 0 < g.importance_removed_share < 1
    assert all(g.reason_kept for g in plan.groups if not g.removed)
    out = network(torch.randn(2, 3, 32, 32))
    assert (out["logits"] if isinstance(out, dict) else out).shape == (2, 10)
    assert not any(g.removed for g in plan.groups if g.name == "head")


def test_macs_are_those_of_the_formula_and_parameters_are_counted_once() -> None:
    network = Chain(8, 12)
    assert count_macs(network, IMAGE) == 16 * 16 * 8 * 3 * 9 + 8 * 8 * 12 * 8 * 9 + 12 * 10
    assert count_parameters(network) == (3 * 9 + 1) * 8 + (8 * 9 + 1) * 12 + 13 * 10


@pytest.mark.parametrize("measure", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.65, 0.8, 0.95])
def test_no_channels_could_be_given_back(share, measure) -> None:
    """Brute force over all settings of a small network, by the formula."""

    def cost(a: int, b: int, c: int) -> int:
        if measure == "parameters":
            return (27 + 1) * a + (9 * a + 1) * b + (9 * b + 1) * c + 10 * (c + 1)
        return 256 * 27 * a + 64 * 9 * a * b + 16 * 9 * b * c + 10 * c

    full = cost(16, 24, 32)
    plan = pruned(lambda: Chain(16, 24, 32), share, 4, target=Target(**{measure: share}))[1]
    widths = tuple(group(plan, name).channels_after for name in ("0", "2", "4"))
    shares = {w: cost(*w) / full for w in itertools.product(range(4, 17, 4), range(4, 25, 4), range(4, 33, 4))}
    assert plan.achieved == pytest.approx(shares[widths], abs=1e-12)
    wider = [s for w, s in shares.items() if w != widths and all(x >= y for x, y in zip(w, widths, strict=True))]
    assert min(wider) > share


def test_magnitude_removes_the_filters_of_least_l2_norm() -> None:
    before = seeded(lambda: ResNet(16, padded=False))
    network, plan = pruned(lambda: ResNet(16, padded=False), 0.7, 4, protected=STREAM)
    inner = group(plan, "blocks.2.conv1")
    norms = before.blocks[2].conv1.weight.detach().flatten(1).norm(dim=1)
    assert inner.removed == sorted(norms.argsort()[: len(inner.removed)].tolist()) != []
    assert inner.importance_removed_share == pytest.approx(float(norms[inner.removed].sum() / norms.sum()), rel=1e-5)
    left = [i for i in range(64) if i not in inner.removed]
    assert torch.equal(
        network.blocks[2].conv1.weight, before.blocks[2].conv1.weight[left][:, : len(before.bn.weight) * 2]
    )
    assert torch.equal(network.blocks[2].bn1.running_var, before.blocks[2].bn1.running_var[left])


def test_coupled_layers_are_ranked_together() -> None:
    before = seeded(lambda: ResNet(16, padded=False))
    # Only the stream of the last block may go: everything else is protected.
    options = {"protected": ["conv", "*.conv1", "blocks.0.*", "blocks.1"]}
    plan = pruned(lambda: ResNet(16, padded=False), 0.9, 16, **options)[1]
    stream = group(plan, "blocks.2.conv2")
    assert set(stream.layers) == {"blocks.2.conv2", "blocks.2.bn2", "blocks.2.down", "head"}
    last = before.blocks[2]
    norms = (last.conv2.weight.flatten(1).square().sum(1) + last.down.weight.flatten(1).square().sum(1)).sqrt()
    assert stream.removed == sorted(norms.argsort()[: len(stream.removed)].tolist()) != []
    assert [g.name for g in plan.removed()] == ["blocks.2.conv2"]


def test_bn_scale_removes_the_smallest_gammas() -> None:
    before = seeded(lambda: ResNet(32))
    for block, other in (("blocks.1", "blocks.2"), ("blocks.2", "blocks.1")):
        plan = pruned(lambda: ResNet(32), 0.95, 16, importance="bn-scale", protected=["blocks.0", other])[1]
        g = group(plan, f"{block}.conv1")
        gammas = before.get_submodule(block).bn1.weight.detach().abs()
        assert g.removed == sorted(gammas.argsort()[: len(g.removed)].tolist()) != []


def test_bn_scale_leaves_channels_without_a_batch_norm() -> None:
    with pytest.raises(UsageError, match=r'cannot be reached(.|\n)*hint: use importance = "magnitude"'):
        pruned(ViT, 0.5, 4, importance="bn-scale")


def test_taylor_ranks_by_weight_times_gradient_on_real_images() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = functional.interpolate(torch.tensor(digits.images[:64], dtype=torch.float32)[:, None] / 16, size=32)
    labels = torch.tensor(digits.target[:64])
    network = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 1), *Chain(12, 16, 16)))
    calls = []

    def loss(n: nn.Module) -> Tensor:
        calls.append(n.training)
        return functional.cross_entropy(n(images), labels)

    reference = copy.deepcopy(network)
    loss(reference).backward()
    conv, after = reference[3], reference[5]
    score = (conv.weight * conv.weight.grad).abs().flatten(1).sum(1)
    score = score + (after.weight * after.weight.grad).abs().sum((0, 2, 3))
    plan = prune(network, images[:1], target=Target(macs=0.6), importance="taylor", channel_multiple=4, loss=loss)
    g = group(plan, "3")
    assert g.removed == sorted(score.argsort()[: len(g.removed)].tolist()) != []
    assert len(calls) == 2
    assert all(p.grad is None for p in network.parameters())
    assert functional.cross_entropy(network(images), labels).isfinite()


def test_removing_dead_channels_changes_nothing() -> None:
    network = seeded(lambda: ResNet(16, padded=False))
    dead = {"blocks.1": [1, 5, 8, 9, 14, 20, 27, 31], "blocks.2": list(range(3, 64, 2))[:24]}
    for name, channels in dead.items():
        block = network.get_submodule(name)
        for tensor in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
            tensor.data[channels] = 0
        block.bn1.running_mean[channels] = 0
    image = torch.randn(4, 3, 32, 32)
    before = network(image).detach()
    macs = 8 * 9 * (16 * 256 + 32 * 256) + 24 * 9 * (32 * 64 + 64 * 64)  # of what is dead
    share = 1 - 0.98 * macs / count_macs(network, IMAGE)
    options = {
        "importance": "magnitude",
        "channel_multiple": 8,
        "protected": ["conv", "blocks.*.conv2", "blocks.*.down"],
    }
    plan = prune(network, IMAGE, target=Target(macs=share), **options)
    assert plan.removed()
    for g in plan.removed():
        assert set(g.removed) <= set(dead[g.name.removesuffix(".conv1")])
        assert g.importance_removed_share == 0
    assert torch.allclose(network(image), before, atol=1e-5)


def test_heads_go_whole_and_the_rest_of_attention_stays_exact() -> None:
    network = seeded(ViT)
    size, image = 8, torch.randn(2, 3, 32, 32)
    attention = network.layers[0].attention
    for part in range(3):  # head 2 is dead: its queries, keys, values, and what reads it
        attention.qkv.weight.data[part * 32 + 2 * size : part * 32 + 3 * size] = 0
        attention.qkv.bias.data[part * 32 + 2 * size : part * 32 + 3 * size] = 0
    attention.proj.weight.data[:, 2 * size : 3 * size] = 0
    before = network(image).detach()
    plan = prune(
        network,
        IMAGE,
        target=Target(parameters=0.99),
        importance="magnitude",
        channel_multiple=8,
        protected=["patch", "*.fc1", "layers.1"],
    )
    heads = group(plan, "layers.0.attention.qkv")
    assert heads.removed == [part * 32 + 2 * size + row for part in range(3) for row in range(size)]
    assert heads.attributes == {"layers.0.attention": {"num_heads": 3}}
    assert (attention.num_heads, attention.qkv.out_features, attention.proj.in_features) == (3, 72, 24)
    assert torch.allclose(network(image), before, atol=1e-5)


def test_padded_shortcuts_are_left_alone_with_the_reason() -> None:
    network, plan = pruned(lambda: ResNet(32), 0.5, 16)
    stream = group(plan, "conv")
    assert {"conv", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"} <= set(stream.layers)
    assert not stream.removed
    assert "different widths" in stream.reason_kept
    assert network.conv.out_channels == 32
    assert "outputs of the network" in group(plan, "head").reason_kept


class Swapped(nn.Module):
    """Reads halves of its channels by position: Torch-Pruning sees a sum, which only trying shows to be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 32, 3, 4), nn.Conv2d(32, 64, 3, 2), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.relu(x.roll(1, 1))
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


def test_channels_that_are_addressed_by_position_are_left_alone() -> None:
    network, plan = pruned(Swapped, 0.6, 8)
    assert network.a.out_channels == 32
    assert "position" in group(plan, "a").reason_kept
    assert group(plan, "b").removed


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 32, 3, 4), nn.Conv2d(32, 64, 3, 2), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x.reshape(len(x), 32, *x.shape[2:]).relu())
        return self.head(x.mean((2, 3)))


def test_a_width_written_into_the_forward_pass_is_left_alone() -> None:
    network, plan = pruned(Fixed, 0.6, 8)
    assert network.a.out_channels == 32
    assert "does not run" in group(plan, "a").reason_kept


class Dense(nn.Module):
    """Concatenation: one layer reads two groups; and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, 4), nn.Conv2d(32, 32, 3, 1, 1)
        self.norm, self.c, self.head = nn.GroupNorm(4, 32), nn.Conv2d(64, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.cat([x, torch.relu(self.b(x))], 1)
        return self.head(torch.relu(self.norm(self.c(x))).mean((2, 3)))


def test_concatenated_groups_and_group_norms_are_pruned_at_the_right_places() -> None:
    before = seeded(Dense)
    network, plan = pruned(Dense, 0.2, 2)
    a, b, c = (group(plan, name) for name in "abc")
    assert a.removed
    assert b.removed
    assert c.channels_after % 4 == 0
    left = [i for i in range(64) if i not in a.removed and i - 32 not in b.removed]
    rows = [i for i in range(32) if i not in c.removed]
    assert torch.equal(network.c.weight, before.c.weight[rows][:, left])


def test_protected_layers_keep_their_outputs() -> None:
    network, plan = pruned(lambda: ResNet(32), 0.8, 16, protected=["blocks.2", "*.0.conv1"])
    assert network.blocks[2].conv1.out_channels == 128
    assert network.blocks[0].conv1.out_channels == 32
    assert group(plan, "blocks.2.conv1").reason_kept == "protected by 'blocks.2'"
    with pytest.raises(UsageError, match=r"no module matches 'blocks\.7'") as error:
        pruned(ResNet, 0.7, 16, protected=["blocks.7"])
    assert "did you mean 'blocks." in str(error.value)


def test_keep_outputs_keeps_a_classifier_that_something_reads() -> None:
    class Calibrated(Chain):
        def __init__(self) -> None:
            super().__init__(16, 32)
            self.append(nn.Linear(10, 10, bias=False))

    assert pruned(Calibrated, 0.5, 1, keep_outputs=None)[0][6].out_features in range(1, 11)
    network, plan = pruned(lambda: nn.Sequential(Chain(16, 32), nn.Linear(10, 7)), 0.5, 1, keep_outputs=10)
    assert network[0][6].out_features == 10
    assert "makes the network's outputs" in group(plan, "0.6").reason_kept


def test_an_unreachable_target_says_what_can_be_reached() -> None:
    network = seeded(ResNet)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(
        UsageError, match=r"target\.macs: 0\.2 cannot be reached: at least 0\.\d{4} of the macs"
    ) as error:
        prune(network, IMAGE, target=Target(macs=0.2), importance="magnitude", channel_multiple=16)
    assert "lower channel_multiple (now 16)" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values(), strict=True))
    least = float(str(error.value).split("at least ")[1].split()[0])
    plan = prune(network, IMAGE, target=Target(macs=least), importance="magnitude", channel_multiple=16)
    assert least - 1e-4 <= plan.achieved <= least
    assert {g.channels_after for g in plan.removed()} == {16}


def test_the_result_is_the_same_again_and_the_plan_is_json() -> None:
    torch.manual_seed(1)
    first, plan = pruned(Mobile, 0.6, 8)
    torch.manual_seed(2)
    second, again = pruned(Mobile, 0.6, 8)
    assert plan == again == PruningPlan.model_validate(json.loads(plan.model_dump_json()))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_mode_and_frozen_parameters_stay() -> None:
    network = seeded(lambda: ResNet(16, padded=False)).train()
    network.blocks[0].bn1.eval()
    network.blocks[2].conv1.weight.requires_grad_(False)
    modes = {name: module.training for name, module in network.named_modules()}
    statistics = network.bn.running_mean.clone()
    options = {"importance": "magnitude", "channel_multiple": 8, "protected": [*STREAM, "blocks.0", "blocks.1"]}
    with torch.no_grad():
        plan = prune(network, IMAGE, target=Target(macs=0.9), depth=False, **options)
    assert group(plan, "blocks.2.conv1").removed
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert not network.blocks[2].conv1.weight.requires_grad
    assert network.blocks[2].conv2.weight.requires_grad
    if not group(plan, "conv").removed:
        assert torch.equal(network.bn.running_mean, statistics)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"macs": 5}, "t.macs: must be in (0, 1), got 5"),
        ({"macs": 0}, "t.macs: must be in (0, 1), got 0"),
        ({"parameters": 1.0}, "t.parameters: must be in (0, 1), got 1.0"),
        ({"macs": float("nan")}, "t.macs: must be in (0, 1), got nan"),
        ({}, "t: give exactly one of macs, parameters, size and latency, got {}"),
        ({"macs": 0.5, "parameters": 0.5}, "t: give exactly one of macs, parameters, size and latency"),
        ({"mac": 0.5}, "t.mac: unknown key\n  hint: did you mean 'macs'?"),
    ],
)
def test_bad_targets_are_explained(table, message) -> None:
    with pytest.raises(ValidationError) as error:
        Target.model_validate(table)
    problems = validation_problems(error.value, "t", Target)
    assert any(str(problem).startswith(message) for problem in problems), problems


def test_taylor_needs_a_differentiable_finite_loss() -> None:
    for loss, error in (
        (None, "needs a calibration loss"),
        (lambda n: n(IMAGE), "scalar loss"),
        (lambda n: torch.tensor(1.0), "scalar loss"),
        (lambda n: n(IMAGE).sum() * math.inf, "no finite gradient"),
    ):
        with pytest.raises((UsageError, StageError), match=error):
            pruned(ResNet, 0.7, 16, importance="taylor", loss=loss)


def test_a_network_that_cannot_run_is_one_message() -> None:
    with pytest.raises(StageError, match="cannot trace this network"):
        prune(
            nn.Sequential(nn.Conv2d(5, 8, 3)),
            IMAGE,
            target=Target(macs=0.5),
            importance="magnitude",
            channel_multiple=1,
        )
