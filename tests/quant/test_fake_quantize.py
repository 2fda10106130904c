"""The fake-quantize modules against formulas written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.quant.fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize

KINDS = [
    (torch.uint8, torch.per_tensor_affine, 0, 255),
    (torch.int8, torch.per_tensor_affine, -128, 127),
    (torch.int8, torch.per_tensor_symmetric, -128, 127),
]


def test_weights_equal_the_numpy_formula_per_channel() -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 0.01, 5.0, 0.0, 1e-4]
    ).reshape(-1, 1, 1, 1)
    module = WeightPerChannelFakeQuantize(torch.int8, torch.per_channel_symmetric, -127, 127, 0)
    w = weight.numpy()
    scale = np.maximum(np.abs(w).max(axis=(1, 2, 3)) / np.float32(127), np.float32(1e-9)).reshape(-1, 1, 1, 1)
    expected = np.clip(np.rint(w / scale), -127, 127) * scale
    np.testing.assert_allclose(module(weight).numpy(), expected, rtol=1e-6, atol=0)
    assert (module(weight)[3] == 0).all()  # a channel of zeros stays zero, with a scale above 0
    assert (module.qparams(weight)[0] > 0).all()


@pytest.mark.parametrize(("dtype", "scheme", "low", "high"), KINDS)
def test_activations_equal_the_numpy_formula(dtype: torch.dtype, scheme: torch.qscheme, low: int, high: int) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 0.7
    module = ActivationFakeQuantize(dtype, scheme, low, high)
    module.train()
    got = module(x).numpy()
    smallest, largest = x.min().item(), x.max().item()
    if scheme == torch.per_tensor_symmetric:
        scale, zero = max(-smallest, largest) / high, 0
    else:
        below = round(-smallest * (high - low) / (largest - smallest))
        scale, zero = max(-smallest / below, largest / (high - low - below)), low + below
    expected = (np.clip(np.rint(x.numpy() / np.float32(scale)) + zero, low, high) - zero) * np.float32(scale)
    assert module.scale.item() == pytest.approx(scale, rel=1e-6)
    assert module.zero_point.item() == zero
    # A value half way between two steps may go either way, by the last bit of its quotient.
    assert np.mean(np.abs(got - expected) < 1e-5) > 0.999
    assert np.abs(got - x.numpy()).max() <= 0.5001 * scale  # nothing is clipped


def test_pixels_normalised_with_mean_one_half_do_not_lie_between_two_integers() -> None:
    module = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    x = (torch.arange(256).float() / 255 - 0.5) / 0.5
    module(x)
    position = (x / module.scale) % 1
    assert ((position - 0.5).abs() < 1e-3).float().mean().item() < 0.05


def test_zero_is_exact_and_positive_values_start_at_the_lowest_integer() -> None:
    module = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    x = torch.rand(100) + 3.0
    module(x)
    assert module.zero_point.item() == 0
    assert module(torch.zeros(3)).abs().max().item() == 0


def test_ranges_are_a_moving_average_of_extremes_and_stand_still_in_evaluation() -> None:
    module = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    module.averaging = 0.25
    module(torch.tensor([-1.0, 1.0]))
    module(torch.tensor([-3.0, 5.0]))
    assert module.lowest.item() == pytest.approx(-1 + 0.25 * -2)
    assert module.highest.item() == pytest.approx(1 + 0.25 * 4)
    module.eval()
    before = module.scale.clone()
    module(torch.tensor([-100.0, 100.0]))
    assert torch.equal(module.scale, before)
    module.train()
    module.disable_observer()
    module(torch.tensor([-100.0, 100.0]))
    assert torch.equal(module.scale, before)


def test_switches_are_part_of_the_state_dict() -> None:
    module = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    module(torch.randn(10))
    module.disable_observer()
    module.disable_fake_quant()
    other = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    other.load_state_dict(module.state_dict())
    x = torch.randn(10)
    assert torch.equal(other(x), x)
    assert torch.equal(other.scale, module.scale)


def test_the_gradient_passes_inside_the_range_only() -> None:
    module = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    module(torch.tensor([-1.0, 1.0]))
    module.eval()
    x = torch.tensor([-9.0, 0.5, 9.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_bfloat16_in_and_out() -> None:
    module = ActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    x = torch.randn(50).to(torch.bfloat16)
    y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - x.float()).abs().max().item() <= module.scale.item()


@pytest.mark.parametrize(("dtype", "scheme", "low", "high"), KINDS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_torchs_own_operator(
    dtype: torch.dtype, scheme: torch.qscheme, low: int, high: int, precision: torch.dtype
) -> None:
    module = ActivationFakeQuantize(dtype, scheme, low, high).eval()
    module.set_range(-0.8, 1.3)
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(3)).to(precision)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(precision)
    got = module(ours)
    expected = torch.fake_quantize_per_tensor_affine(theirs.float(), module.scale, module.zero_point, low, high)
    assert torch.equal(got, expected.to(precision))
    (got * incoming).sum().backward()
    (expected.to(precision) * incoming).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert 0.1 < (ours.grad == 0).float().mean() < 0.6
