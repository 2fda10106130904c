"""Ranges from histograms against NumPy on the values themselves, and through whole networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.errors import StageError, UsageError
from edgekd.onnx_file import export_onnx
from edgekd.quant import SCHEMES, calibrate, convert, prepare
from edgekd.quant.fake_quantize import ActivationFakeQuantize
from edgekd.quant.ranges import BINS, Histogram, entropy_range, mse_range, percentile_range

Values = NDArray[np.float64]


def histogram(x: Values) -> Histogram:
    largest = float(np.abs(x).max())
    return Histogram(
        np.histogram(x, BINS, (-largest, largest))[0].astype(np.float64), largest, float(x.min()), float(x.max())
    )


@pytest.fixture(scope="module")
def values() -> Values:
    drawn = np.random.default_rng(0)
    return np.concatenate([drawn.normal(0.3, 1.0, 100_000), [30.0, -12.0]])


def test_percentiles_are_those_of_the_values(values: Values) -> None:
    low, high = percentile_range(histogram(values), 99.0, symmetric=False)
    bin_width = 60 / BINS
    assert low == pytest.approx(np.percentile(values, 1), abs=bin_width)
    assert high == pytest.approx(np.percentile(values, 99), abs=bin_width)
    low, high = percentile_range(histogram(values), 99.0, symmetric=True)
    assert -low == high == pytest.approx(np.percentile(np.abs(values), 99), abs=bin_width)


def test_a_percentile_of_100_keeps_everything_and_positive_values_start_at_zero(values: Values) -> None:
    assert percentile_range(histogram(values), 100.0, symmetric=False) == (values.min(), values.max())
    low, high = percentile_range(histogram(np.maximum(values, 0)), 99.9, symmetric=False)
    assert low == pytest.approx(0, abs=60 / BINS)
    assert high == pytest.approx(np.percentile(np.maximum(values, 0), 99.9), abs=60 / BINS)


def divergence(counts: Values, bins: int, levels: int) -> float:
    """Migacz's procedure, group by group: bin j of those kept belongs to group floor(j * levels / bins)."""
    p = counts[:bins].copy()
    p[-1] += counts[bins:].sum()
    q = np.zeros(bins)
    for group in range(levels):
        members = [j for j in range(-(-group * bins // levels), bins) if j * levels // bins == group and counts[j] > 0]
        for j in members:
            q[j] = counts[members].sum() / len(members)
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore"):
        return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def test_entropy_finds_the_smallest_divergence() -> None:
    drawn = np.random.default_rng(1)
    x = np.abs(np.concatenate([drawn.normal(0, 1, 200_000), drawn.uniform(0, 20, 20)]))
    found = histogram(x)
    counts = found.counts[BINS // 2 :].copy()
    counts[0] = counts[1]
    low, high = entropy_range(found, 128)
    kept = round(high / found.largest * (BINS // 2))
    assert low == x.min()
    assert kept < BINS // 4  # most of what lies beyond the bulk was cut off
    tried = [*range(max(128, kept - 40), kept + 40), *range(128, BINS // 2 + 1, 32), BINS // 2]
    divergences = {bins: divergence(counts, bins, 128) for bins in tried}
    assert divergences[kept] == min(divergences.values())
    assert divergences[BINS // 2] > 1.2 * divergences[kept]


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    x = np.random.default_rng(2).uniform(0, 1, 400_000)
    low, high = entropy_range(histogram(x), 256)
    assert low >= 0
    assert high > 0.98


def test_mse_is_the_optimum_of_the_grid_on_the_values_themselves() -> None:
    x = np.concatenate([np.abs(np.random.default_rng(3).normal(0, 1, 20_000)), [9.0] * 3])
    module = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 15)  # 4 bits: clipping pays

    def quantized(v: Values, lows: Values, highs: Values) -> Values:
        scales = np.maximum(highs, 1e-9) / 15
        return np.clip(np.rint(v / scales), 0, 15) * scales

    low, high = mse_range(histogram(x), quantized)
    assert low == pytest.approx(x.min() / 100, abs=1e-3)
    errors = [((quantized(x, 0, h) - x) ** 2).mean() for h in x.max() * np.arange(1, 101) / 100]
    assert high == pytest.approx(x.max() * (np.argmin(errors) + 1) / 100, abs=0.0901)
    assert high < 0.7 * x.max()
    module.set_range(low, high)
    assert module.scale.item() == pytest.approx(high / 15, rel=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.Hardswish(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 0.6


@pytest.fixture(scope="module")
def trained(digits: Tensor) -> nn.Module:
    torch.manual_seed(0)
    labels = torch.from_numpy(load_digits().target)
    network = Net().train()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        rows = torch.randint(0, 1400, (128,))
        loss = nn.functional.cross_entropy(network(digits[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("percentile", "x86-u8s8"), ("entropy", "x86-u8s7"), ("entropy", "trt-s8s8"), ("mse", "trt-s8s8")],
)
def test_every_method_agrees_with_the_exported_file(
    trained: nn.Module, digits: Tensor, tmp_path: Path, method: str, scheme: str
) -> None:
    import onnxruntime

    prepared = prepare(trained, digits[:8], SCHEMES[scheme], qat=False)
    # A generator: two passes must not find it empty the second time.
    assert calibrate(prepared, (digits[i : i + 64] for i in range(0, 256, 64)), method=method) == 256
    prepared.eval()
    test = digits
    with torch.no_grad():
        expected, floats = prepared(test)["logits"], trained(test)
    assert (expected.argmax(1) == floats.argmax(1)).float().mean() > 0.95
    converted, path = convert(prepared), tmp_path / "net.onnx"
    preprocessing = Preprocessing(size=[1, 8, 8], mean=[0.5], std=[0.5])
    export_onnx(converted, path, size=[1, 8, 8], opset=18, classes=list("0123456789"), preprocessing=preprocessing)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: test.numpy()})[0]
    assert (found.argmax(1) == expected.argmax(1).numpy()).mean() >= 0.995


def test_the_histogram_covers_all_batches_and_the_range_is_set_from_it(trained: nn.Module, digits: Tensor) -> None:
    prepared = prepare(trained, digits[:8], SCHEMES["x86-u8s8"], qat=False)
    batches = [digits[:50], digits[50:100] * 3]
    calibrate(prepared, batches, method="percentile", percentile=99.0)
    image = next(m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize))
    values = torch.cat(batches).numpy()
    width = float(2 * np.abs(values).max() / BINS)
    assert image.highest.item() == pytest.approx(np.percentile(values, 99), abs=2 * width)
    assert image.lowest.item() == pytest.approx(np.percentile(values, 1), abs=2 * width)
    assert image.collector is None
    assert image.quantizes


def test_seven_bit_weights_stay_within_63(trained: nn.Module, digits: Tensor) -> None:
    prepared = prepare(trained, digits[:8], SCHEMES["x86-u8s7"], qat=False)
    calibrate(prepared, [digits[:100]])
    integers = [b for n, b in convert(prepared).named_buffers() if b.dtype == torch.int8]
    assert len(integers) == 3
    assert [b.abs().max().item() for b in integers] == [63] * 3


def test_a_dead_activation_is_an_error_with_its_layer(trained: nn.Module, digits: Tensor) -> None:
    network = Net().eval()
    network.load_state_dict(trained.state_dict())
    with torch.no_grad():
        network.body[1].bias.fill_(-100.0)
    prepared = prepare(network, digits[:8], SCHEMES["x86-u8s8"], qat=False)
    with pytest.raises(StageError, match=r"the output of relu in body\.2 is 0 for every calibration image"):
        calibrate(prepared, [digits[:50]])
    # Training with observed ranges may bring it to life again.
    assert calibrate(prepare(network, digits[:8], SCHEMES["x86-u8s8"], qat=True), [digits[:50]]) == 50


@pytest.mark.parametrize("sign", [1, -1])
def test_a_percentile_that_leaves_out_all_but_zeros_is_an_error(trained: nn.Module, digits: Tensor, sign: int) -> None:
    prepared = prepare(trained, digits[:8], SCHEMES["x86-u8s8"], qat=False)
    rare = torch.zeros_like(digits[:200])
    rare[7, 0, 3, 3] = sign * 5.0  # one of 12,800 values
    with pytest.raises(StageError, match=r"the image is 0 but for less than 0\.01 % of its values"):
        calibrate(prepared, [rare], method="percentile", percentile=99.99)
    calibrate(prepared, [rare], method="percentile", percentile=99.995)
    image = next(m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize))
    assert max(image.lowest.abs().item(), image.highest.item()) == pytest.approx(5.0, abs=10 / BINS)


def test_bad_arguments(trained: nn.Module, digits: Tensor) -> None:
    prepared = prepare(trained, digits[:8], SCHEMES["x86-u8s8"], qat=False)
    with pytest.raises(UsageError, match="no calibration method 'kl'"):
        calibrate(prepared, [digits[:8]], method="kl")
    with pytest.raises(UsageError, match=r"percentile 0\.999 is not above 50"):
        calibrate(prepared, [digits[:8]], method="percentile", percentile=0.999)
    with pytest.raises(UsageError, match="batch 0 holds NaN"):
        calibrate(prepared, [digits[:8] * float("inf")], method="mse")
    with pytest.raises(UsageError, match="no image"):
        calibrate(prepared, [], method="entropy")
