"""The stage `fuse`: a short phase on labels, weights averaged over it, and the better of what there is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn

from .. import ranks
from ..artifact import Artifact, ModelSpec, write_atomically
from ..data import batches
from ..errors import Problem
from ..learner import Learner, Student
from ..profile import Profile
from ..recipe import Component, ComponentField, Training
from ..registry import register
from ..train import predict
from .teaching import Context, Names, Teaching, learner_problems, load_network
from .workspace import Workspace

__all__ = ["Fuse"]

State = dict[str, Tensor]
SNAPSHOT = "epoch-"


@register("stages", "fuse")
class Fuse(Training):
    """Train on labels for a while, average the weights of its epochs, keep the best on validation.

    Candidates are the network before, the last epoch's, and the average. `fusion.json` says which one it was, and how
    they compared.
    """

    kind: ClassVar[str] = "fuse"
    follows: ClassVar[tuple[str, ...]] = ("distill", "prune", "fuse")

    epochs: int = Field(5, gt=0)
    lr: float = Field(0.02, gt=0)
    schedule: Literal["one-cycle", "cosine", "constant"] = "constant"
    average: Literal["swa", "soup", "none"] = Field(
        "swa", description="swa: all epochs (Izmailov 2018); soup: greedily those that help (Wortsman 2022)"
    )
    objectives: list[Any] = Field(default=["ce"], min_length=1, description="as in distill")
    source: ComponentField = Field(Component(use="frozen"), description="as in distill")
    teacher: Names | None = Field(None, description="as in distill")
    after: str | None = Field(None, description="the stage to go on from; default: the one before")

    @property
    def teaching(self) -> Teaching:
        """What its training asks of teachers."""
        return Teaching(self.objectives, self.source, self.teacher)

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """There must be a validation split to choose by."""
        problems = []
        if not len(context.data.validation):
            what = "there is no validation split to choose by"
            problems.append(Problem(context.where, what, "data.validation = 0.1"))
        if self.ema is not None and self.average != "none":
            what = "averages the weights of its epochs, and those of ema are averages already"
            problems.append(Problem(f"{context.where}.ema", what, "leave out ema, or take average = 'none'"))
        if context.source is not None:
            one = [("student", context.source, self.objectives, f"{context.where}.objectives")]
            problems += learner_problems(one, self.teaching, self, context, context.where)
        return context.source, problems

    def inputs(self) -> dict[str, str]:
        """None beside data and parents."""
        return {}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Fuse:
        """Nothing is left open."""
        return self

    def run(self, workspace: Workspace) -> Artifact:
        """Train, average, compare, keep."""
        torch.manual_seed(workspace.recipe.seed)
        source = workspace.parents["source"]
        network = load_network(source)
        candidates = {"before": _copied(network)}
        learner = workspace.learner([Student(network, self.objectives)], self.teaching)

        def remember(epoch: int, learner: Learner) -> None:
            # Called at the beginning of an epoch, also where a run resumes inside it: then it is there already.
            file = _snapshot(workspace.partial, epoch - 1)
            if epoch == 0 and ranks.first():  # what a training left whose checkpoint was deleted
                for old in workspace.partial.glob(f"{SNAPSHOT}*"):
                    old.unlink()
            elif ranks.first() and not file.exists():
                workspace.partial.mkdir(parents=True, exist_ok=True)
                write_atomically(file, save(_copied(network)))

        last_kept = self.model_copy(update={"keep": "last"})
        [done] = workspace.train(learner, last_kept, remember)
        epochs = len(done.history)  # fewer than asked for where it stopped early
        candidates["last"] = _copied(network)
        return ranks.from_first(lambda: self._chosen(candidates, epochs, network, source.manifest.model, workspace))

    def _chosen(
        self, candidates: dict[str, State], epochs: int, network: nn.Module, spec: ModelSpec, workspace: Workspace
    ) -> Artifact:
        judge = _judge(network, workspace)
        if self.average != "none":
            earlier = [load(_snapshot(workspace.partial, e).read_bytes()) for e in range(epochs - 1)]
            states = [*earlier, candidates["last"]]
            mean = _mean(states) if self.average == "swa" else _soup(states, judge, workspace)
            candidates[self.average] = _settled(network, mean, workspace)
        found = {name: judge(state) for name, state in candidates.items()}
        headline, sign = workspace.task.headline, 1 if workspace.task.direction == "max" else -1
        kept = max(found, key=lambda name: sign * found[name][headline])
        network.load_state_dict(candidates[kept])
        workspace.emit({"event": "kept", "stage": workspace.name, "kept": kept, "of": found})
        document = {"kept": kept, "candidates": found}
        metrics = {**found[kept], "kept": kept}
        return workspace.save(network, spec, metrics=metrics, documents={"fusion.json": document})


def _snapshot(directory: Path, epoch: int) -> Path:
    return directory / f"{SNAPSHOT}{epoch:04d}.safetensors"


def _copied(network: nn.Module) -> State:
    return {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}


def _mean(states: Sequence[Mapping[str, Tensor]]) -> State:
    """The mean of floating-point tensors, the last of others."""
    mean = dict(states[-1])
    for name, value in mean.items():
        if value.is_floating_point():
            mean[name] = torch.stack([s[name].double() for s in states]).mean(dim=0).to(value)
    return mean


def _judge(network: nn.Module, workspace: Workspace) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
    data = workspace.data

    def judge(state: Mapping[str, Tensor]) -> dict[str, float]:
        network.load_state_dict(state)
        return workspace.task.metrics(predict(network, data.validation, data, 250), data.validation.labels.numpy())

    return judge


def _soup(states: Sequence[State], judge: Callable[[State], dict[str, float]], workspace: Workspace) -> State:
    """Greedy soup: from the best epoch on, each next one is stirred in where the mean does not get worse."""
    headline, sign = workspace.task.headline, 1 if workspace.task.direction == "max" else -1
    scores = [sign * judge(state)[headline] for state in states]
    order = sorted(range(len(states)), key=lambda i: -scores[i])
    taken, best = [states[order[0]]], scores[order[0]]
    for i in order[1:]:
        score = sign * judge(_mean([*taken, states[i]]))[headline]
        if score >= best:
            taken, best = [*taken, states[i]], score
    return _mean(taken)


@torch.no_grad()
def _settled(network: nn.Module, state: State, workspace: Workspace) -> State:
    """The state with batch-norm statistics of its own weights, from one pass over the training images."""
    network = copy.deepcopy(network)
    network.load_state_dict(state)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return state
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    network.train()
    data, batch = workspace.data, workspace.recipe.data.batch
    for b in batches(data.train, batch=batch, mean=data.mean, std=data.std, seed=workspace.recipe.seed, epoch=0,
                     drop_last=len(data.train) >= batch, channels_last=True):  # fmt: skip
        network(b["image"])
    return _copied(network)
