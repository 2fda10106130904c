from __future__ import annotations

import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from edgekd.artifact import ModelSpec
from edgekd.errors import ArtifactError
from edgekd.models import build, changed_attributes, load_state, save_state, specify

SIZE = [3, 32, 32]


class Normed(nn.Module):
    """Group norm, layer norm and a depthwise convolution, which the built-in networks do not mix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 4, padding=1)
        self.group = nn.GroupNorm(4, 16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.layer = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layer(self.depthwise(self.group(self.conv(x)).relu()).mean((2, 3))))


@pytest.mark.parametrize(
    ("use", "args"),
    [
        ("cifar-resnet", {"depth": 8}),
        ("cifar-resnet", {"depth": 8, "shortcut": "conv"}),
        ("mobilenet", {"width": 0.5}),
        ("vit", {"depth": 2}),
        (f"{__name__}:Normed", {}),
    ],
)
def test_a_pruned_network_is_rebuilt_exactly(use: str, args: dict[str, object], tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    torch.manual_seed(0)
    spec = specify(use, args, classes=10, size=SIZE, where="m")
    pruned = build(spec).train()
    pruned(torch.randn(8, 3, 32, 32))  # running statistics that are not the initial ones
    kept = [m for n, m in pruned.named_modules() if n == "linear"]
    if use == "cifar-resnet" and "shortcut" not in args:  # a padded residual stream cannot be pruned
        kept += [m for n, m in pruned.named_modules() if n == "conv1" or n.endswith(".conv2")]
    attentions = [m for m in pruned.modules() if hasattr(m, "qkv")]
    options = {
        "num_heads": {m.qkv: m.num_heads for m in attentions},
        "prune_num_heads": True,
        "head_pruning_ratio": 0.3,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            pruned,
            torch.randn(1, 3, 32, 32),
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=kept,
            **(options if attentions else {}),
        )
        pruner.step()
    for m in attentions:
        m.num_heads = pruner.num_heads[m.qkv]

    attributes = changed_attributes(build(spec), pruned)
    text = spec.model_copy(update={"attributes": attributes}).model_dump_json()
    save_state(pruned, tmp_path / "model.safetensors")
    rebuilt = build(ModelSpec.model_validate_json(text))
    shapes = {k: v.shape for k, v in pruned.state_dict().items()}
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == shapes
    assert shapes != {k: v.shape for k, v in build(spec).state_dict().items()}
    load_state(rebuilt, tmp_path / "model.safetensors")
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(pruned.eval()(x), rebuilt.eval()(x))
    assert torch.equal(pruned.train()(x), rebuilt.train()(x))
    assert str(pruned) == str(rebuilt)


def test_state_resizes_a_network_whose_attributes_are_unknown(tmp_path) -> None:
    small, large = nn.Linear(3, 2), nn.Linear(5, 4)
    save_state(small, tmp_path / "s.safetensors")
    load_state(large, tmp_path / "s.safetensors")
    x = torch.randn(7, 3)
    assert torch.equal(small(x), large(x))


def test_tied_and_channels_last_tensors_survive(tmp_path) -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
        net[1].weight = net[0].weight
        return net

    net, other = tied(), tied()
    save_state(net, tmp_path / "s.safetensors")
    load_state(other, tmp_path / "s.safetensors")
    assert other[1].weight is other[0].weight
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(net(x), other(x))


def test_damaged_and_foreign_files_are_refused(tmp_path) -> None:
    file = tmp_path / "s.safetensors"
    save_state(nn.Linear(300, 20), file)
    with pytest.raises(ArtifactError, match=r"1 missing \['0.weight'\].*2 unexpected \['bias', 'weight'\]"):
        load_state(nn.Sequential(nn.Linear(300, 20, bias=False)), file)
    content = file.read_bytes()
    for size in (0, 5, 40, len(content) - 7):
        file.write_bytes(content[:size])
        with pytest.raises(ArtifactError, match="cannot read"):
            load_state(nn.Linear(300, 20), file)
    with pytest.raises(ArtifactError, match="cannot read"):
        load_state(nn.Linear(300, 20), tmp_path / "none.safetensors")
