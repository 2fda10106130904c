"""Recipes on few real digits that the tests of distillation strategies share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import edgekd
from edgekd.artifact import Artifact
from edgekd.data.digits import digits
from edgekd.data.source import Source, Split
from edgekd.learner import Learner
from edgekd.pipeline import plan
from edgekd.recipe import parse_recipe
from edgekd.stages.teaching import load_network
from edgekd.teachers import Cached

RESNET = {"use": "cifar-resnet", "depth": 8}
SMALL = {"use": "cifar-resnet", "depth": 8, "width": 4}
MOBILE = {"use": "mobilenet", "width": 0.25}
KL = [{"use": "ce", "weight": 0.1}, {"use": "kl", "weight": 0.9, "tau": 2.0}]


def tiny_digits(
    every: int = 6, begin: int = 0, size: int = 16, names: list[str] | None = None, leaking: bool = False
) -> Source:
    """Every sixth digit [1, 16, 16], from number `begin` on; those of some classes only, where they are named.

    A `leaking` one trains on the images that others test on.
    """
    whole = digits(size, 1)

    def some(split: Split) -> Split:
        taken = split.take(torch.arange(begin, len(split), every))
        if names is None:
            return taken
        wanted = torch.tensor([whole.classes.index(name) for name in names])
        taken = taken.take(torch.isin(taken.labels, wanted).nonzero().flatten())
        return Split(taken.images, torch.bucketize(taken.labels, wanted))

    train, test = some(whole.train), some(whole.test)
    return Source(test if leaking else train, test, names or whole.classes)


def spelt_digits() -> Source:
    """The digits 0 and 1 by their English names."""
    few = tiny_digits(names=["0", "1"])
    return Source(few.train, few.test, ["zero", "one"])


def distill(**stage: Any) -> dict[str, Any]:
    """A stage with a small student and one epoch."""
    own = {} if "students" in stage else {"model": SMALL}
    return {"use": "distill", **own, "epochs": 1, "precision": "fp32", **stage}


def recipe(teacher: Any, *stages: Any, **more: Any) -> dict[str, Any]:
    """A recipe with these teachers and stages on few digits, and an export behind them (so that a run which stops
    before it measures nothing)."""
    data = {"use": "tiny-digits", "batch": 32, **more.pop("data", {})}
    return {
        "version": 1,
        "name": "tiny",
        "data": data,
        "teacher": teacher,
        "stage": [*stages, {"use": "export"}],
        **more,
    }


class Made(NamedTuple):
    """What a run left, by stage, and the events on the way."""

    artifacts: dict[str, Artifact]
    events: list[dict[str, Any]]

    def __getitem__(self, name: str) -> Artifact:
        return self.artifacts[name]

    def history(self, name: str = "distill") -> list[dict[str, Any]]:
        return [json.loads(line) for line in self[name].file("metrics.jsonl").read_text().splitlines()]


def run(table: Mapping[str, Any], directory: Path | str = "run") -> Made:
    """Run a recipe through edgekd up to its export, without measuring."""
    events: list[dict[str, Any]] = []
    planned = plan(parse_recipe(dict(table)), Path(directory))
    edgekd.run(dict(table), directory=directory, until=planned.steps[-2].name, emit=events.append)
    return Made({s.name: Artifact.open(s.directory) for s in planned.steps[:-1]}, events)


def answers(artifact: Artifact, images: Tensor) -> Tensor:
    """Logits of an artifact's network, in evaluation mode."""
    network = load_network(artifact).eval()
    with torch.no_grad():
        found = network(images)
    return found if isinstance(found, Tensor) else found["logits"]


def weights(artifact: Artifact) -> dict[str, Tensor]:
    """Its network's tensors."""
    return load_network(artifact).state_dict()


class Lesson(NamedTuple):
    """One batch in training: what the students said, and what the teacher source said to each."""

    batch: dict[str, Any]
    students: list[dict[str, Tensor]]
    teacher: list[dict[str, Tensor]]


@contextmanager
def lessons() -> Iterator[list[Lesson]]:
    """Everything that teacher sources of learners in training are asked."""
    found: list[Lesson] = []
    known: list[Learner] = []

    def listen(learner: Learner, batch: dict[str, Any]) -> None:
        if not any(learner is other for other in known) and learner.source is not None:
            known.append(learner)
            learner.source.register_forward_hook(lambda _, given, said: found.append(Lesson(*given, said)))

    with watched(listen):
        yield found


@contextmanager
def watched(look: Callable[[Learner, dict[str, Any]], None]) -> Iterator[None]:
    """`look(learner, batch)` is called before every forward of a learner that trains."""
    original = Learner.forward

    def forward(self: Learner, batch: dict[str, Any]) -> Any:
        if self.training:  # and not when a recipe is checked
            look(self, batch)
        return original(self, batch)

    Learner.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Learner.forward = original  # type: ignore[method-assign]


def wait_for_the_other(mine: str, other: str) -> None:
    """From now on caches are filled in this process only once another process is about to do so too."""
    fill = Cached.fill

    def both(*args: Any) -> None:
        Path(f"{mine}.there").touch()
        until = time.monotonic() + 60
        while not Path(f"{other}.there").exists() and time.monotonic() < until:
            time.sleep(0.001)
        fill(*args)

    Cached.fill = both  # type: ignore[method-assign]


def finite(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every figure of a training is a number."""
    return all(v == v and abs(v) != float("inf") for record in history for v in record.values())
