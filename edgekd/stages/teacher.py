"""The stage `teacher`: load trained weights, or train them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from ..artifact import Artifact, ModelSpec, file_sha256
from ..errors import EdgekdError, Problem
from ..models import build, load_weights, specify
from ..profile import Profile
from ..recipe import ComponentField, Training
from ..registry import register
from ..train import predict
from .workspace import Context, Teaching, Workspace, learner_problems

__all__ = ["Teacher"]


@register("stages", "teacher")
class Teacher(Training):
    """Load a trained network (`weights`), or train one on labels (`epochs`)."""

    kind: ClassVar[str] = "teacher"
    follows: ClassVar[tuple[str, ...]] = ()

    model: ComponentField
    weights: Path | None = Field(None, description="a .safetensors file or a .pt/.pth/.th state dict")
    prefix: str | dict[str, str] = Field("", description="prefix of the file's keys to drop, or a map of prefixes")
    epochs: int = Field(0, ge=0)
    objectives: list[Any] = Field(default=["ce"], min_length=1, description="as in distill; no teacher at hand here")

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """The weights must fit, or epochs must be given."""
        try:
            spec = _specify(self.model, context)
            if self.weights is not None:
                load_weights(build(spec), self.weights, prefix=self.prefix, where=f"{context.where}.weights")
        except EdgekdError as error:
            return None, list(error.problems)
        problems = []
        if self.weights is None and self.epochs == 0:
            what = "neither weights nor epochs: the teacher would know nothing"
            problems.append(Problem(context.where, what, "set weights = 'FILE', or epochs = 10"))
        return spec, problems + learner_problems(spec, self.objectives, context)

    def inputs(self) -> dict[str, str]:
        """The weights' digest."""
        return {"weights": file_sha256(self.weights)} if self.weights is not None and self.weights.is_file() else {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Teacher:
        """Nothing is left open."""
        return self

    def run(self, workspace: Workspace) -> Artifact:
        """Load, then train if epochs are asked for."""
        torch.manual_seed(workspace.recipe.seed)
        data = workspace.data
        spec = specify(
            self.model.use, self.model.args, classes=len(data.classes), size=data.size, where="teacher.model"
        )
        network = build(spec)
        if self.weights is not None:
            load_weights(network, self.weights, prefix=self.prefix, where="teacher.weights")
        metrics: dict[str, Any] = {}
        if self.epochs:
            metrics = workspace.train(workspace.learner(network, self.objectives), self).metrics
        elif len(data.validation):
            logits = predict(network, data.validation, data, 250)
            metrics = workspace.task.metrics(logits, data.validation.labels.numpy())
        return workspace.save(network, spec, metrics=metrics)


def _specify(model: Any, context: Context) -> ModelSpec:
    return specify(
        model.use,
        model.args,
        classes=len(context.data.classes),
        size=context.data.size,
        where=f"{context.where}.model",
    )
