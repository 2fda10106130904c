"""The stage `prune`: take channels and blocks away, then heal, in one round or in several."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from torch import Tensor, nn

from .. import ranks
from ..artifact import Artifact, ModelSpec, digest, write_atomically
from ..checkpoint import METRICS
from ..errors import EdgekdError, Problem, StageError
from ..learner import Student, parse_objectives
from ..models import build, changed_attributes, load_state, save_state, without_blocks
from ..objectives import Objectives
from ..profile import Profile
from ..pruning import Importance, PruningPlan, Target, carry_out, merged, prune, reach
from ..recipe import Component
from ..registry import register
from .teaching import Context, Heal, Teaching, healing_problems, load_network, teaching
from .timing import profile_of, profile_problems, timing
from .workspace import Workspace

__all__ = ["Prune"]

#: Training images on which harm, activations and gradients are measured.
CALIBRATION = 256


@register("stages", "prune")
class Prune(BaseModel):
    """Remove what is least missed, channels and whole blocks, until the target is met; then heal with the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "prune"
    follows: ClassVar[tuple[str, ...]] = ("teacher", "distill", "prune", "fuse")

    target: Target
    importance: Importance = Field("magnitude", description="how channels are ranked: edgekd list importances")
    strategy: Literal["knapsack", "uniform"] = Field(
        "knapsack",
        description="knapsack: the least measured harm within the budget; uniform: the same share everywhere",
    )
    depth: bool = Field(True, description="residual blocks may go as a whole")
    channel_multiple: int | None = Field(None, gt=0, description="default: the profile's")
    protected: list[str] = Field(default=[], description="module path patterns that keep their channels and blocks")
    rounds: int = Field(1, gt=0, description="prune a part of the way, heal, and so on; heal.epochs are those of all")
    heal: Heal = Heal()
    after: str | None = Field(None, description="the stage to go on from; default: the one before")
    _profile: Profile | None = PrivateAttr(None)

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """The source is known; its pruned shape is not yet, so taps are checked on the whole network."""
        problems: list[Problem] = []
        if self.target.latency is not None:
            where = f"{context.where}.target.latency"
            problems += profile_problems(self.target.latency, context.profiles, where, probe=not context.done)
        if 0 < self.heal.epochs < self.rounds:
            what = f"{self.rounds} rounds share {self.heal.epochs} epochs of healing"
            problems.append(Problem(f"{context.where}.rounds", what, f"heal.epochs = {self.rounds} or more"))
        if context.source is None:
            return None, problems
        problems += healing_problems(context.source, self.heal, context)
        return context.source, problems if problems or context.done else self._out_of_reach(context.source, context)

    def _out_of_reach(self, source: ModelSpec, context: Context) -> list[Problem]:
        """What pruning would raise at once, told before anything is trained; of a network that is whole until then."""
        mine = int(context.where.removeprefix("stage[").removesuffix("]"))
        if source.attributes or source.removed or any(one.use == self.kind for one in context.recipe.stage[:mine]):
            return []
        try:
            with torch.random.fork_rng(devices=[]):
                reach(
                    build(source),
                    torch.randn(1, *context.data.size),
                    target=self.target,
                    channel_multiple=self.channel_multiple or 1,
                    protected=self.protected,
                    keep_outputs=len(context.data.classes),
                    depth=self.depth and self.strategy == "knapsack",
                    tapped=self._taps(),
                )
        except EdgekdError as error:
            own = ("protected", "target")
            return [
                Problem(f"{context.where}.{p.where}" if p.where.startswith(own) else context.where, p.what, p.hint)
                for p in error.problems
            ]
        return []

    def inputs(self) -> dict[str, str]:
        """The profile that latency is measured on."""
        return {} if self._profile is None else {"profile": digest(self._profile.model_dump(mode="json"))}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Prune:
        """Channel multiples from the profile that latency is measured on, or from all."""
        profile = None
        if self.target.latency is not None:
            with contextlib.suppress(EdgekdError):  # told by the check
                profile = profile_of(self.target.latency, profiles, "")
        multiple = self.channel_multiple or max(p.channel_multiple for p in ([profile] if profile else profiles))
        stage = self.model_copy(update={"channel_multiple": multiple, "heal": self.heal.after(distilled)})
        stage._profile = profile
        return stage

    def run(self, workspace: Workspace) -> Artifact:
        """Prune and heal, round by round. What was decided is kept: a resumed run goes on with the same network."""
        source = workspace.parents["source"]
        original = load_network(source)
        network = copy.deepcopy(original)
        plans: list[PruningPlan] = []
        metrics: dict[str, Any] = {}
        histories: list[Path] = []
        for i in range(self.rounds):
            # One process decides, by what it measures; all do what it says, as after a resume.
            decided = ranks.from_first(lambda i=i: self._decided(workspace, original, network, i))  # type: ignore[misc]
            plans.append(PruningPlan.model_validate(decided))
            carry_out(network, plans[-1], workspace.example[:1])
            if self.heal.epochs:
                metrics = self._healed(workspace, network, i)
                histories.append(workspace.partial / self._part(i) / METRICS)
        plan = merged(plans) if len(plans) > 1 else plans[0]
        metrics = {"macs_share": plan.macs_after / plan.macs_before, **metrics}
        spec = _spec(source.manifest.model, original, network, plans)
        history = workspace.partial / METRICS
        if len(histories) > 1 and ranks.first():
            _join(histories, history)
        documents = {"plan.json": plan.model_dump(mode="json")}
        return workspace.save(network, spec, metrics=metrics, documents=documents, history=history)

    def _decided(self, workspace: Workspace, original: nn.Module, network: nn.Module, i: int) -> dict[str, Any]:
        """A round's plan, from disk where a run that was killed left it there."""
        file = workspace.partial / f"plan-{i + 1}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ValidationError):
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["key"] == workspace.key:
                return PruningPlan.model_validate(stored["plan"]).model_dump(mode="json")
        torch.manual_seed(workspace.recipe.seed)  # of the adapters in the calibration loss
        batches = list(workspace.calibration(CALIBRATION))
        multiple = self.channel_multiple or 1

        def progress(what: str, done: int, total: int) -> None:
            name = f"{workspace.name}, round {i + 1}" if self.rounds > 1 else workspace.name
            workspace.emit({"event": "bench", "profile": f"{name}: {what}", "done": done, "total": total})

        with contextlib.ExitStack() as stack:
            clock = None
            if self.target.latency is not None:
                profile = profile_of(self.target.latency, workspace.profiles, "target.latency")
                precision, images = self.target.latency.precision, batches[0]["image"]
                clock = stack.enter_context(timing(profile, precision, workspace.data, images, multiple, progress))
            plan = prune(
                copy.deepcopy(network),
                workspace.example[:1],
                target=self.target,
                importance=self.importance,
                channel_multiple=multiple,
                protected=self.protected,
                loss=self._loss(workspace, batches) if self.importance == "taylor" else None,
                batches=batches,
                seed=workspace.recipe.seed,
                keep_outputs=len(workspace.data.classes),
                depth=self.depth,
                strategy=self.strategy,
                timing=clock,
                tapped=self._taps(),
                reference=original if i else None,
                part=(i + 1) / self.rounds,
                progress=progress,
            ).model_dump(mode="json")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"key": workspace.key, "plan": plan}) + "\n")
        except OSError as error:
            what = f"cannot keep the plan: {error.strerror or error}"
            raise StageError(what, where=str(file), hint="is the disk full?") from error
        return plan

    def _healed(self, workspace: Workspace, network: nn.Module, i: int) -> dict[str, Any]:
        """Train the network, in place; what a killed run has healed already is read."""
        done = workspace.partial / self._part(i) / f"healed-{workspace.key}.safetensors"
        if i + 1 < self.rounds and ranks.from_first(done.exists):
            if ranks.first():
                load_state(network, done)  # the others get it when the next training begins
            return {}
        epochs = self.heal.epochs * (i + 1) // self.rounds - self.heal.epochs * i // self.rounds
        settings = self.heal.model_copy(update={"epochs": epochs})
        # Adapters are drawn alike, whether this process has pruned and healed before or found that done.
        torch.manual_seed(workspace.recipe.seed + i)
        learner = workspace.learner([Student(network, self.heal.objectives)], teaching(self.heal))
        metrics = workspace.train(learner, settings, part=self._part(i))[0].metrics
        if i + 1 < self.rounds and ranks.first():
            unfinished = done.with_suffix(".tmp")
            save_state(network, unfinished)
            unfinished.replace(done)
        return metrics

    def _part(self, i: int) -> str:
        return f"round-{i + 1}" if self.rounds > 1 else ""

    def _taps(self) -> list[str]:
        objectives = self.heal.objectives if self.heal.epochs else ["ce"]
        return Objectives(parse_objectives(objectives)).taps("student")

    def _loss(self, workspace: Workspace, drawn: Sequence[dict[str, Any]]) -> Any:
        """The healing objectives on a fixed set of training images, for first-order importance."""
        objectives = self.heal.objectives if self.heal.epochs else ["ce"]

        def loss(candidate: nn.Module) -> Tensor:
            live = teaching(self.heal)._replace(source=Component(use="frozen"))
            learner = workspace.learner([Student(candidate, objectives)], live)
            learner.eval()
            total: Tensor = sum((learner(batch)["loss"] for batch in drawn), torch.zeros(()))
            return total / len(drawn)

        return loss


def _spec(before: ModelSpec, original: nn.Module, network: nn.Module, plans: Iterable[PruningPlan]) -> ModelSpec:
    """What builds `network`, which the plans made of `original`, which `before` builds."""
    removed = [block.name for plan in plans for block in plan.blocks if block.removed]
    shallow = copy.deepcopy(original)
    without_blocks(shallow, removed)
    changes = changed_attributes(shallow, network)
    attributes = {
        path: {**before.attributes.get(path, {}), **changes.get(path, {})}
        for path in before.attributes.keys() | changes.keys()
        if not any(path == block or path.startswith(f"{block}.") for block in removed)
    }
    return before.model_copy(update={"attributes": attributes, "removed": [*before.removed, *removed]})


def _join(histories: Sequence[Path], target: Path) -> None:
    """The histories of all rounds as one, with epochs that go on."""
    lines: list[str] = []
    for history in histories:
        first = len(lines)
        records = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
        lines += [json.dumps({**record, "epoch": first + record["epoch"]}) for record in records]
    write_atomically(target, "".join(f"{line}\n" for line in lines))
