"""The stage `teacher`: load trained weights, or train them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from ..artifact import Artifact, ModelSpec, file_sha256
from ..data import Dataset
from ..errors import EdgekdError, Problem, nearest
from ..learner import Student
from ..models import build, load_weights, specify
from ..profile import Profile
from ..recipe import Component, ComponentField, Training
from ..registry import register
from ..train import predict
from .teaching import Context, Teaching, learner_problems
from .workspace import Workspace

__all__ = ["Teacher"]


@register("stages", "teacher")
class Teacher(Training):
    """Load a trained network (`weights`), or train one on labels (`epochs`)."""

    kind: ClassVar[str] = "teacher"
    follows: ClassVar[tuple[str, ...]] = ()

    model: ComponentField
    weights: Path | None = Field(None, description="a .safetensors file or a .pt/.pth/.th state dict")
    prefix: str | dict[str, str] = Field("", description="prefix of the file's keys to drop, or a map of prefixes")
    classes: list[str] | None = Field(
        None, min_length=2, description="the classes it knows; default: all of the data's"
    )
    held_out: bool = Field(False, description="whether `weights` were trained without the validation images")
    epochs: int = Field(0, ge=0)
    objectives: list[Any] = Field(default=["ce"], min_length=1, description="as in distill; no teacher at hand here")

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """The weights must fit, or epochs must be given."""
        unknown = [name for name in self.classes or [] if name not in context.data.classes]
        if unknown:
            what = f"the data have no class {unknown[0]!r}"
            return None, [Problem(f"{context.where}.classes", what, nearest(unknown[0], context.data.classes))]
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            return None, [Problem(f"{context.where}.classes", "names one class twice", "each class once, in its order")]
        context = replace(context, data=self._data(context.data))
        try:
            spec = _specify(self.model, context.data, f"{context.where}.model")
            if self.weights is not None:
                load_weights(build(spec), self.weights, prefix=self.prefix, where=f"{context.where}.weights")
        except EdgekdError as error:
            return None, list(error.problems)
        problems = []
        if self.weights is None and self.epochs == 0:
            what = "neither weights nor epochs: the teacher would know nothing"
            problems.append(Problem(context.where, what, "set weights = 'FILE', or epochs = 10"))
        one = [("student", spec, self.objectives, f"{context.where}.objectives")]
        alone = Teaching(self.objectives, Component(use="frozen"))
        return spec, problems + learner_problems(one, alone, self, context, context.where)

    def _data(self, data: Dataset) -> Dataset:
        return data if self.classes is None else data.of_classes(self.classes)

    def inputs(self) -> dict[str, str]:
        """The weights' digest."""
        return {"weights": file_sha256(self.weights)} if self.weights is not None and self.weights.is_file() else {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Teacher:
        """Nothing is left open."""
        return self

    def run(self, workspace: Workspace) -> Artifact:
        """Load, then train if epochs are asked for."""
        torch.manual_seed(workspace.recipe.seed)
        workspace = replace(workspace, data=self._data(workspace.data))
        data = workspace.data
        spec = _specify(self.model, data, "teacher.model")
        network = build(spec)
        if self.weights is not None:
            load_weights(network, self.weights, prefix=self.prefix, where="teacher.weights")
        metrics: dict[str, Any] = {}
        if self.epochs:
            alone = Teaching(self.objectives, Component(use="frozen"))
            learner = workspace.learner([Student(network, self.objectives)], alone)
            metrics = workspace.train(learner, self)[0].metrics
        elif len(data.validation):
            logits = predict(network, data.validation, data, 250)
            metrics = workspace.task.metrics(logits, data.validation.labels.numpy())
        return workspace.save(network, spec, metrics=metrics)


def _specify(model: Component, data: Dataset, where: str) -> ModelSpec:
    return specify(model.use, model.args, classes=len(data.classes), size=data.size, where=where)
