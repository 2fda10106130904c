"""Learned scales: value and gradient against the papers' formulas, then training, reloading and the exported file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.errors import StageError
from edgekd.onnx_file import export_onnx
from edgekd.optim import make_optimizer
from edgekd.quant import SCHEMES, calibrate, convert, enable_fake_quant, freeze, prepare
from edgekd.quant.fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from edgekd.quant.learned import LearnedActivationFakeQuantize, LearnedPerChannelFakeQuantize
from edgekd.recipe import Training


@pytest.mark.parametrize(
    ("dtype", "scheme", "low", "high", "span"),
    [
        (torch.uint8, torch.per_tensor_affine, 0, 255, (-0.7, 1.1)),
        (torch.uint8, torch.per_tensor_affine, 0, 255, (0.0, 1.1)),
        (torch.int8, torch.per_tensor_symmetric, -128, 127, (-0.9, 0.9)),
    ],
)
def test_gradients_of_activations_are_those_of_the_paper(
    dtype: torch.dtype, scheme: torch.qscheme, low: int, high: int, span: tuple[float, float]
) -> None:
    module = LearnedActivationFakeQuantize(dtype, scheme, low, high)
    module.set_range(*span)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y = module(x)
    (y * incoming).sum().backward()
    (scale, zero_point), v = module.calculate_qparams(), x.detach().double().numpy()
    s, z = scale.item(), zero_point.item()
    g = incoming.double().numpy()
    ratio = v / s
    integer = np.clip(np.rint(ratio) + z, low, high) - z
    inside = (np.rint(ratio) + z >= low) & (np.rint(ratio) + z <= high)
    assert 0.2 < inside.mean() < 0.9
    np.testing.assert_allclose(y.detach().numpy(), integer * s, atol=1e-6)
    # Esser et al., equation 3, times the scale for its logarithm.
    expected = np.where(inside, np.rint(ratio) - ratio, integer) * s
    assert module.log_scale.grad.item() == pytest.approx((expected * g).sum(), rel=1e-3)
    np.testing.assert_allclose(x.grad.numpy(), g * inside, atol=1e-6)


def test_gradients_of_weights_are_per_channel() -> None:
    module = LearnedPerChannelFakeQuantize(torch.int8, torch.per_channel_symmetric, -127, 127, 0)
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    module.learn(weight)
    assert torch.allclose(module.qparams(weight)[0], weight.detach().abs().amax((1, 2, 3)) / 127)
    with torch.no_grad():
        module.log_scale.add_(torch.tensor([1.0, 0.5, 2.0, 0.7, 0.1]).log())
    incoming = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (module(weight) * incoming).sum().backward()
    v, s = (t.detach().double().numpy() for t in (weight, module.qparams(weight)[0].reshape(-1, 1, 1, 1)))
    ratio = v / s
    integer = np.clip(np.rint(ratio), -127, 127)
    inside = np.abs(np.rint(ratio)) <= 127
    expected = (np.where(inside, np.rint(ratio) - ratio, integer) * s * incoming.numpy()).sum((1, 2, 3))
    np.testing.assert_allclose(module.log_scale.grad.numpy(), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(module(weight).detach().numpy(), integer * s, atol=1e-6)


def test_bfloat16_keeps_its_type_and_the_gradient_reaches_the_scale() -> None:
    module = LearnedActivationFakeQuantize(torch.uint8, torch.per_tensor_affine, 0, 255)
    module.set_range(-1.0, 1.0)
    x = torch.randn(8, 20).to(torch.bfloat16).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert module.log_scale.grad.dtype == torch.float32
    assert module.log_scale.grad.item() != 0


class Net(nn.Module):
    """Batch norm of every sign, a residual addition, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.bn1.weight[:3] *= -1
            self.bn2.weight[0] = 0

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        return self.head(F.relu(x + self.bn2(self.depthwise(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 8 - 0.6, torch.from_numpy(y)


def train(network: nn.Module, digits: tuple[Tensor, Tensor], steps: int, rate: float = 0.1) -> list[float]:
    network.train()
    optimizer = make_optimizer(network, Training(epochs=1, lr=rate, weight_decay=1e-3))
    losses = []
    for step in range(steps):
        rows = torch.randint(0, 1400, (128,), generator=torch.Generator().manual_seed(step))
        outputs = network(digits[0][rows])
        loss = F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs, digits[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    network = Net()
    train(network, digits, 150, 0.3)
    return network.eval()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_trained_scales_reach_the_exported_file(
    trained: nn.Module, digits: tuple[Tensor, Tensor], tmp_path: Path, scheme: str
) -> None:
    import onnxruntime

    prepared = prepare(trained, digits[0][:8], SCHEMES[scheme], qat=True, learned=True)
    calibrate(prepared, [digits[0][:200]])
    before = {name: p.detach().clone() for name, p in prepared.named_parameters() if name.endswith(".log_scale")}
    assert len(before) == sum(isinstance(m, ActivationFakeQuantize) for m in prepared.modules()) + 3
    losses = train(prepared, digits, 40)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert all(not torch.equal(p, prepared.get_parameter(name)) for name, p in before.items())
    freeze(prepared)
    train(prepared, digits, 3, 0.01)

    state = prepared.eval().state_dict()
    save_file(state, tmp_path / "state.safetensors")
    fresh = prepare(Net(), digits[0][:8], SCHEMES[scheme], qat=True, learned=True)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    images = digits[0]
    with torch.no_grad():
        expected = prepared(images)["logits"]
        assert torch.equal(fresh.eval()(images)["logits"], expected)

    path, preprocessing = tmp_path / "net.onnx", Preprocessing(size=[1, 8, 8], mean=[0.5], std=[0.5])
    export_onnx(convert(fresh), path, size=[1, 8, 8], opset=18, classes=list("0123456789"), preprocessing=preprocessing)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    assert (found.argmax(1) == expected.argmax(1).numpy()).mean() >= 0.995


def test_the_conversion_uses_the_learned_scale_times_the_folded_factor(
    trained: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    prepared = prepare(trained, digits[0][:8], SCHEMES["trt-s8s8"], qat=True, learned=True)
    calibrate(prepared, [digits[0][:200]])
    with torch.no_grad():
        for module in prepared.modules():
            if isinstance(module, LearnedPerChannelFakeQuantize):
                module.log_scale.add_(math.log(0.8))
    converted = convert(prepared)
    gamma = trained.bn1.weight / torch.sqrt(trained.bn1.running_var + trained.bn1.eps)
    expected = 0.8 * (trained.conv1.weight * gamma.reshape(-1, 1, 1, 1)).abs().amax((1, 2, 3)) / 127
    scales = [b for b in converted.buffers() if b.dtype == torch.float32 and b.shape == (16,)]
    assert any(torch.allclose(s, expected, rtol=1e-4) for s in scales)


def test_scales_get_no_weight_decay(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    prepared = prepare(trained, digits[0][:8], SCHEMES["x86-u8s8"], qat=True, learned=True)
    optimizer = make_optimizer(prepared, Training(epochs=1, lr=0.1, weight_decay=0.5))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    kept = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    scales = [p for name, p in prepared.named_parameters() if name.endswith(".log_scale")]
    assert scales
    assert all(id(p) in kept and id(p) not in decayed for p in scales)


def test_learned_ranges_have_to_be_calibrated(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    prepared = prepare(trained, digits[0][:8], SCHEMES["x86-u8s8"], qat=True, learned=True)
    train(prepared, digits, 1)
    with pytest.raises(StageError, match="the range of the image was never set"):
        convert(prepared)


@pytest.mark.parametrize("learned", [False, True])
def test_weights_may_be_quantized_before_activations(
    trained: nn.Module, digits: tuple[Tensor, Tensor], learned: bool
) -> None:
    images = digits[0][:64]
    prepared = prepare(trained, images, SCHEMES["x86-u8s8"], qat=True, learned=learned)
    calibrate(prepared, [images])
    outputs = {}
    with torch.no_grad():
        for switches in [(False, False), (True, False), (False, True), (True, True)]:
            enable_fake_quant(prepared, weights=switches[0], activations=switches[1])
            outputs[switches] = prepared.eval()(images)["logits"]
    assert torch.allclose(outputs[False, False], trained(images), atol=1e-5)
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == 4
    by_hand = Net().eval()
    by_hand.load_state_dict(trained.state_dict())
    quantizer = WeightPerChannelFakeQuantize(torch.int8, torch.per_channel_symmetric, -127, 127, 0)
    with torch.no_grad():
        for layer in (by_hand.conv1, by_hand.depthwise, by_hand.head):
            layer.weight.copy_(quantizer(layer.weight))
        assert torch.allclose(by_hand(images), outputs[True, False], atol=1e-5)
