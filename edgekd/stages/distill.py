"""The stage `distill`: train a student with a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from ..artifact import Artifact, ModelSpec
from ..errors import EdgekdError, Problem
from ..models import build, specify
from ..profile import Profile
from ..recipe import Component, ComponentField, Training
from ..registry import register
from .workspace import Context, Teaching, Workspace, learner_problems, load_network

__all__ = ["DEFAULT_OBJECTIVES", "Distill"]

DEFAULT_OBJECTIVES: list[dict[str, Any]] = [{"use": "ce", "weight": 0.1}, {"use": "kl", "weight": 0.9, "tau": 4.0}]


@register("stages", "distill")
class Distill(Training):
    """Train a student towards its teacher; without `model` the network at hand goes on learning."""

    kind: ClassVar[str] = "distill"
    follows: ClassVar[tuple[str, ...]] = ("teacher", "distill", "prune")

    model: ComponentField | None = Field(None, description="the student; default: the source's network")
    objectives: list[Any] = Field(default=DEFAULT_OBJECTIVES, min_length=1)
    source: ComponentField = Field(Component(use="frozen"), description="where the teacher's answers come from")

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """The student must build, taps must exist, and its outputs must fit the teacher's."""
        spec = context.source
        if self.model is not None:
            try:
                spec = specify(
                    self.model.use,
                    self.model.args,
                    classes=len(context.data.classes),
                    size=context.data.size,
                    where=f"{context.where}.model",
                )
            except EdgekdError as error:
                return None, list(error.problems)
        problems = learner_problems(spec, self.objectives, context, self.source) if spec is not None else []
        if self.epochs == 0:
            problems.append(Problem(f"{context.where}.epochs", "must be at least 1, got 0"))
        return spec, problems

    def inputs(self) -> dict[str, str]:
        """None beside data and parents."""
        return {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Distill:
        """Nothing is left open."""
        return self

    def run(self, workspace: Workspace) -> Artifact:
        """Build or take over the student, train it, keep the better weights."""
        torch.manual_seed(workspace.recipe.seed)
        data = workspace.data
        if self.model is not None:
            args = self.model.args
            spec = specify(self.model.use, args, classes=len(data.classes), size=data.size, where="distill.model")
            network = build(spec)
        else:
            source = workspace.parents["source"]
            spec, network = source.manifest.model, load_network(source)
        done = workspace.train(workspace.learner(network, self.objectives, self.source), self)
        return workspace.save(network, spec, metrics=done.metrics)
