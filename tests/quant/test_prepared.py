"""Prepare, calibrate, train, freeze, convert: on small networks and real digits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd.errors import StageError, UsageError
from edgekd.quant import SCHEMES, calibrate, convert, enable_fake_quant, freeze, prepare, scheme_named
from edgekd.quant.fake_quantize import ActivationFakeQuantize
from edgekd.quant.graph import operation

X86 = SCHEMES["x86-u8s8"]


class Small(nn.Module):
    """What trips quantizers up: two epsilons, gamma 0 and below, in-place operators, dropout, a sliced shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16, eps=1e-2, momentum=0.3)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.body_norm = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(128, 10)
        with torch.no_grad():
            self.stem_norm.weight[0] = 0.0
            self.body_norm.weight[:4] *= -1

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.relu(self.stem_norm(self.stem(image)))
        y = self.body_norm(self.body(x))
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        y = self.relu(y)
        return {"features": y, "logits": self.head(self.drop(F.avg_pool2d(y, 4).flatten(1)))}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    x = F.interpolate((x - 0.3) / 0.4, size=16, mode="bilinear")
    return x, torch.from_numpy(labels)


def train(
    network: nn.Module, digits: tuple[Tensor, Tensor], steps: int, rate: float, autocast: bool = False
) -> list[float]:
    x, y = digits
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    losses = []
    network.train()
    for step in range(steps):
        rows = torch.randint(0, 1400, (128,), generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = network(x[rows])["logits"]
        loss = F.cross_entropy(logits.float(), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    network = Small()
    train(network, digits, 150, 0.2)
    return network.eval()


def accuracy(network: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        logits = network(digits[0][1400:])["logits"]
    return (logits.argmax(1) == digits[1][1400:]).float().mean().item()


@pytest.mark.parametrize("qat", [True, False])
def test_without_quantizing_it_is_the_float_network(
    trained: nn.Module, digits: tuple[Tensor, Tensor], qat: bool
) -> None:
    x = digits[0][:64]
    prepared = prepare(trained, x, X86, qat=qat)
    enable_fake_quant(prepared, False, False)
    prepared.eval()
    with torch.no_grad():
        found, expected = prepared(x), trained(x)
    assert list(found) == ["features", "logits"]
    for name in found:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    assert any(operation(n) == "batch_norm" for n in prepared.network.graph.nodes) == qat


def test_training_mode_uses_the_networks_own_rates_and_batch_statistics(
    trained: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x = digits[0][:64]
    prepared = prepare(trained, x, X86, qat=True)
    enable_fake_quant(prepared, False, False)
    reference = Small()
    reference.load_state_dict(trained.state_dict())
    reference.train()
    prepared.train()
    torch.manual_seed(5)
    expected = reference(x)["logits"]
    torch.manual_seed(5)
    assert torch.allclose(prepared(x)["logits"], expected, atol=1e-5)
    state = prepared.state_dict()
    for name in ("running_mean", "running_var"):
        expected = reference.state_dict()[f"stem_norm.{name}"]
        assert torch.allclose(state[f"network.stem_norm.{name}"], expected, atol=1e-6)


def test_the_original_network_is_left_alone(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    prepared = prepare(trained, digits[0][:8], X86, qat=True)
    train(prepared, digits, 2, 0.1)
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())
    assert not trained.training


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_post_training_quantization_keeps_the_accuracy(
    trained: nn.Module, digits: tuple[Tensor, Tensor], scheme: str
) -> None:
    prepared = prepare(trained, digits[0][:8], SCHEMES[scheme], qat=False)
    assert calibrate(prepared, (digits[0][i : i + 100] for i in range(0, 300, 100))) == 300
    prepared.eval()
    converted = convert(prepared)
    assert accuracy(trained, digits) > 0.8
    assert accuracy(converted, digits) >= accuracy(trained, digits) - 0.02
    with torch.no_grad():
        x = digits[0][1400:]
        expected, found = prepared(x)["logits"], converted(x)["logits"]
    assert list(converted(x[:2])) == ["logits"]
    assert (expected.argmax(1) == found.argmax(1)).float().mean().item() >= 0.995


def test_training_with_quantization_lowers_the_loss_and_converts_exactly(
    trained: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    fresh = Small()
    prepared = prepare(fresh, digits[0][:8], X86, qat=True)
    calibrate(prepared, [digits[0][:200]])
    losses = train(prepared, digits, 120, 0.2)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    freeze(prepared)
    train(prepared, digits, 5, 0.01)
    prepared.eval()
    converted = convert(prepared)
    x = digits[0][1400:]
    with torch.no_grad():
        expected, found = prepared(x)["logits"], converted(x)["logits"]
    assert accuracy(prepared, digits) > 0.75
    assert (expected.argmax(1) == found.argmax(1)).float().mean().item() >= 0.995
    assert not any(operation(n) in {"batch_norm", "dropout"} for n in converted.network.graph.nodes)
    # It stays usable: the conversion worked on a copy.
    assert "features" in prepared(x)
    train(prepared, digits, 1, 0.01)


def test_bfloat16_autocast_and_channels_last_train_too(digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    prepared = prepare(Small(), digits[0][:8], X86, qat=True).to(memory_format=torch.channels_last)
    images = digits[0].contiguous(memory_format=torch.channels_last)
    losses = train(prepared, (images, digits[1]), 60, 0.1, autocast=True)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_state_reloads_exactly_and_without_pickles(
    trained: nn.Module, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x = digits[0][:50]
    prepared = prepare(trained, x, X86, qat=True)
    calibrate(prepared, [x])
    train(prepared, digits, 3, 0.05)
    freeze(prepared)
    stream = io.BytesIO()
    torch.save(prepared.state_dict(), stream)
    stream.seek(0)
    save_file(prepared.state_dict(), tmp_path / "a.safetensors")
    for state in (torch.load(stream, weights_only=True), load_file(tmp_path / "a.safetensors")):
        fresh = prepare(Small(), x, X86, qat=True)
        fresh.load_state_dict(state)
        assert torch.equal(fresh.eval()(x)["logits"], prepared.eval()(x)["logits"])
        # Frozen stays frozen: batch norm uses the stored statistics, ranges stand still.
        train(fresh, digits, 1, 0.0)
        assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in state.items())


def test_evaluation_moves_nothing(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    prepared = prepare(trained, digits[0][:8], X86, qat=True)
    calibrate(prepared, [digits[0][:100]])
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    prepared.eval()(digits[0][100:200] * 10)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())


def test_calibration_averages_the_extremes_of_the_batches(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    prepared = prepare(trained, digits[0][:8], X86, qat=False)
    batches = [digits[0][:50] * k for k in (1.0, 2.0, 4.0)]
    calibrate(prepared, batches)
    image = next(m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize))
    assert image.highest.item() == pytest.approx(sum(b.max().item() for b in batches) / 3, rel=1e-5)
    assert image.quantizes
    assert image.averaging == 0.01


def test_bad_calibration_data(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    prepared = prepare(trained, digits[0][:8], X86, qat=False)
    with pytest.raises(UsageError, match="no image"):
        calibrate(prepared, [])
    with pytest.raises(UsageError, match="batch 1 holds NaN"):
        calibrate(prepared, [digits[0][:4], digits[0][:4] * float("nan")])
    with pytest.raises(StageError, match="never set"):
        convert(prepare(trained, digits[0][:8], X86, qat=False))


def test_an_infinite_activation_is_reported(digits: tuple[Tensor, Tensor]) -> None:
    network = Small()
    with torch.no_grad():
        network.stem.weight.fill_(float("inf"))
    prepared = prepare(network, digits[0][:8], X86, qat=True)
    with pytest.raises(StageError, match="NaN or infinite"):
        calibrate(prepared, [digits[0][:8]])


def test_a_dead_channel_keeps_its_bias(digits: tuple[Tensor, Tensor]) -> None:
    network = Small().eval()
    with torch.no_grad():
        network.body.weight[3] = 0.0
        network.body.bias[3] = 100.0
        network.head.weight[2] = 0.0
        network.head.bias[2] = 7.0
    x = digits[0][:100]
    prepared = prepare(network, x, X86, qat=False)
    calibrate(prepared, [x])
    found = convert(prepared)(x)["logits"]
    assert torch.allclose(found[:, 2], torch.full((100,), 7.0), atol=1e-3)
    assert torch.allclose(found, network(x)["logits"], atol=0.3)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        x.relu_()
        x.mul_(x + 1.0)
        return self.head(x.mean((2, 3)))


def test_values_overwritten_in_place_are_read_as_overwritten(digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    network, x = InPlace().eval(), digits[0][:50]
    prepared = prepare(network, x, X86, qat=False)
    calibrate(prepared, [x])
    expected = network(x)
    assert torch.allclose(prepared.eval()(x)["logits"], expected, atol=0.02 * expected.abs().max().item())
    assert not any(operation(n).endswith("_") for n in prepared.network.graph.nodes)


class OverwrittenView(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        x = image * 2.0
        flat = x.flatten(1)
        x.relu_()
        return flat[:, :10]


def test_an_overwritten_view_is_refused_not_miscalculated(digits: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(StageError, match="computes other logits than the original"):
        prepare(OverwrittenView(), digits[0][:2], X86, qat=False)


class Branching(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        if image.sum() > 0:
            return image.mean((2, 3))
        return -image.mean((2, 3))


class Listed(nn.Module):
    def forward(self, image: Tensor) -> list[Tensor]:
        return [image.mean((2, 3))]


def test_untraceable_networks_name_the_line() -> None:
    with pytest.raises(StageError, match=r"test_prepared\.py:\d+ in forward") as caught:
        prepare(Branching(), torch.randn(2, 3, 4, 4), X86, qat=True)
    assert "torch.where" in str(caught.value)
    with pytest.raises(StageError, match="returns list"):
        prepare(Listed(), torch.randn(2, 3, 4, 4), X86, qat=True)


def test_schemes_by_name() -> None:
    assert scheme_named("trt-s8s8", "x").activation_symmetric
    with pytest.raises(UsageError, match="did you mean 'x86-u8s8'"):
        scheme_named("x86-u8s9", "quantize.scheme")
