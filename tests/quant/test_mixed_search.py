"""Which layers to quantize: the search against brute force on devices whose times are a formula."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models import build, specify
from edgekd.quant import SCHEMES, calibrate, enable_fake_quant, harms, prepare
from edgekd.quant.mixed import Found, candidates, fastest, groups, least_harm, within

NAMES = [f"block{i}" for i in range(6)]
GROUPED = {name: [f"{name}.a", f"{name}.b"] for name in NAMES}


class Device:
    """Each group takes 1 in float and its own share of that in int8; each border between the two costs something."""

    def __init__(self, shares: list[float], border: float) -> None:
        self.shares, self.border, self.timed = shares, border, 0

    def takes(self, int8: frozenset[str]) -> float:
        sides = [f"{name}.a" in int8 for name in NAMES]
        borders = sum(a != b for a, b in itertools.pairwise([False, *sides, False]))
        return sum(s if q else 1.0 for s, q in zip(self.shares, sides, strict=True)) + self.border * borders

    def __call__(self, sets: Mapping[str, frozenset[str]]) -> dict[str, float]:
        self.timed += len(sets)
        return {name: len(NAMES) / self.takes(chosen) for name, chosen in sets.items()}

    def best(self) -> float:
        every = itertools.chain.from_iterable(itertools.combinations(NAMES, n) for n in range(len(NAMES) + 1))
        return min(self.takes(layers_of(*names)) for names in every)


class Lucky(Device):
    """Times a hopeless set once as if it were the fastest by far."""

    def __call__(self, sets: Mapping[str, frozenset[str]]) -> dict[str, float]:
        found = super().__call__(sets)
        return found | ({"up to block1": 5.0} if self.timed <= len(START) and "up to block1" in found else {})


def test_what_was_fast_once_by_luck_is_timed_again() -> None:
    device = Lucky([0.9, 0.6, 0.6, 0.6, 0.5, 0.5], 0.1)
    found = fastest(START, GROUPED, device)
    assert device.takes(found.int8) == pytest.approx(device.best())
    assert found.speedup == pytest.approx(6 / device.best())


def layers_of(*names: str) -> frozenset[str]:
    return frozenset(path for name in names for path in GROUPED[name])


START = {
    "all": layers_of(*NAMES),
    **{f"from {n}": layers_of(*NAMES[i:]) for i, n in enumerate(NAMES) if i},
    **{f"up to {n}": layers_of(*NAMES[:i]) for i, n in enumerate(NAMES) if i},
}


@pytest.mark.parametrize(
    ("shares", "border"),
    [
        ([0.5] * 6, 0.1),
        ([1.6, 1.3, 1.2, 0.9, 0.6, 0.5], 0.1),  # the front loses, the rear gains
        ([0.5, 0.6, 1.5, 1.6, 1.1, 1.4], 0.1),
        ([1.4, 0.6, 0.5, 0.6, 1.5, 1.3], 0.1),  # only the middle
        ([0.6, 1.8, 0.5, 0.6, 1.9, 0.5], 0.0),  # two that lose, apart from each other
        ([0.6, 1.2, 0.5, 0.6, 0.5, 0.6], 0.3),  # one that loses less than its borders would
        ([1.5, 1.5, 0.4, 1.5, 1.5, 1.5], 0.05),  # one alone gains
        ([1.2, 1.1, 1.3, 1.2, 1.5, 1.1], 0.1),  # nothing gains
        ([0.95] * 6, 0.5),  # the borders take it all
    ],
)
def test_the_search_finds_what_trying_everything_finds(shares: list[float], border: float) -> None:
    device = Device(shares, border)
    found = fastest(START, GROUPED, device)
    assert device.takes(found.int8) == pytest.approx(device.best())
    assert device.timed <= 50  # of 63 sets; for 32 groups it would be 2^32
    if found.int8:
        assert found.speedup == pytest.approx(6 / device.best())
        for name in NAMES:
            own, other = device.takes(found.int8), device.takes(found.int8 ^ layers_of(name))
            gain = (other - own) / 6 if f"{name}.a" in found.int8 else (own - other) / 6
            assert found.gains[name] == pytest.approx(gain)
    else:
        assert found.speedup <= 1.005


def test_groups_leave_by_harm_for_time_until_the_drop_is_small_enough() -> None:
    gains = dict(zip(NAMES, [0.01, 0.08, 0.08, 0.08, 0.08, 0.08], strict=True))
    harm = {f"{name}.a": value for name, value in zip(NAMES, [0.02, 0.1, 0.001, 0.4, 0.002, 0.003], strict=True)}
    found = Found(layers_of(*NAMES), 2.0, gains, {})
    asked = []

    def drop(chosen: frozenset[str]) -> float:
        asked.append(chosen)
        return sum(harm.get(path, 0.0) for path in chosen)

    # Harm for time: block3 5.0, block0 2.0, block1 1.25, then the others.
    for limit, left in ((1.0, ()), (0.13, ("block3",)), (0.11, ("block3", "block0")), (0.01, NAMES[3::-2] + NAMES[:1])):
        assert within(found, GROUPED, harm, drop, limit) == layers_of(*NAMES) - layers_of(*left)
    assert within(found, GROUPED, harm, drop, 0.0) == frozenset()
    assert len(asked) <= 15


def test_as_few_groups_as_the_wanted_time_needs() -> None:
    device = Device([0.5] * 6, 0.0)
    found = fastest(START, GROUPED, device)
    harm = {f"{name}.a": float(i) for i, name in enumerate(NAMES)}
    # float takes 6, each group saves a half: 1.2x needs two groups, those that harm least; and 2 % more are aimed at.
    assert least_harm(found, GROUPED, harm, device, 1.17) == layers_of("block0", "block1")
    assert least_harm(found, GROUPED, harm, device, 1.2) == layers_of("block0", "block1", "block2")
    assert least_harm(found, GROUPED, harm, device, 2.0) == layers_of(*NAMES)


def test_groups_are_blocks_where_single_layers_would_be_too_many() -> None:
    deep = [f"layer{i}.{j}.conv{k}" for i in (1, 2, 3) for j in range(9) for k in (1, 2)]
    found = groups(["conv1", *deep, "linear"])
    assert list(found)[:3] == ["conv1", "layer1.0", "layer1.1"]
    assert found["layer2.4"] == ["layer2.4.conv1", "layer2.4.conv2"]
    assert len(found) == 29
    assert groups(["a.b", "a.c"]) == {"a.b": ["a.b"], "a.c": ["a.c"]}
    flat = groups([f"l{i}" for i in range(100)])
    assert len(flat) == 25
    assert flat["l4"] == ["l4", "l5", "l6", "l7"]


def test_candidates_are_told_apart_by_kind_width_and_place() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 128, 1), nn.Flatten(), nn.Linear(128, 64)
    )
    found = candidates(network, ["0", "1", "2", "4"])
    assert found["all"] == {"0", "1", "2", "4"}
    assert found["linear layers"] == {"4"}
    assert found["convolutions"] == {"0", "1", "2"}
    assert found["all but depthwise"] == {"0", "2", "4"}
    assert found["from 32 channels"] == {"1", "2", "4"}
    assert found["up to 1"] == {"0"}
    assert found["from 2"] == {"2", "4"}
    assert len(set(found.values())) == len(found)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 8, 3)
        self.two = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(image))))
        return self.head(F.layer_norm(x.amax((2, 3)), [8]))


def test_harm_is_the_divergence_of_a_network_with_that_layer_alone_in_int8() -> None:
    torch.manual_seed(0)
    network, images = Plain().eval(), torch.randn(64, 1, 10, 10)
    with torch.no_grad():
        network.two.weight[0] *= 30  # the range of its output is then too wide for the other channels
    everything = prepare(network, images, SCHEMES["x86-u8s8"], qat=False)
    calibrate(everything, [images])
    enable_fake_quant(everything)
    before = {name: value.clone() for name, value in everything.state_dict().items()}
    found = harms(everything, [images[:32], images[32:]])
    assert list(found) == ["one", "two", "head"]
    assert all(torch.equal(value, before[name]) for name, value in everything.state_dict().items())
    with torch.no_grad():
        wanted = network(images).double().log_softmax(1)
    for path in found:
        alone = prepare(network, images, SCHEMES["x86-u8s8"], qat=False, float_layers=set(found) - {path})
        calibrate(alone, [images])
        enable_fake_quant(alone)
        alone.eval()
        with torch.no_grad():
            logs = alone(images)["logits"].double().log_softmax(1)
        divergence = float(F.kl_div(logs, wanted, reduction="batchmean", log_target=True))
        assert found[path] == pytest.approx(divergence, rel=1e-6), path
    assert found["two"] > 3 * found["one"]


def test_families_of_networks_are_grouped_in_the_order_they_run() -> None:
    network = build(specify("vit", {"depth": 2, "dim": 24}, classes=10, size=[3, 32, 32], where="model"))
    paths = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    found = candidates(network, ["patch_embed", *paths])
    assert found["linear layers"] == set(paths)
