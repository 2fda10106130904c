"""A recipe becomes a plan of steps; running skips what is complete and resumes what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from .artifact import FORMAT, MANIFEST, Artifact, ModelSpec, digest, file_sha256, locked, write_atomically
from .data import Dataset, augmentations, load
from .errors import EdgekdError, Problem, RecipeError, UsageError, nearest
from .gate import OWN_METRICS, parse_rules
from .profile import Profile, load_profile
from .recipe import Component, Recipe, to_toml
from .registry import load_plugin, resolve, source_digest, validation_problems
from .stages import Context, Stage, Workspace
from .stages.distill import DEFAULT_OBJECTIVES
from .stages.workspace import Teaching
from .tasks import Task, make_task
from .tracking import missing_trackers

__all__ = ["Plan", "Step", "plan", "run_steps"]

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Step:
    """One stage of a plan. `parents` maps roles to the names of earlier steps or to artifacts from elsewhere."""

    name: str
    stage: Stage
    config: dict[str, Any]
    key: str
    directory: Path
    parents: dict[str, str | Artifact]
    spec: ModelSpec | None

    @property
    def done(self) -> bool:
        return (self.directory / MANIFEST).is_file()


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
        for step in self.steps:
            if step.name == name:
                return step
        raise UsageError(f"no stage {name!r} in this recipe", hint=nearest(name, [s.name for s in self.steps]))

    def artifact(self, name: str) -> Artifact:
        return Artifact.open(self.step(name).directory)


def plan(
    recipe: Recipe,
    directory: Path | None = None,
    *,
    source: Artifact | None = None,
    teacher: Artifact | None = None,
) -> Plan:
    """Resolve and check everything, and key every stage. Raises RecipeError with all problems at once.

    With `source` the recipe's stages continue from that artifact, healed by the `teacher` artifact.
    """
    problems: list[Problem] = []
    for plugin in recipe.plugins:
        _collect(problems, "plugins", partial(load_plugin, Path(plugin)))
    problems += missing_trackers(recipe.trackers)
    profiles = [
        p
        for i, name in enumerate(recipe.profiles)
        if (p := _collect(problems, "", partial(load_profile, name, f"profiles[{i}]")))
    ]
    task = _collect(problems, "task", lambda: make_task(recipe.task))
    _collect(problems, "data", lambda: augmentations(recipe.data))
    data = _collect(problems, "data", lambda: load(recipe.data, recipe.seed))
    drafts = list(_drafts(recipe, source, problems))
    if len(profiles) == len(recipe.profiles):
        problems += [*_profile_problems(profiles), *_rule_problems(recipe, profiles, data, task)]
    if data is None or task is None or len(profiles) < len(recipe.profiles):
        raise RecipeError(problems)
    for artifact in (source, teacher):
        problems += _misfits(artifact, data) if artifact is not None else []
    directory = directory or Path("runs") / recipe.name
    steps = _steps(drafts, recipe, data, profiles, directory, source, teacher, problems)
    if problems:
        raise RecipeError(problems)
    return Plan(recipe, data, task, profiles, directory, steps, alone=source is not None)


def _collect(problems: list[Problem], where: str, call: Callable[[], Any]) -> Any:
    """The call's result, or None with its errors added to `problems`."""
    try:
        return call()
    except EdgekdError as error:
        problems += [p if p.where else Problem(where, p.what, p.hint) for p in error.problems]
        return None


def _profile_problems(profiles: Sequence[Profile]) -> Iterator[Problem]:
    """What a profile names must exist before hours go into what is to run there."""
    names = [p.name for p in profiles]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield Problem("profiles", f"two profiles are called {name!r}", 'give one another name: name = "..."')
    for p in profiles:
        found: list[Problem] = []
        _collect(found, "", partial(resolve, "runtimes", p.runtime, f"profile {p.name}: runtime"))
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


def _drafts(recipe: Recipe, source: Artifact | None, problems: list[Problem]) -> Iterator[tuple[str, Any, str]]:
    """Validated stage configs with their names and places; order is checked here."""
    entries = (
        [] if source is not None else [("teacher", {k: v for k, v in recipe.teacher.items() if k != "use"}, "teacher")]
    )
    entries += [(entry.use, entry.args, f"stage[{i}]") for i, entry in enumerate(recipe.stage)]
    previous = source.manifest.kind if source is not None else None
    seen: dict[str, int] = {}
    for use, args, where in entries:
        config = _collect(problems, where, partial(_config, use, args, where))
        if config is None:
            previous = None
            continue
        if previous is not None and previous not in config.follows:
            allowed = ", ".join(config.follows) or "nothing: it comes first"
            problems.append(Problem(where, f"{use} cannot follow {previous}", f"{use} may follow {allowed}"))
        previous = use
        seen[use] = seen.get(use, 0) + 1
        yield (use if seen[use] == 1 else f"{use}-{seen[use]}"), config, where


def _config(use: str, args: dict[str, Any], where: str) -> Any:
    component, _ = resolve("stages", use, where)
    try:
        return component.model_validate(args)  # type: ignore[attr-defined]
    except ValidationError as error:
        raise RecipeError(validation_problems(error, where, component)) from error  # type: ignore[arg-type]


def _steps(
    drafts: Sequence[tuple[str, Any, str]],
    recipe: Recipe,
    data: Dataset,
    profiles: list[Profile],
    directory: Path,
    source: Artifact | None,
    teacher: Artifact | None,
    problems: list[Problem],
) -> list[Step]:
    steps: list[Step] = []
    spec = source.manifest.model if source is not None else None
    teacher_spec = teacher.manifest.model if teacher is not None else None
    distilled = Teaching(DEFAULT_OBJECTIVES, Component(use="frozen"))
    keys: dict[str, str] = {}
    for index, (name, draft, where) in enumerate(drafts):
        stage = draft.resolved(profiles, distilled)
        context = Context(recipe, data, profiles, None if draft.kind == "teacher" else teacher_spec, spec, where)
        spec, found = stage.check(context)
        if draft.kind != "teacher" and source is None and teacher_spec is None:
            # That the teacher is missing follows from what was said about it.
            found = [p for p in found if "need a teacher" not in p.what]
        problems += found
        if any(p.where.startswith(f"{where}.model") for p in found):
            spec = None  # a network that fails would fail again in every later stage
        if draft.kind == "teacher":
            teacher_spec = spec
        if draft.kind == "distill":
            distilled = Teaching(stage.objectives, stage.source)
        parents = _parents(stage, steps, source, teacher)
        config = {"use": draft.kind, **stage.model_dump(mode="json")}
        parent_keys = {r: keys[p] if isinstance(p, str) else p.key for r, p in parents.items()}
        key = _key(config, parent_keys, recipe, data, stage.inputs())
        keys[name] = key
        number = index if source is None else index + 1 + _position(source)
        steps.append(Step(name, stage, config, key, directory / f"{number:02d}-{name}-{key[:12]}", parents, spec))
    return steps


def _position(source: Artifact) -> int:
    """The number in front of an artifact's directory: its place in the run that made it."""
    number = source.path.name.partition("-")[0]
    return int(number) if number.isdigit() else 0


def _parents(
    stage: Any, steps: Sequence[Step], source: Artifact | None, teacher: Artifact | None
) -> dict[str, str | Artifact]:
    before: str | Artifact | None = steps[-1].name if steps else source
    taught: str | Artifact | None = steps[0].name if steps and source is None else teacher
    parents: dict[str, str | Artifact] = {}
    fresh = stage.kind == "distill" and stage.model is not None
    if before is not None and not fresh:
        parents["source"] = before
    if taught is not None and stage.kind in ("distill", "prune", "quantize"):
        parents["teacher"] = taught
    return parents


def _key(config: dict[str, Any], parents: dict[str, str], recipe: Recipe, data: Dataset, inputs: dict[str, str]) -> str:
    def without_cadence(value: Any) -> Any:  # how often a checkpoint is written changes no result
        if isinstance(value, dict):
            return {k: without_cadence(v) for k, v in value.items() if k != "checkpoint_s"}
        return value

    return digest(
        {
            "format": FORMAT,
            "config": without_cadence(config),
            "parents": parents,
            "data": data.fingerprint,
            "batches": recipe.data.model_dump(mode="json", include={"batch", "augment"}),
            "normalize": [data.mean, data.std],
            "task": recipe.task.model_dump(mode="json"),
            "seed": recipe.seed,
            "inputs": inputs,
            "plugins": [file_sha256(Path(plugin)) for plugin in recipe.plugins if Path(plugin).is_file()],
            "sources": sorted(_sources([config, recipe.task.model_dump(), recipe.data.model_dump()])),
        }
    )


def _sources(value: Any) -> Iterator[str]:
    """sha256 of the module behind every `use = "package.module:function"`."""
    if isinstance(value, dict):
        use = value.get("use")
        found = source_digest(use) if isinstance(use, str) else None
        if found is not None:
            yield found
        for inner in value.values():
            yield from _sources(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _sources(inner)


def run_steps(
    plan: Plan, emit: Emit, *, start: str | None = None, until: str | None = None, force: bool = False
) -> list[Artifact]:
    """Run the steps that are not complete, one after the other; the run directory is locked meanwhile.

    `start` and `force` do steps again that are complete. Raises StageError when another run holds the directory.
    """
    names = [step.name for step in plan.steps]
    again = set(names[names.index(plan.step(start).name) :]) if start else set(names) if force else set()
    last = names.index(plan.step(until).name) if until else len(names) - 1
    if start and names.index(start) > last:
        raise UsageError(f"--from {start} comes after --until {until}", hint=f"the order is: {', '.join(names)}")
    made: dict[str, Artifact] = {}
    with locked(plan.directory):
        if not (plan.alone and (plan.directory / "recipe.toml").exists()):
            write_atomically(plan.directory / "recipe.toml", to_toml(plan.recipe))
        for index, step in enumerate(plan.steps[: last + 1]):
            place = {"index": index, "stages": last + 1, "path": str(step.directory)}
            emit({"event": "stage", "stage": step.name, **place, "done": step.done})
            if step.done and step.name not in again:
                made[step.name] = Artifact.open(step.directory)
                continue
            parents = {r: made[p] if isinstance(p, str) else p for r, p in step.parents.items()}
            workspace = Workspace(
                recipe=plan.recipe,
                data=plan.data,
                task=plan.task,
                profiles=plan.profiles,
                name=step.name,
                key=step.key,
                destination=step.directory,
                parents=parents,
                config=step.config,
                emit=emit,
            )
            if step.name in again:
                shutil.rmtree(workspace.partial, ignore_errors=True)
            made[step.name] = step.stage.run(workspace)
            emit({"event": "made", "stage": step.name, "path": str(step.directory)})
    return list(made.values())


def summarise(plan: Plan) -> list[dict[str, Any]]:
    """The plan as rows: name, key, directory, whether it is complete."""
    return [
        {
            "stage": s.name,
            "key": s.key,
            "directory": str(s.directory),
            "done": s.done,
            "config": json.loads(json.dumps(s.config)),
        }
        for s in plan.steps
    ]
