"""A recipe becomes a plan of steps; running skips what is complete and resumes what is not."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import ranks
from .artifact import Artifact, locked, write_atomically
from .data import Dataset, augmentations, forget_streams, load
from .drafts import collect, drafts
from .errors import Problem, RecipeError, StageError, UsageError, nearest
from .gate import OWN_METRICS, parse_rules
from .profile import Profile, load_profile
from .recipe import Recipe, to_toml
from .registry import load_plugin, resolve
from .stages import Workspace
from .steps import Step, steps
from .tasks import Task, make_task
from .tracking import missing_trackers

__all__ = ["Plan", "Step", "plan", "run_steps", "summarise", "teacher_caches"]

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """All that a run will do, checked before anything is done."""

    recipe: Recipe
    data: Dataset
    task: Task
    profiles: list[Profile]
    directory: Path
    steps: list[Step]
    alone: bool = False  # goes on from an artifact: the run it may lie in keeps its recipe

    def step(self, name: str) -> Step:
        """Raises UsageError when there is no such step."""
        return next((step for step in self.steps if step.name == name), None) or self.called(name)[0]

    def called(self, name: str) -> list[Step]:
        """A step by its name, or all steps of a stage (a fleet, a fork) by that. Raises UsageError."""
        found = [s for s in self.steps if s.name == name] or [s for s in self.steps if s.group == name]
        if not found:
            known = dict.fromkeys(n for s in self.steps for n in (s.group, s.name))
            raise UsageError(f"no stage {name!r} in this recipe", hint=nearest(name, list(known)))
        return found

    def artifact(self, name: str) -> Artifact:
        return Artifact.open(self.step(name).directory)


def plan(
    recipe: Recipe,
    directory: Path | None = None,
    *,
    source: Artifact | None = None,
    teacher: Artifact | None = None,
    data: Dataset | None = None,
    emit: Emit | None = None,
) -> Plan:
    """Resolve and check everything, and key every stage. Raises RecipeError with all problems at once.

    With `source` the recipe's stages continue from that artifact, healed by the `teacher` artifact. `data` is what
    the recipe names, where it is loaded already; `emit` is told of students being measured (`model.use = "auto"`).
    """
    if data is None:
        forget_streams()  # what stages add to it: files may have changed since another plan of this process
    problems: list[Problem] = []
    for plugin in recipe.plugins:
        collect(problems, "plugins", partial(load_plugin, Path(plugin)))
    problems += missing_trackers(recipe.trackers)
    profiles = [
        p
        for i, name in enumerate(recipe.profiles)
        if (p := collect(problems, "", partial(load_profile, name, f"profiles[{i}]")))
    ]
    task = collect(problems, "task", lambda: make_task(recipe.task))
    collect(problems, "data", lambda: augmentations(recipe.data))
    data = data or collect(problems, "data", lambda: load(recipe.data, recipe.seed))
    drafted = list(drafts(recipe, source, problems))
    if len(profiles) == len(recipe.profiles):
        problems += [*_profile_problems(profiles), *_rule_problems(recipe, profiles, data, task)]
    if data is None or task is None or len(profiles) < len(recipe.profiles):
        raise RecipeError(problems)
    for artifact in (source, teacher):
        problems += _misfits(artifact, data) if artifact is not None else []
    directory = directory or Path("runs") / recipe.name
    made = steps(drafted, recipe, data, profiles, directory, source, teacher, problems, emit)
    if problems:
        raise RecipeError(problems)
    return Plan(recipe, data, task, profiles, directory, made, alone=source is not None)


def _profile_problems(profiles: Sequence[Profile]) -> Iterator[Problem]:
    """What a profile names must exist before hours go into what is to run there."""
    names = [p.name for p in profiles]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield Problem("profiles", f"two profiles are called {name!r}", 'give one another name: name = "..."')
    for p in profiles:
        found: list[Problem] = []
        collect(found, "", partial(resolve, "runtimes", p.runtime, f"profile {p.name}: runtime"))
        yield from found
        yield from parse_rules(p.budgets, [p.name], f"profile {p.name}: budgets")[1]


def _rule_problems(
    recipe: Recipe, profiles: Sequence[Profile], data: Dataset | None, task: Task | None
) -> Iterator[Problem]:
    """What is wrong with the gate, rules on metrics that this task does not have included."""
    rules, problems = parse_rules(recipe.gate, [p.name for p in profiles])
    yield from problems
    if data is None or task is None:
        return
    known = task.metrics(np.eye(2, len(data.classes), dtype=np.float32), np.zeros(2, np.int64))
    for metric in dict.fromkeys(r.metric for r in rules):
        if not metric.startswith("latency.") and metric not in {*OWN_METRICS, *known, "accuracy"}:
            hint = nearest(metric, [*known, *OWN_METRICS, "latency"])
            yield Problem(f"gate.{metric}", f"no metric of the task {recipe.task.use!r}", hint)


def _misfits(artifact: Artifact, data: Dataset) -> Iterator[Problem]:
    """An artifact from elsewhere must have seen data of this kind."""
    where, manifest = str(artifact.path), artifact.manifest
    if manifest.preprocessing.size != data.size:
        sizes = ("x".join(map(str, s)) for s in (manifest.preprocessing.size, data.size))
        yield Problem(where, "made for images of {}, the data have {}".format(*sizes), "give the data it was made with")
    if manifest.classes != data.classes:
        what = f"made for {len(manifest.classes)} classes ({', '.join(manifest.classes[:3])}, ...), the data have "
        what += f"{len(data.classes)} ({', '.join(data.classes[:3])}, ...)"
        yield Problem(where, what, "the same classes in the same order are needed")


def run_steps(
    plan: Plan, emit: Emit, *, start: str | None = None, until: str | None = None, force: bool = False
) -> list[Artifact]:
    """Run the steps that are not complete, one after the other; the run directory is locked meanwhile.

    `start` and `until` may name a stage of several steps; `start` and `force` do again what is complete.
    Raises StageError when another run holds the directory.

    With several processes (`edgekd.ranks`) all of them train; the first one holds the directory and writes.
    """
    names = [step.name for step in plan.steps]
    first_again = names.index(plan.called(start)[0].name) if start else 0
    again = set(names[first_again:]) if start or force else set()
    last = names.index(plan.called(until)[-1].name) if until else len(names) - 1
    if first_again > last:
        raise UsageError(f"--from {start} comes after --until {until}", hint=f"the order is: {', '.join(names)}")
    made: dict[str, Artifact] = {}
    if not ranks.first():
        emit = _quiet
    with locked(plan.directory) if ranks.first() else contextlib.nullcontext():
        _same_plan(plan)
        if ranks.first() and not (plan.alone and (plan.directory / "recipe.toml").exists()):
            write_atomically(plan.directory / "recipe.toml", to_toml(plan.recipe))
        for step in plan.steps:
            if step.choice is not None:
                chosen = {"model": step.choice.model, "text": step.choice.text}
                emit({"event": "student", "stage": step.name, **chosen})
        for index, step in enumerate(plan.steps[: last + 1]):
            place = {"index": index, "stages": last + 1, "path": str(step.directory)}
            done = ranks.from_first(partial(getattr, step, "done"))
            emit({"event": "stage", "stage": step.name, **place, "done": done})
            if done and step.name not in again:
                made[step.name] = _opened(step)
                continue
            parents = {r: made[p] if isinstance(p, str) else p for r, p in step.parents.items()}
            group = [s for s in plan.steps if s.work == step.work]
            first, *others = [_workspace(plan, s, parents, emit) for s in group]
            if step.name in again and ranks.first():
                shutil.rmtree(first.partial, ignore_errors=True)
            run = partial(step.stage.run, replace(first, siblings=others))
            if _trains(step):
                run()
            else:
                ranks.from_first(run)
            again -= {s.name for s in group}
            made[step.name] = _opened(step)
            emit({"event": "made", "stage": step.name, "path": str(step.directory)})
    return list(made.values())


def _quiet(event: dict[str, Any]) -> None:
    """The first process tells what happens."""


def _same_plan(plan: Plan) -> None:
    keys = [step.key for step in plan.steps]
    if ranks.from_first(lambda: keys) != keys:
        what = f"process {ranks.rank()} has planned other stages than the first one"
        raise UsageError(what, hint="every machine needs the same recipe, data, plugins and version of edgekd")


def _trains(step: Step) -> bool:
    """Whether a stage takes all processes; what edgekd does not know may train."""
    stage: Any = step.stage
    if stage.kind in ("export", "average"):
        return False
    return bool(getattr(getattr(stage, "heal", stage), "epochs", 1))


def _opened(step: Step) -> Artifact:
    """What the first process has written; a network file system may show it to others with delay."""
    until = time.monotonic() + (0 if ranks.first() else 60)
    while not step.done and time.monotonic() < until:
        time.sleep(0.5)
    if not step.done and not ranks.first():
        what = f"process {ranks.rank()} does not see what the first one wrote"
        hint = "-o DIR on a file system that all machines share"
        raise StageError(what, where=str(step.directory), hint=hint)
    return Artifact.open(step.directory)


def _workspace(plan: Plan, step: Step, parents: dict[str, Artifact], emit: Emit) -> Workspace:
    return Workspace(
        recipe=plan.recipe,
        data=plan.data,
        task=plan.task,
        profiles=step.profiles,
        name=step.work,
        key=step.key,
        destination=step.directory,
        parents=parents,
        config=step.config,
        emit=emit,
    )


def summarise(plan: Plan) -> list[dict[str, Any]]:
    """The plan as rows: name, key, directory, whether it is complete."""
    return [
        {
            "stage": s.name,
            "key": s.key,
            "directory": str(s.directory),
            "done": s.done,
            "config": json.loads(json.dumps(s.config)),
            "student": s.choice and s.choice.model_dump(mode="json"),
        }
        for s in plan.steps
    ]


def teacher_caches(plan: Plan) -> list[dict[str, Any]]:
    """What stages still to do want of teachers' answers on disk, each cache once, with its size in bytes."""
    found: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        cache = step.cache
        if cache is None or step.done:
            continue
        row = found.setdefault(str(cache.directory), {"directory": str(cache.directory), "bytes": 0})
        if cache.bytes >= row["bytes"]:  # stages that share one may want more of it
            row |= {"bytes": cache.bytes, "missing_bytes": cache.missing}
        row.setdefault("stages", []).append(step.name)
    return list(found.values())
