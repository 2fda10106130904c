"""A recipe becomes a plan of steps; running skips what is complete and resumes what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from .stages import Context, Expert, Stage, Teaching, Workspace
from .stages.distill import DEFAULT_OBJECTIVES
from .stages.teaching import expert_of
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
    group: str = ""  # stages of one group (the students of a fleet) are run together

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
    entries = []
    if source is None:
        several = len(recipe.teacher) > 1
        for i, teacher in enumerate(recipe.teacher):
            place = f"teacher[{i}]" if several else "teacher"
            entries.append(("teacher", {k: v for k, v in teacher.items() if k != "use"}, place))
    entries += [(entry.use, entry.args, f"stage[{i}]") for i, entry in enumerate(recipe.stage)]
    previous = source.manifest.kind if source is not None else None
    kinds: dict[str, str] = {}
    for use, args, where in entries:
        config = _collect(problems, where, partial(_config, use, args, where))
        if config is None:
            previous = None
            continue
        before = kinds.get(_stem(getattr(config, "after", None) or ""), previous)
        if before is not None and before not in config.follows and not (use == before == "teacher"):
            allowed = ", ".join(config.follows) or "nothing: it comes first"
            problems.append(Problem(where, f"{use} cannot follow {before}", f"{use} may follow {allowed}"))
        previous = use
        name = use if use not in kinds else next(n for i in range(2, 1000) if (n := f"{use}-{i}") not in kinds)
        kinds[name] = use
        yield name, config, where


def _stem(name: str) -> str:
    """The stage of a student: `distill` of `distill.small`."""
    return name.partition(".")[0]


def _config(use: str, args: dict[str, Any], where: str) -> Any:
    component, _ = resolve("stages", use, where)
    try:
        return component.model_validate(args)  # type: ignore[attr-defined]
    except ValidationError as error:
        raise RecipeError(validation_problems(error, where, component)) from error  # type: ignore[arg-type]


class _Building:
    """The steps so far, and what later ones may refer to."""

    def __init__(self, source: Artifact | None, teacher: Artifact | None) -> None:
        self.steps: list[Step] = []
        self.source, self.teacher = source, teacher
        self.specs: dict[str, ModelSpec | None] = {}
        self.experts: dict[str, Expert] = {}
        self.keys: dict[str, str] = {}
        self.fleet: list[str] = []  # the students of the last distillation
        self.last: str | None = None

    def artifact(self, name: str) -> Artifact | None:
        """An artifact from elsewhere: a directory, or what this plan goes on from."""
        return Artifact.open(name) if (Path(name) / MANIFEST).is_file() else None

    def find(self, name: str, where: str) -> str | Artifact:
        """What a recipe names: an earlier stage, or an artifact's directory. Raises UsageError."""
        if name in self.specs:
            return name
        found = self.artifact(name)
        if found is None:
            known = list(self.specs)
            hint = nearest(name, known) or f"there are: {', '.join(known)}"
            raise UsageError(f"no earlier stage and no artifact {name!r}", where=where, hint=hint)
        return found

    def teachers(self, stage: Any, where: str) -> dict[str, str | Artifact]:
        """Who teaches a stage, by role."""
        if stage.kind in ("teacher", "export", "average"):
            return {}
        asked = stage.heal if hasattr(stage, "heal") else stage
        place = f"{where}.heal.teacher" if hasattr(stage, "heal") else f"{where}.teacher"
        if asked.teacher:
            found: list[str | Artifact] = [self.find(name, place) for name in asked.teacher]
        elif self.source is not None:
            found = [self.teacher] if self.teacher is not None else []
        else:
            found = [name for name, step in self.specs.items() if _is_teacher(name)]
        return {"teacher" if i == 0 else f"teacher.{i + 1}": one for i, one in enumerate(found)}

    def expert(self, found: str | Artifact) -> Expert | None:
        """A teacher as far as it is known; None for a stage that failed its check."""
        return self.experts.get(found) if isinstance(found, str) else expert_of(found)

    def spec(self, found: str | Artifact | None) -> ModelSpec | None:
        return self.specs.get(found) if isinstance(found, str) else found.manifest.model if found is not None else None

    def key(self, found: str | Artifact) -> str:
        return self.keys[found] if isinstance(found, str) else found.key


def _is_teacher(name: str) -> bool:
    return name == "teacher" or (name.startswith("teacher-") and name.removeprefix("teacher-").isdigit())


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
    made = _Building(source, teacher)
    distilled = Teaching(DEFAULT_OBJECTIVES, Component(use="frozen"))
    first = 0 if source is None else 1 + _position(source)
    for name, draft, where in drafts:
        stage = draft.resolved(profiles, distilled)
        parents = _collect(problems, where, partial(_parents, stage, made, where)) or {}
        if stage.kind == "average" and not stage.members:
            stage = stage.model_copy(update={"members": list(made.fleet)})
            parents = _collect(problems, where, partial(_parents, stage, made, where)) or {}
        taught = [r for r in parents if r.startswith("teacher")]
        experts = [made.expert(parents[r]) for r in taught]
        starts = {r.removeprefix("start."): made.spec(p) for r, p in parents.items() if r.startswith("start.")}
        known = {n: s for n, s in starts.items() if s is not None}
        missing = len(known) < len(starts) or None in experts or (stage.kind == "distill" and not _named(stage, known))
        spec, found, specs = None, [], []
        context = Context(
            recipe, data, profiles, [e for e in experts if e], made.spec(parents.get("source")), where, known
        )
        if not missing:
            spec, found = stage.check(context)
            specs = stage.specs(context) if stage.kind == "distill" and stage.students and spec and not found else [spec]
        if stage.kind != "teacher" and source is None and not context.teachers:
            # That the teacher is missing follows from what was said about it.
            found = [p for p in found if "need a teacher" not in p.what]
        problems += found
        if any(p.where.startswith((f"{where}.model", f"{where}.students")) for p in found):
            specs = [None]  # a network that fails would fail again in every later stage
        if stage.kind == "distill":
            distilled = stage.carried
        names = [f"{name}.{student}" for student in stage.names] if stage.kind == "distill" and stage.students else [name]
        for i, one in enumerate(names):
            config = {"use": stage.kind, **stage.model_dump(mode="json"), **({"student": i} if len(names) > 1 else {})}
            parent_keys = {r: made.key(p) for r, p in parents.items()}
            key = _key(config, parent_keys, recipe, data, stage.inputs())
            made.keys[one] = key
            own = specs[i] if i < len(specs) else None
            made.specs[one] = own
            if own is not None and stage.kind not in ("quantize", "export"):
                apart = stage.kind != "teacher" or stage.weights is None or stage.held_out
                classes = getattr(stage, "classes", None) or data.classes
                # Its accuracy is not known before it is there; any figure does for a check.
                made.experts[one] = Expert(own, key, classes, 0.5 if apart else None)
            path = directory / f"{first + len(made.steps):02d}-{one}-{key[:12]}"
            made.steps.append(Step(one, stage, config, key, path, parents, own, group=name))
        made.last = names[0]
        if stage.kind == "distill":
            made.fleet = names
    return made.steps


def _named(stage: Any, known: Sequence[str] | dict[str, Any]) -> bool:
    """Whether all stages that students start from are known."""
    return all(s.start is None or s.start in known for s in stage.students)


def _position(source: Artifact) -> int:
    """The number in front of an artifact's directory: its place in the run that made it."""
    number = source.path.name.partition("-")[0]
    return int(number) if number.isdigit() else 0


def _parents(stage: Any, made: _Building, where: str) -> dict[str, str | Artifact]:
    """What a stage builds on, by role: `source`, `teacher`, `teacher.2`, ..., `start.NAME`. Raises UsageError."""
    parents: dict[str, str | Artifact] = {}
    if stage.kind == "teacher":
        return parents
    before: str | Artifact | None = made.last or made.source
    if getattr(stage, "after", None):
        before = made.find(stage.after, f"{where}.after")
    if before is not None and stage.kind != "average" and not getattr(stage, "fresh", False):
        parents["source"] = before
    parents |= made.teachers(stage, where)
    if stage.kind == "average":
        starts = [(name, f"{where}.members") for name in stage.members]
    else:
        students = getattr(stage, "students", [])
        starts = [(s.start, f"{where}.students[{i}].start") for i, s in enumerate(students) if s.start]
    for name, place in starts:
        parents[f"start.{name}"] = made.find(name, place)
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
            group = [s for s in plan.steps if s.group == step.group]
            first, *others = [_workspace(plan, s, parents, emit) for s in group]
            if step.name in again:
                shutil.rmtree(first.partial, ignore_errors=True)
            step.stage.run(replace(first, siblings=others))
            again -= {s.name for s in group}
            made[step.name] = Artifact.open(step.directory)
            emit({"event": "made", "stage": step.name, "path": str(step.directory)})
    return list(made.values())


def _workspace(plan: Plan, step: Step, parents: dict[str, Artifact], emit: Emit) -> Workspace:
    return Workspace(
        recipe=plan.recipe,
        data=plan.data,
        task=plan.task,
        profiles=plan.profiles,
        name=step.group,
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
        }
        for s in plan.steps
    ]
