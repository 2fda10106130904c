"""The stage `quantize`: int8 by calibration, or by training with fake quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from .. import quant
from ..artifact import Artifact, ModelSpec
from ..errors import EdgekdError, Problem
from ..learner import Learner, Student, parse_objectives
from ..models import Tapped
from ..objectives import Objectives
from ..profile import Profile
from ..quant import scheme_named
from ..registry import register
from .teaching import Context, Heal, Teaching, healing_problems, load_network, teaching
from .workspace import Workspace

__all__ = ["Quantize"]


class QuantizationHeal(Heal):
    """Quantization-aware training; 0 epochs is post-training quantization."""

    lr: float = Field(0.01, gt=0)


@register("stages", "quantize")
class Quantize(BaseModel):
    """Quantize to int8 where the profile's runtime fuses it, then heal (`heal.epochs = 0`: calibration only)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "quantize"
    follows: ClassVar[tuple[str, ...]] = ("teacher", "distill", "prune", "fuse", "average")

    scheme: str = Field("auto", description="auto: what the profile's runtime fuses")
    calibration: int = Field(512, gt=0, description="training images that set the first ranges")
    heal: QuantizationHeal = QuantizationHeal()
    after: str | None = Field(None, description="the stage to go on from; default: the one before")

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """One known scheme for all profiles."""
        problems: list[Problem] = []
        try:
            if self.scheme != "auto":
                scheme_named(self.scheme, f"{context.where}.scheme")
        except EdgekdError as error:
            problems.extend(error.problems)
        wanted = sorted({p.scheme for p in context.profiles})
        if self.scheme == "auto" and len(wanted) > 1:
            what = f"the profiles want different schemes: {', '.join(wanted)}"
            problems.append(Problem(f"{context.where}.scheme", what, "run once per scheme, or name one scheme"))
        if context.source is not None:
            problems.extend(healing_problems(context.source, self.heal, context))
        return context.source, problems

    def inputs(self) -> dict[str, str]:
        """None beside data and parents."""
        return {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Quantize:
        """The scheme from the profiles."""
        scheme = profiles[0].scheme if self.scheme == "auto" else self.scheme
        return self.model_copy(update={"scheme": scheme, "heal": self.heal.after(distilled)})

    def run(self, workspace: Workspace) -> Artifact:
        """Prepare, calibrate, heal with frozen ranges in the second half, and store the fake-quantized network."""
        torch.manual_seed(workspace.recipe.seed)
        source = workspace.parents["source"]
        network = load_network(source)
        shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
        scheme = scheme_named(self.scheme, "quantize.scheme")
        training = self.heal.epochs > 0
        objectives = self.heal.objectives if training else ["ce"]
        taps = Objectives(parse_objectives(objectives)).taps("student")

        def quantized(student: nn.Module, taps: Sequence[str]) -> nn.Module:
            prepared = quant.prepare(Tapped(student, taps), workspace.example, scheme, qat=training)
            quant.calibrate(prepared, (batch["image"] for batch in workspace.calibration(self.calibration)))
            quant.enable_fake_quant(prepared)
            return prepared

        metrics: dict[str, Any] = {}
        if training:
            learner = workspace.learner([Student(network, objectives)], teaching(self.heal), tap=quantized)
            prepared = learner.student
            metrics = workspace.train(learner, self.heal, self._freezing)[0].metrics
        else:
            prepared = quantized(network, taps)
        quant.freeze(prepared)
        record = {"scheme": scheme.name, "qat": training, "taps": taps, "shapes": shapes}
        return workspace.save(prepared, source.manifest.model, metrics=metrics, quantization=record)

    def _freezing(self, epoch: int, learner: Learner) -> None:
        """Ranges and batch-norm statistics settle before the last weights do."""
        if epoch >= self.heal.epochs / 2:
            quant.freeze(learner.student)
