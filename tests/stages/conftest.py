"""One chain of tiny stages on real digits, with the networks as they were when their artifacts were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tiny_stages import RESNET, TAUGHT, Chain, Saving, made_recipe
from torch import Tensor, nn

from edgekd.artifact import Artifact
from edgekd.data import Dataset, Split
from edgekd.profile import Profile, load_profile
from edgekd.recipe import Component, Recipe
from edgekd.stages import Distill, Prune, Quantize, Teacher, Workspace
from edgekd.stages.distill import DEFAULT_OBJECTIVES
from edgekd.stages.teaching import Teaching
from edgekd.tasks import Classification


@pytest.fixture(scope="session")
def cpu() -> Profile:
    return load_profile("cpu-x86")


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """250 + 100 + 100 digits [1, 16, 16]."""
    x, y = load_digits(return_X_y=True)
    grey = torch.from_numpy(x[:450] * 255 / 16).float().reshape(-1, 1, 8, 8)
    pixels = F.interpolate(grey, size=16, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(y[:450]).long()
    parts = [slice(0, 250), slice(250, 350), slice(350, 450)]
    splits = [Split(pixels[part], labels[part]) for part in parts]
    return Dataset(*splits, classes=[f"digit {d}" for d in range(10)], mean=[0.3], std=[0.35], fingerprint="digits")


@pytest.fixture(scope="session")
def images(dataset: Dataset) -> Tensor:
    """The test images, normalised [100, 1, 16, 16]."""
    return (dataset.test.images.float() / 255 - 0.3) / 0.35


@pytest.fixture(scope="session")
def workspace(dataset: Dataset, cpu: Profile) -> Callable[..., Workspace]:
    def make(
        stage: Any,
        directory: Path,
        parents: Mapping[str, Artifact],
        recipe: Recipe | None = None,
        saved: dict[str, nn.Module] | None = None,
        emit: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> Workspace:
        return Saving(
            recipe=recipe or made_recipe(),
            data=dataset,
            task=Classification(),
            profiles=[cpu],
            name=directory.name,
            key=f"key of {directory.name}",
            destination=directory,
            parents=parents,
            config={"use": stage.kind, **stage.model_dump(mode="json")},
            emit=emit,
            saved={} if saved is None else saved,
        )

    return make


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, workspace: Callable[..., Workspace], cpu: Profile) -> Chain:
    """teacher, distill, prune, then quantize without (`ptq`) and with training (`qat`)."""
    root = tmp_path_factory.mktemp("chain")
    distilled = Teaching(DEFAULT_OBJECTIVES, Component(use="frozen"))
    artifacts: dict[str, Artifact] = {}
    saved: dict[str, nn.Module] = {}

    def run(name: str, stage: Any, parents: dict[str, str]) -> None:
        stage = stage.resolved([cpu], distilled)
        made = workspace(stage, root / name, {r: artifacts[p] for r, p in parents.items()}, saved=saved)
        artifacts[name] = stage.run(made)

    def of(kind: Any, **config: Any) -> Any:
        return kind.model_validate(config)

    run("teacher", of(Teacher, model=RESNET, epochs=4, lr=0.2), {})
    run("distill", of(Distill, model=RESNET, epochs=3, ema=0.9, objectives=TAUGHT), {"teacher": "teacher"})
    distilled = Teaching(TAUGHT, Component(use="frozen"))
    both = {"source": "distill", "teacher": "teacher"}
    heal = {"epochs": 2, "lr": 0.05}
    run("prune", of(Prune, target={"macs": 0.7}, channel_multiple=2, heal=heal), both)
    both["source"] = "prune"
    run("ptq", of(Quantize, calibration=100, keep_float=False, heal={"epochs": 0}), both)
    run("qat", of(Quantize, calibration=100, keep_float=False, heal={"epochs": 2}), both)
    return Chain(artifacts, saved)
