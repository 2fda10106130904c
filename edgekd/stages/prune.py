"""The stage `prune`: take channels away, then heal."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .. import ranks
from ..artifact import Artifact, ModelSpec
from ..errors import Problem, StageError
from ..learner import Student
from ..models import changed_attributes
from ..profile import Profile
from ..pruning import Target, prune
from ..recipe import Component
from ..registry import register
from .teaching import Context, Heal, Teaching, healing_problems, load_network, teaching
from .workspace import Workspace

__all__ = ["Prune"]


@register("stages", "prune")
class Prune(BaseModel):
    """Remove the least important channels until the target is met, then heal with the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "prune"
    follows: ClassVar[tuple[str, ...]] = ("teacher", "distill", "prune", "fuse")

    target: Target
    importance: Literal["magnitude", "bn-scale", "taylor"] = "magnitude"
    channel_multiple: int | None = Field(None, gt=0, description="default: the profile's")
    protected: list[str] = Field(default=[], description="module path patterns that keep their channels")
    heal: Heal = Heal()
    after: str | None = Field(None, description="the stage to go on from; default: the one before")

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """The source is known; its pruned shape is not yet, so taps are checked on the whole network."""
        if context.source is None:
            return None, []
        return context.source, healing_problems(context.source, self.heal, context)

    def inputs(self) -> dict[str, str]:
        """None beside data and parents."""
        return {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Prune:
        """Channel multiples from the profiles."""
        multiple = self.channel_multiple or max(p.channel_multiple for p in profiles)
        return self.model_copy(update={"channel_multiple": multiple, "heal": self.heal.after(distilled)})

    def run(self, workspace: Workspace) -> Artifact:
        """Prune (deterministic, so a resumed run prunes the same channels), then heal."""
        torch.manual_seed(workspace.recipe.seed)
        source = workspace.parents["source"]
        original = load_network(source)
        network = copy.deepcopy(original)
        plan = prune(
            network,
            workspace.example[:1],
            target=self.target,
            importance=self.importance,
            channel_multiple=self.channel_multiple or 1,
            protected=self.protected,
            loss=self._loss(workspace, original) if self.importance == "taylor" else None,
            keep_outputs=len(workspace.data.classes),
        )
        before = source.manifest.model
        changes = changed_attributes(original, network)
        attributes = {
            path: {**before.attributes.get(path, {}), **changes.get(path, {})}
            for path in before.attributes.keys() | changes.keys()
        }
        spec = before.model_copy(update={"attributes": attributes})
        if self.heal.epochs and ranks.from_first(lambda: spec) != spec:
            what = f"process {ranks.rank()} would take other channels than the first one"
            raise StageError(what, where=workspace.name, hint="use machines of one kind, or prune in one process")
        metrics: dict[str, Any] = {"macs_share": plan.macs_after / plan.macs_before}
        if self.heal.epochs:
            student = Student(network, self.heal.objectives)
            metrics |= workspace.train(workspace.learner([student], teaching(self.heal)), self.heal)[0].metrics
        return workspace.save(network, spec, metrics=metrics, documents={"plan.json": plan.model_dump(mode="json")})

    def _loss(self, workspace: Workspace, network: nn.Module) -> Any:
        """The healing objectives on a fixed set of training images, for first-order importance."""
        drawn = list(workspace.calibration(256))
        objectives = self.heal.objectives if self.heal.epochs else ["ce"]

        def loss(candidate: nn.Module) -> Tensor:
            live = teaching(self.heal)._replace(source=Component(use="frozen"))
            learner = workspace.learner([Student(candidate, objectives)], live)
            learner.eval()
            total: Tensor = sum((learner(batch)["loss"] for batch in drawn), torch.zeros(()))
            return total / len(drawn)

        return loss
