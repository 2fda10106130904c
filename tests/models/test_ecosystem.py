from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from edgekd.artifact import ModelSpec
from edgekd.errors import MissingExtra, UsageError
from edgekd.models import Tapped, build, count, load_state, outputs, save_state, specify

SMALL_HF = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16, "layer_type": "basic"}


def network(use: str, size: tuple[int, ...] = (3, 32, 32), **args: object) -> nn.Module:
    spec = specify(use, args, classes=7, size=list(size), where="student")
    return build(ModelSpec.model_validate_json(spec.model_dump_json()))


@pytest.mark.parametrize(("name", "args"), [("resnet10t", {}), ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1})])
def test_timm(name: str, args: dict[str, object]) -> None:
    timm_or_skip()
    net = network(f"timm:{name}", (1, 32, 32), **args).eval()
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def timm_or_skip() -> None:
    try:
        network("timm:resnet10t")
    except MissingExtra:
        pytest.skip("timm is not installed")


def test_timm_refuses_what_it_cannot_do() -> None:
    timm_or_skip()
    with pytest.raises(UsageError, match="did you mean 'resnet"):
        network("timm:resnet19")
    with pytest.raises(UsageError, match="downloads nothing"):
        network("timm:resnet10t", pretrained=True)
    with pytest.raises(UsageError, match="unexpected keyword argument 'widht'"):
        network("timm:resnet10t", widht=2)


def test_torchvision() -> None:
    try:
        net = network("torchvision:squeezenet1_1", (1, 32, 32)).eval()
    except MissingExtra:
        pytest.skip("torchvision is not installed")
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(UsageError, match="no classifier"):
        network("torchvision:fasterrcnn_resnet50_fpn")
    with pytest.raises(UsageError, match="downloads nothing"):
        network("torchvision:squeezenet1_1", weights="DEFAULT")


def test_transformers_by_type() -> None:
    pytest.importorskip("transformers")
    net = network("hf:resnet", (1, 32, 32), config=SMALL_HF).eval()
    x = torch.randn(2, 1, 32, 32)
    found = Tapped(net, ["resnet.encoder.stages.0"])(x)
    assert found["logits"].shape == (2, 7)
    assert torch.equal(found["logits"], outputs(net(x))["logits"])
    assert found["resnet.encoder.stages.0"].shape[1] == 16
    assert count(net, [1, 32, 32])[0] == sum(p.numel() for p in net.parameters())
    vit_config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    vit = network("hf:vit", config=vit_config)
    assert vit.vit.embeddings.position_embeddings.shape == (1, 1 + 16, 32)  # image_size came from the data set
    with pytest.raises(UsageError, match=r"student.config.depht"):
        network("hf:resnet", config={"depht": [1]})
    with pytest.raises(UsageError, match="did you mean 'resnet'"):
        network("hf:resnett")
    with pytest.raises(UsageError, match="hf download microsoft/resnet-50"):
        network("hf:microsoft/resnet-50")


@pytest.mark.parametrize("safe", [True, False])
def test_transformers_directory(safe: bool, tmp_path) -> None:
    pytest.importorskip("transformers")
    source = network("hf:resnet", config=SMALL_HF).eval()
    directory = tmp_path / "saved"
    source.save_pretrained(directory)
    if not safe:
        (directory / "model.safetensors").unlink()
        torch.save(source.state_dict(), directory / "pytorch_model.bin")
    spec = specify(f"hf:{directory}", {}, classes=7, size=[3, 32, 32], where="teacher")
    loaded = build(spec).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(loaded(x))["logits"], outputs(source(x))["logits"])
    with pytest.raises(UsageError, match=r"num_labels 7, here 9"):
        specify(f"hf:{directory}", {}, classes=9, size=[3, 32, 32], where="teacher")

    save_state(loaded, tmp_path / "own.safetensors")
    directory.rename(tmp_path / "gone")  # an artifact's spec stands for itself
    again = build(ModelSpec.model_validate_json(spec.model_dump_json())).eval()
    load_state(again, tmp_path / "own.safetensors")
    assert torch.equal(outputs(again(x))["logits"], outputs(source(x))["logits"])


def test_damaged_transformers_directory(tmp_path) -> None:
    pytest.importorskip("transformers")
    network("hf:resnet", config=SMALL_HF).save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match="SafetensorError"):
        network(f"hf:{tmp_path / 'm'}")
    headless = network("hf:resnet", config=SMALL_HF)
    headless.resnet.save_pretrained(tmp_path / "headless")
    with pytest.raises(UsageError, match=r"lacks 2 tensors of a resnet classifier: classifier.1.bias"):
        network(f"hf:{tmp_path / 'headless'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="student"):
        network(f"hf:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("use", "module", "extra"),
    [
        ("timm:resnet18", "timm", "timm"),
        ("torchvision:resnet18", "torchvision", "timm"),
        ("hf:resnet", "transformers", "hf"),
    ],
)
def test_missing_extras(use: str, module: str, extra: str, monkeypatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"edgekd\[{extra}\]"):
        network(use)
