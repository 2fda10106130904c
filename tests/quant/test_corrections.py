"""Equalisation, bias correction and adaptive rounding: what each promises, measured without its own code."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.errors import UsageError
from edgekd.onnx_file import export_onnx
from edgekd.quant import SCHEMES, adapt_rounding, calibrate, convert, correct_bias, enable_fake_quant, equalise, prepare
from edgekd.quant.fake_quantize import WeightPerChannelFakeQuantize
from edgekd.quant.graph import operation

X86 = SCHEMES["x86-u8s8"]


class Net(nn.Module):
    """A depthwise-separable chain, a grouped and a strided convolution, ReLU6 (left alone), and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding="valid", groups=2)
        self.point = nn.Conv2d(16, 12, 1)
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn(self.expand(image)))
        x = F.relu(self.depthwise(x))
        x = F.max_pool2d(F.relu(self.grouped(x)), 2, 1)
        x = F.relu6(self.point(x)).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 0.6


@pytest.fixture(scope="module")
def trained(digits: Tensor) -> nn.Module:
    """Trained, then with channel ranges that differ a hundredfold, as in networks whose layers were scaled apart."""
    torch.manual_seed(0)
    network, labels = Net().train(), torch.from_numpy(load_digits().target)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(150):
        rows = torch.randint(0, 1400, (128,))
        loss = F.cross_entropy(network(digits[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        factor = torch.logspace(-1, 1, 8)
        network.bn.weight.mul_(factor)
        network.bn.bias.mul_(factor)
        network.depthwise.weight.div_(factor.reshape(-1, 1, 1, 1))
        network.depthwise.weight.mul_(factor.flip(0).reshape(-1, 1, 1, 1))
        network.depthwise.bias.mul_(factor.flip(0))
        network.grouped.weight.div_(factor.flip(0).reshape(2, 1, 4).expand(2, 8, 4).reshape(16, 4, 1, 1))
    return network


def quantized(network: nn.Module, digits: Tensor) -> nn.Module:
    prepared = prepare(network, digits[:8], X86, qat=False)
    calibrate(prepared, [digits[:256]])
    return prepared.eval()


def error(prepared: nn.Module, network: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return (prepared(images)["logits"] - network(images)).square().mean().item()


def test_equalising_keeps_the_function_and_evens_out_the_ranges(trained: nn.Module, digits: Tensor) -> None:
    network = copy.deepcopy(trained)
    assert equalise(network, digits[:8]) == 4  # not point -> hidden: ReLU6 is between them
    x = digits[1400:]
    with torch.no_grad():
        assert torch.allclose(network(x), trained(x), atol=1e-4)
    assert torch.equal(network.point.bias, trained.point.bias)
    assert torch.equal(network.head.bias, trained.head.bias)

    def ranges(n: Net) -> list[tuple[Tensor, Tensor]]:
        norm = (n.bn.weight.abs() / torch.sqrt(n.bn.running_var + n.bn.eps)).reshape(-1, 1, 1, 1)
        grouped_in = torch.cat([part.abs().amax((0, 2, 3)) for part in n.grouped.weight.chunk(2)])
        return [
            ((n.expand.weight * norm).abs().amax((1, 2, 3)), n.depthwise.weight.abs().amax((1, 2, 3))),
            (n.depthwise.weight.abs().amax((1, 2, 3)), grouped_in),
            (n.grouped.weight.abs().amax((1, 2, 3)), n.point.weight.abs().amax((0, 2, 3))),
            (n.hidden.weight.abs().amax(1), n.head.weight.abs().amax(0)),
        ]

    for before, after in zip(ranges(trained), ranges(network), strict=True):
        assert not torch.allclose(*before, rtol=0.05)
        assert torch.allclose(*after, rtol=0.02)
    plain, equalised = (error(quantized(n, digits), trained, x) for n in (trained, network))
    assert equalised < 0.5 * plain


def test_dead_channels_and_shared_weights_are_left_alone(digits: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.twice = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, image: Tensor) -> Tensor:
            x = F.relu(self.conv(image)).mean((2, 3))
            return self.head(F.relu(self.twice(F.relu(self.twice(x)))))

    torch.manual_seed(0)
    network = Shared().eval()
    assert equalise(network, digits[:4]) == 0
    chain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        chain[0].weight[1] = 0.0
    before = chain(digits[:9])
    assert equalise(chain, digits[:4]) == 1
    assert torch.isfinite(chain[2].weight).all()
    assert torch.allclose(chain(digits[:9]), before, atol=1e-5)


def channel_means(prepared: nn.Module, images: Tensor) -> list[Tensor]:
    """The mean of every matrix layer's output, per channel, with the network run as a whole."""
    means: list[Tensor] = []

    class Recording(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if operation(n) in {"conv2d", "linear"}:
                means.append(value.transpose(0, 1).flatten(1).mean(1))
            return value

    with torch.no_grad():
        Recording(prepared.network).run(images)
    return means


def test_bias_correction_removes_the_mean_error_of_every_channel(trained: nn.Module, digits: Tensor) -> None:
    prepared, images = quantized(trained, digits), digits[:256]
    enable_fake_quant(prepared, False, False)
    floats = channel_means(prepared, images)
    enable_fake_quant(prepared)
    before = [q - f for q, f in zip(channel_means(prepared, images), floats, strict=True)]
    assert correct_bias(prepared, [images[:100], images[100:]]) == 6
    after = [q - f for q, f in zip(channel_means(prepared, images), floats, strict=True)]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new.abs().max() < 1e-4 * floats[i].abs().max(), i
        assert old.abs().max() > 10 * new.abs().max(), i
    assert not prepared.training


@pytest.fixture(scope="module")
def coarse() -> object:
    """Four bits of weight, where rounding matters (the modules take any range)."""

    def prepared(network: nn.Module, digits: Tensor) -> nn.Module:
        made = quantized(network, digits)
        for module in made.modules():
            if isinstance(module, WeightPerChannelFakeQuantize):
                module.quant_min, module.quant_max = -7, 7
        return made

    return prepared


def test_adaptive_rounding_beats_rounding_to_the_nearest(trained: nn.Module, digits: Tensor, coarse: object) -> None:
    network = copy.deepcopy(trained)
    equalise(network, digits[:8])
    nearest, corrected, adapted = (coarse(network, digits) for _ in range(3))
    correct_bias(corrected, [digits[:256]])
    weights = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    assert adapt_rounding(adapted, [digits[:128], digits[128:256]], iterations=300) >= 5
    x = digits[1400:]
    errors = [error(p, network, x) for p in (nearest, corrected, adapted)]
    assert errors[2] < 0.6 * errors[0]
    assert errors[2] < 0.8 * errors[1]
    changed = 0
    for name, module in adapted.network.named_modules():
        if not isinstance(module, WeightPerChannelFakeQuantize):
            continue
        node = next(n for n in adapted.network.graph.nodes if n.target == name)
        old, new = weights[f"network.{node.args[0].target}"], adapted.network.get_parameter(node.args[0].target)
        if torch.equal(old, new):
            continue
        # On integers already, each the one below or above, with the scale it had.
        scale = module.qparams(old)[0]
        assert torch.equal(module.qparams(new)[0], scale)
        assert torch.allclose(module(new), new, rtol=1e-6, atol=0)
        steps = ((new - old) / scale.reshape(-1, *[1] * (old.dim() - 1))).abs()
        assert steps.max() < 1.001
        changed += int((steps > 0.501).sum())
    assert changed > 20


def test_rounded_weights_survive_saving_loading_and_converting(
    trained: nn.Module, digits: Tensor, tmp_path: Path
) -> None:
    import onnxruntime

    network = copy.deepcopy(trained)
    equalise(network, digits[:8])
    prepared = quantized(network, digits)
    assert adapt_rounding(prepared, [digits[:64]], iterations=100) > 0
    save_file(prepared.state_dict(), tmp_path / "state.safetensors")
    fresh = prepare(Net(), digits[:8], X86, qat=False)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    x = digits
    with torch.no_grad():
        expected = prepared(x)["logits"]
        assert torch.equal(fresh.eval()(x)["logits"], expected)
    integers = [b.float() for b in convert(fresh).buffers() if b.dtype == torch.int8]
    assert len(integers) == 6
    for node in fresh.network.graph.nodes:
        if operation(node) in {"conv2d", "linear"}:
            source = node.args[1]
            weight = fresh.network.get_parameter(source.args[0].target)
            scale = fresh.network.get_submodule(source.target).qparams(weight)[0]
            rounded = torch.round(weight / scale.reshape(-1, *[1] * (weight.dim() - 1)))
            assert any(torch.equal(i, rounded) for i in integers)
    path, preprocessing = tmp_path / "net.onnx", Preprocessing(size=[1, 8, 8], mean=[0.5], std=[0.5])
    export_onnx(convert(fresh), path, size=[1, 8, 8], opset=18, classes=list("0123456789"), preprocessing=preprocessing)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert (found.argmax(1) == expected.argmax(1).numpy()).mean() >= 0.995


def test_corrections_want_a_network_prepared_without_training_and_images(trained: nn.Module, digits: Tensor) -> None:
    prepared = prepare(trained, digits[:8], X86, qat=True)
    with pytest.raises(UsageError, match="only for post-training quantization"):
        correct_bias(prepared, [digits[:8]])
    with pytest.raises(UsageError, match="no image to correct with"):
        adapt_rounding(quantized(trained, digits), [])


class Tokens(nn.Module):
    """Rows of an image as eight tokens of eight channels, then the mean over `axis`: 1, tokens, or 2, channels."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(image.squeeze(1)))))
        return self.head(x.mean(self.axis))


@pytest.mark.parametrize("axis", [1, 2])
def test_the_last_axis_behind_linear_layers_is_that_of_channels(digits: Tensor, axis: int) -> None:
    torch.manual_seed(0)
    network = Tokens(axis).eval()
    before = network(digits[:32])
    # As many tokens as channels: shapes alone would not tell them apart.
    assert equalise(network, digits[:4]) == 1
    assert torch.allclose(network(digits[:32]), before, atol=1e-5)
