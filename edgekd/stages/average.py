"""The stage `average`: an ensemble of students as one network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..artifact import Artifact, ModelSpec
from ..errors import Problem
from ..models.average import Average
from ..profile import Profile
from ..registry import register
from ..train import predict
from .teaching import Context, Names, Teaching, load_network
from .workspace import Workspace

__all__ = ["AverageStage"]


@register("stages", "average")
class AverageStage(BaseModel):
    """Put students side by side in one network that averages their logits: one file, one call on the device."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "average"
    follows: ClassVar[tuple[str, ...]] = ("distill", "prune", "fuse")

    members: Names = Field(default=[], description="stages; default: all students of the distillation before")

    @property
    def starts(self) -> dict[str, str]:
        """The stages that it puts side by side, and where they are named."""
        return dict.fromkeys(self.members, "members")

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """Two students or more."""
        specs = [context.starts[name] for name in self.members]
        place, hint = f"{context.where}.members", 'members = ["distill.a", "distill.b"]'
        if len(specs) < 2:
            return None, [Problem(place, f"needs two students or more, got {len(specs)}", hint)]
        if len(set(self.members)) < len(self.members):
            return None, [Problem(place, "names one student twice", hint)]
        return averaged(specs), []

    def inputs(self) -> dict[str, str]:
        """None beside data and parents."""
        return {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> AverageStage:
        """Nothing is left open but the members, which the plan knows."""
        return self

    def run(self, workspace: Workspace) -> Artifact:
        """Take the students' weights over, and judge them together on the validation split."""
        parts = [workspace.parents[f"start.{name}"] for name in self.members]
        network = Average([load_network(part) for part in parts])
        metrics = {}
        data = workspace.data
        if len(data.validation):
            metrics = workspace.task.metrics(
                predict(network, data.validation, data, 250), data.validation.labels.numpy()
            )
        return workspace.save(network, averaged([part.manifest.model for part in parts]), metrics=metrics)


def averaged(specs: Sequence[ModelSpec]) -> ModelSpec:
    """The spec of the networks side by side."""
    return ModelSpec(use="averaged", args={"members": [spec.model_dump(mode="json") for spec in specs]})
