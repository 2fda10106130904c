from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from edgekd.errors import UsageError
from edgekd.models import Tapped, build, outputs, specify, tap_paths

TAPS = ("layer1", "layer2.0.conv1", "bn1")


def resnet() -> nn.Module:
    return build(specify("cifar-resnet", {"depth": 8}, classes=10, size=[3, 32, 32], where="m"))


def test_taps_equal_hooks_set_by_hand() -> None:
    net = resnet().eval()
    x = torch.randn(2, 3, 32, 32)
    expected: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: expected.__setitem__(path, o.clone()))
        for path in TAPS
    ]
    logits = net(x)
    for handle in handles:
        handle.remove()
    found = Tapped(net, TAPS)(x)
    assert list(found) == ["logits", *TAPS]
    assert torch.equal(found["logits"], logits)
    assert all(torch.equal(found[path], expected[path]) for path in TAPS)
    assert found["layer2.0.conv1"].shape == (2, 32, 16, 16)
    assert all(not m._forward_hooks for m in net.modules())


def test_gradients_flow_through_features() -> None:
    net = resnet().train()
    Tapped(net, ["layer1"])(torch.randn(2, 3, 32, 32))["layer1"].square().mean().backward()
    assert net.conv1.weight.grad is not None
    assert net.layer3[0].conv1.weight.grad is None


def test_features_are_not_kept_between_calls() -> None:
    tapped = Tapped(resnet(), ["layer1"])
    features = tapped(torch.randn(2, 3, 32, 32))
    kept = weakref.ref(features["layer1"])
    del features
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("training", [True, False])
def test_taps_survive_export(training: bool) -> None:
    tapped = Tapped(resnet(), TAPS).train(training)
    x = torch.randn(4, 3, 32, 32)
    shapes = ({0: Dim("batch", min=1, max=64)},)
    program = torch.export.export(tapped, (x,), dynamic_shapes=shapes, strict=False)
    exported = program.module()
    found = exported(torch.cat([x, x]))
    assert list(found) == ["logits", *TAPS]
    expected = tapped(torch.cat([x, x]))  # the wrapper still works, and the two agree
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    found["layer1"].sum().backward()
    assert exported.network.conv1.weight.grad.abs().sum() > 0


def test_unknown_taps_name_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no module 'layer1\.0\.conv3'") as caught:
        Tapped(resnet(), ["layer1.0.conv3"])
    assert "'layer1.0.conv" in str(caught.value.problem.hint)
    with pytest.raises(UsageError, match="at the top: conv1, bn1, layer1, layer2, layer3, linear"):
        Tapped(resnet(), ["zzz"])


def test_taps_that_do_not_run_or_hold_no_tensor() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Identity()
            self.pair = nn.Identity()
            self.text = nn.Identity()
            self.parts = nn.ModuleList([nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            self.text("no tensor")
            return self.parts[0](self.pair((x, 2 * x))[1])

    net, x = Odd(), torch.randn(2, 3)
    assert tap_paths(net) == ["unused", "pair", "text", "parts.0"]
    assert torch.equal(Tapped(net, ["pair"])(x)["pair"], x)
    with pytest.raises(UsageError, match="does not run"):
        Tapped(net, ["unused"])(x)
    with pytest.raises(UsageError, match="returns str"):
        Tapped(net, ["text"])(x)
    assert all(not m._forward_hooks for m in net.modules())


def test_outputs_normalises_what_networks_return() -> None:
    t = torch.zeros(2, 3)
    assert outputs(t)["logits"] is t
    assert outputs({"logits": t, "aux": t, "note": "x"}).keys() == {"logits", "aux"}
    assert outputs(SimpleNamespace(logits=t, loss=None)) == {"logits": t}
    with pytest.raises(UsageError, match=r"a mapping with \['scores'\]"):
        outputs({"scores": t})
    with pytest.raises(UsageError, match="tuple"):
        outputs((t, t))
