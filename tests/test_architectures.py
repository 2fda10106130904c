"""Every architecture through the whole chain: pruned, quantized both ways, exported, reloaded, interrupted, resumed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.artifact import Artifact
from edgekd.pipeline import plan, run_steps
from edgekd.recipe import parse_recipe
from edgekd.registry import register, unregister
from edgekd.runtimes import open_session
from edgekd.stages import Workspace
from edgekd.stages.teaching import load_network
from edgekd.stages.workspace import load_prepared

sys.path.insert(0, str(Path(__file__).parent / "strategies"))
from tiny_strategies import tiny_digits


class Stranger(nn.Module):
    """No family of ours: two branches that are concatenated, a grouped convolution, and a transformer block."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(in_channels, 16, 5, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.narrow = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(24, 32, 3, 2, 1, groups=4, bias=False), nn.BatchNorm2d(32), nn.SiLU())
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.cat([self.wide(x), self.narrow(x)], 1)).flatten(2).transpose(1, 2)
        seen = self.norm1(x)
        weights = (self.query(seen) @ self.key(seen).transpose(1, 2) / 32**0.5).softmax(-1)
        x = x + self.out(weights @ self.value(seen))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def stranger(num_classes: int = 10, in_channels: int = 1) -> Stranger:
    """As a user's own `pkg.mod:fn`."""
    return Stranger(num_classes, in_channels)


ARCHITECTURES = {
    "pad shortcuts": {"use": "cifar-resnet", "depth": 8, "width": 8},
    "convolved shortcuts": {"use": "cifar-resnet", "depth": 8, "width": 8, "shortcut": "conv"},
    "inverted residuals": {"use": "mobilenet", "width": 0.25},
    "attention": {"use": "vit", "patch": 4, "dim": 16, "depth": 2, "heads": 2},
    "stranger": {"use": "test_architectures:stranger"},
}


def recipe(model: dict[str, Any]) -> dict[str, Any]:
    heal = {"epochs": 1, "checkpoint_s": 0.0, "precision": "fp32"}
    quantize = {"use": "quantize", "keep_float": False, "calibration": 64}
    chain = [
        {"use": "prune", "target": {"macs": 0.75}, "channel_multiple": 1, "heal": heal},
        {**quantize, "heal": {"epochs": 0}},
        {"use": "export"},
        {**quantize, "heal": {**heal, "lr": 0.001}, "after": "prune"},
        {"use": "export"},
    ]
    return {
        "version": 1,
        "name": "architecture",
        "data": {"use": "tiny-digits", "batch": 32},
        # Long enough that no layer of the mobile network is dead, which calibration would refuse.
        "teacher": {"model": model, "epochs": 6, "precision": "fp32"},
        "stage": chain,
    }


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    register("data", "tiny-digits")(tiny_digits)
    yield
    unregister("data", "tiny-digits")


class Cut(Exception):
    """Stands for whatever ends a process."""


def walked(
    table: dict[str, Any], directory: Path, emit: Callable[[dict[str, Any]], None] = lambda event: None
) -> dict[str, Artifact]:
    """Every stage of the chain, by name; nothing is measured."""
    planned = plan(parse_recipe(table), directory)
    return dict(zip([step.name for step in planned.steps], run_steps(planned, emit), strict=True))


def logits(network: nn.Module, images: Tensor) -> Tensor:
    network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    with torch.no_grad():
        found = network(images)
    return found["logits"] if isinstance(found, dict) else found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_chain(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = recipe(ARCHITECTURES[architecture])
    stored: dict[str, nn.Module] = {}
    save = Workspace.save

    def remembering(self: Workspace, network: nn.Module, *args: Any, **options: Any) -> Artifact:
        stored[self.name] = network
        return save(self, network, *args, **options)

    monkeypatch.setattr(Workspace, "save", remembering)
    made = walked(table, tmp_path / "run")
    assert list(made) == ["teacher", "prune", "quantize", "export", "quantize-2", "export-2"]
    data = plan(parse_recipe(table), tmp_path / "run").data
    mean, std = torch.tensor(data.mean).view(1, -1, 1, 1), torch.tensor(data.std).view(1, -1, 1, 1)
    images = (data.test.images.float() / 255 - mean) / std

    # Pruned: smaller by what was asked, and back from JSON and safetensors bit for bit.
    share = made["prune"].manifest.metrics["macs"] / made["teacher"].manifest.metrics["macs"]
    assert 0.5 < share <= 0.75
    pruned = load_network(Artifact.open(made["prune"].path))
    assert torch.equal(logits(pruned, images), logits(stored["prune"], images))

    for name, export in (("quantize", "export"), ("quantize-2", "export-2")):
        again = load_prepared(Artifact.open(made[name].path))
        found = logits(again, images)
        assert torch.equal(found, logits(stored[name], images))
        session = open_session(made[export].file("model.onnx"))
        answers = session.run({"image": images.numpy()})["logits"]
        session.close()
        # Ties apart, which rounding decides: images whose best two logits lie closer than the two files differ.
        best = np.sort(found.numpy(), 1)
        clear = best[:, -1] - best[:, -2] > 2 * np.abs(answers - found.numpy()).max()
        assert clear.mean() > 0.5
        assert (answers.argmax(1) == found.numpy().argmax(1))[clear].all()
        counts = made[export].manifest.metrics["layers"]
        assert counts["int8"] > 0
        if not {"attention", "stranger"} & {architecture}:  # products of activations stay float there
            assert counts["float"] == 0

    # Killed in both trainings and started again: the same bits.
    def cut(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            raise Cut

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for name in ("prune", "quantize-2"):
        shutil.rmtree(tmp_path / "cut" / made[name].path.name)
    for _ in range(2):
        with pytest.raises(Cut):
            walked(table, tmp_path / "cut", cut)
    resumed: list[str] = []
    whole = walked(table, tmp_path / "cut", lambda e: resumed.append(e["stage"]) if e["event"] == "resume" else None)
    assert resumed == ["quantize-2"]
    for name in ("prune", "quantize-2"):
        assert whole[name].manifest.files["model.safetensors"] == made[name].manifest.files["model.safetensors"], name
