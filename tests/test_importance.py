"""Every importance against a formula of its own in NumPy, and on every kind of coupled channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from edgekd.artifact import ModelSpec
from edgekd.errors import StageError, UsageError
from edgekd.inspect import listing
from edgekd.models import build, changed_attributes, load_state, save_state
from edgekd.pruning import IMPORTANCES, Importance, Target, prune
from edgekd.pruning.graph import ChannelGroup, channel_groups
from edgekd.pruning.ranking import channel_importance, evidence

Array = NDArray[np.float64]
IMAGE = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A stream that two convolutions add up into, with norms, and an inner convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.bn1 = nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12)
        self.outer, self.bn2 = nn.Conv2d(12, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.bn1(self.inner(x)))
        return self.head((x + self.bn2(self.outer(y))).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.depth(torch.relu(self.bn1(self.expand(x))))))
        return self.head(self.project(x).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(self.project(x * gate).mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, and a grouped convolution behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(1, 4, 1, 2), nn.BatchNorm2d(4)
        self.mix, self.bn = nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8)
        self.grouped, self.last = nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.bn_a(self.a(x))), torch.relu(self.bn_b(self.b(x)))], 1)
        x = torch.relu(self.grouped(torch.relu(self.bn(self.mix(x)))))
        return self.head(functional.adaptive_avg_pool2d(torch.relu(self.last(x)), 2).flatten(1))


def vit() -> nn.Module:
    return build(ModelSpec(use="vit", args={"patch": 8, "dim": 16, "depth": 2, "heads": 4, **SIZES}))


SIZES = {"num_classes": 10, "in_channels": 1, "image_size": 16}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "depthwise": Depthwise,
    "squeeze-excite": SqueezeExcite,
    "concat-and-grouped": Concat,
    "vit": vit,
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return network.eval()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    data = load_digits()
    images = functional.interpolate(torch.tensor(data.images[:24], dtype=torch.float32)[:, None] / 8 - 1, size=16)
    labels = torch.tensor(data.target[:24])
    return [{"image": images[:16], "label": labels[:16]}, {"image": images[16:], "label": labels[16:]}]


def cross_entropy(batches: list[dict[str, Tensor]]) -> Callable[[nn.Module], Tensor]:
    return lambda network: functional.cross_entropy(network(batches[0]["image"]), batches[0]["label"])


def rank(network: nn.Module, importance: Any, batches: list[dict[str, Tensor]], seed: int = 0) -> dict[str, Array]:
    found = evidence(network, importance, loss=cross_entropy(batches), batches=batches)
    scores = {g.name: channel_importance(network, g, importance, found, seed) for g in groups(network)}
    return {name: value.numpy() for name, value in scores.items() if value is not None}


def groups(network: nn.Module) -> list[ChannelGroup]:
    return [group for group in channel_groups(network, IMAGE, 1) if group.reason_kept is None]


def filters(module: Any) -> Array:
    return module.weight.detach().double().flatten(1).numpy()


def test_norms_of_filters_that_are_added_up_into_one_stream(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    both = np.concatenate([filters(network.stem), filters(network.outer)], axis=1)
    np.testing.assert_allclose(rank(network, "magnitude", batches)["stem"], np.sqrt((both**2).sum(1)), rtol=1e-9)
    np.testing.assert_allclose(rank(network, "magnitude-l1", batches)["stem"], np.abs(both).sum(1), rtol=1e-9)
    inner = np.abs(filters(network.inner)).sum(1)
    np.testing.assert_allclose(rank(network, "magnitude-l1", batches)["inner"], inner, rtol=1e-9)


def test_lamp_is_the_share_of_the_square_among_all_that_are_as_large(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    squares = (filters(network.inner) ** 2).sum(1)
    expected = [s / sum(t for t in squares if t >= s) for s in squares]
    found = rank(network, "lamp", batches)["inner"]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found.max() == 1.0
    np.testing.assert_array_equal(found.argsort(), squares.argsort())
    network.inner.weight.data.zero_()
    assert not rank(network, "lamp", batches)["inner"].any()


def test_fpgm_is_the_distance_to_all_other_filters(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    network.inner.weight.data[3] = network.inner.weight.data[7]
    for name, rows in (
        ("stem", np.concatenate([filters(network.stem), filters(network.outer)], axis=1)),
        ("inner", filters(network.inner)),
    ):
        expected = [sum(np.sqrt(((a - b) ** 2).sum()) for b in rows) for a in rows]
        np.testing.assert_allclose(rank(network, "fpgm", batches)[name], expected, rtol=1e-9)
    # A filter of average size in the middle of the others goes before a small one apart from them.
    network.inner.weight.data[:] = 1.0
    network.inner.weight.data[0] = -0.1
    scores = rank(network, "fpgm", batches)["inner"]
    assert scores.argmax() == 0 != rank(network, "magnitude", batches)["inner"].argmax()


def test_bn_scale_is_that_of_every_norm_behind_the_channel(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    network.bn2.weight.data[2] *= -1
    scores = rank(network, "bn-scale", batches)
    expected = sum(np.abs(norm.weight.detach().double().numpy()) for norm in (network.bn, network.bn2))
    np.testing.assert_allclose(scores["stem"], expected, rtol=1e-9)
    assert rank(seeded(vit), "bn-scale", batches) == {}


def touching(network: nn.Module, of: Callable[[str, Array], Array]) -> Array:
    """A value of each weight, summed over what makes, scales and reads the channels of `inner`."""
    values = {n: of(n, p.detach().double().numpy()) for n, p in network.named_parameters()}
    made = values["inner.weight"].sum((1, 2, 3)) + values["bn1.weight"]
    return made + values["outer.weight"].sum((0, 2, 3))


def test_taylor_is_weight_times_gradient(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    twin = copy.deepcopy(network)
    cross_entropy(batches)(twin).backward()
    gradients = {n: p.grad.double().numpy() for n, p in twin.named_parameters()}
    expected = touching(network, lambda n, w: np.abs(w * gradients[n]))
    np.testing.assert_allclose(rank(network, "taylor", batches)["inner"], expected, rtol=1e-5)


def test_hessian_is_half_the_squared_weight_times_the_mean_squared_gradient_of_single_images(
    batches: list[dict[str, Tensor]],
) -> None:
    network = seeded(Residual)
    fisher: dict[str, Array] = {}
    for batch in batches:
        for image, label in zip(batch["image"], batch["label"], strict=True):
            twin = copy.deepcopy(network)
            logits = twin(image[None])[0]
            (torch.logsumexp(logits, 0) - logits[label]).backward()
            for name, parameter in twin.named_parameters():
                fisher[name] = fisher.get(name, 0.0) + parameter.grad.double().numpy() ** 2 / 24
    expected = touching(network, lambda n, w: 0.5 * fisher[n] * w**2)
    np.testing.assert_allclose(rank(network, "hessian", batches)["inner"], expected, rtol=1e-4)
    assert all(p.grad is None for p in network.parameters())


def test_hessian_foretells_what_a_quadratic_loss_grows_by() -> None:
    """At the minimum of a softmax regression on its own samples, the Fisher information is the Hessian."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Flatten(), nn.Linear(4, 10, bias=False)).double()
    images = torch.randn(400, 1, 1, 1, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=network(images).detach()).sample()
    batches = [{"image": images, "label": labels}]
    fisher = evidence(network, "hessian", batches=batches)["2.weight"]
    weight = network[2].weight
    hessian = torch.autograd.functional.hessian(
        lambda w: functional.cross_entropy(functional.linear(network[0](images).flatten(1), w), labels), weight.detach()
    )
    diagonal = hessian.reshape(40, 40).diagonal().reshape(10, 4)
    assert float((fisher - diagonal).norm() / diagonal.norm()) < 0.15


def test_activation_is_the_mean_size_of_what_the_next_layers_read(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    images = torch.cat([b["image"] for b in batches])
    with torch.no_grad():
        stream = torch.relu(network.bn(network.stem(images)))
        inner = torch.relu(network.bn1(network.inner(stream)))
        last = (stream + network.bn2(network.outer(inner))).mean((2, 3))
    scores = rank(network, "activation", batches)
    np.testing.assert_allclose(scores["inner"], inner.double().numpy().mean((0, 2, 3)), rtol=1e-4)
    expected = stream.double().numpy().mean((0, 2, 3)) + np.abs(last.double().numpy()).mean(0)
    np.testing.assert_allclose(scores["stem"], expected, rtol=1e-4)


def test_activation_of_what_is_flattened_counts_all_positions_of_a_channel(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Concat)
    read: list[Tensor] = []
    network.head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    with torch.no_grad():
        network(torch.cat([b["image"] for b in batches]))
    expected = np.abs(read[0].double().numpy()).mean(0).reshape(8, 4).sum(1)
    network.head._forward_pre_hooks.clear()
    np.testing.assert_allclose(rank(network, "activation", batches)["last"], expected, rtol=1e-4)


def test_random_is_drawn_by_the_seed_for_each_group(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    first, again, other = (rank(network, "random", batches, seed) for seed in (0, 0, 1))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        assert not np.array_equal(value, other[name])
    assert not np.array_equal(first["stem"], first["inner"][:8])
    assert all(value.min() >= 0 and value.max() < 1 for value in first.values())


@pytest.mark.parametrize("importance", get_args(Importance))
@pytest.mark.parametrize("kind", KINDS)
def test_every_importance_prunes_every_kind_of_group_into_a_network_that_runs_and_reloads(
    kind: str, importance: Any, batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    original = seeded(KINDS[kind])
    scores = rank(original, importance, batches)
    assert all(np.isfinite(value).all() and (value >= 0).all() for value in scores.values())
    assert all(np.ptp(value) > 0 for value in scores.values())
    network = copy.deepcopy(original)
    options: dict[str, Any] = {"target": Target(parameters=0.9), "importance": importance, "channel_multiple": 2}
    options |= {"keep_outputs": 10, "loss": cross_entropy(batches), "batches": batches, "depth": False}
    if kind == "vit" and importance == "bn-scale":
        with pytest.raises(UsageError, match='use importance = "magnitude"'):
            prune(network, IMAGE, **options)
        return
    plan = prune(network, IMAGE, **options)
    assert plan.removed()
    images = batches[0]["image"]
    expected = network(images)
    shape = expected.shape if isinstance(expected, Tensor) else None
    assert shape == (16, 10)
    # As a stage stores it: the changed shapes and attributes, and a file without code.
    save_state(network, tmp_path / "model.safetensors")
    fresh = seeded(KINDS[kind])
    for path, changes in changed_attributes(original, network).items():
        module = fresh.get_submodule(path)
        for name, value in changes.items():
            if name.endswith(".shape"):
                leaf = name.removesuffix(".shape")
                tensor = torch.empty(value)
                setattr(module, leaf, nn.Parameter(tensor) if leaf in module._parameters else tensor)
            else:
                setattr(module, name, value)
    load_state(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh.eval()(images), expected)


def test_grouped_convolutions_and_both_branches_of_a_concatenation_are_told_apart() -> None:
    options: dict[str, Any] = {"importance": "fpgm", "channel_multiple": 2, "keep_outputs": 10}
    plan = prune(seeded(Concat), IMAGE, target=Target(parameters=0.8), **options)
    reasons = {group.name: group.reason_kept for group in plan.groups}
    assert "grouped convolution" in (reasons["mix"] or "")
    assert {"a", "b", "last"} <= {g.name for g in plan.groups if "grouped" not in (g.reason_kept or "")}


def test_every_importance_has_a_line_and_its_source() -> None:
    rows = dict(listing("importances"))
    assert set(rows) == set(get_args(Importance)) == set(IMPORTANCES)
    assert all(len(text) <= 100 for text in rows.values())
    assert [name for name, text in rows.items() if " et al." not in text] == ["random"]


def test_what_an_importance_needs_and_did_not_get() -> None:
    network = seeded(Residual)
    for importance in ("hessian", "activation"):
        with pytest.raises(UsageError, match=f'"{importance}" needs calibration images'):
            evidence(network, importance)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a calibration loss"):
        evidence(network, "taylor")


def test_images_without_a_label_do_not_count(batches: list[dict[str, Tensor]]) -> None:
    network = seeded(Residual)
    images, labels = batches[0]["image"], batches[0]["label"]
    strangers = {"image": torch.cat([images, images + 1]), "label": torch.cat([labels, torch.full_like(labels, -1)])}
    expected = evidence(network, "hessian", batches=batches[:1])
    found = evidence(
        network, "hessian", batches=[strangers, {**strangers, "label": torch.full((2 * len(labels),), -1)}]
    )
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4) for name in expected)
    with pytest.raises(UsageError, match="needs labels, and no calibration image has one"):
        evidence(network, "hessian", batches=[{"image": images, "label": torch.full_like(labels, -1)}])


def test_images_that_are_not_finite(batches: list[dict[str, Tensor]]) -> None:
    broken = [{**batches[0], "image": batches[0]["image"] * float("inf")}]
    for importance in ("hessian", "activation", "taylor"):
        with pytest.raises(StageError, match=r"not finite|no finite gradient"):
            rank(seeded(Residual), importance, broken)
