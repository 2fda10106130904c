"""What a search varies, checked by planning before anything is trained: values become recipes. No Optuna here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ..artifact import FORMAT, digest
from ..bench.compare import LOSSES
from ..data import Dataset
from ..drafts import collect
from ..errors import EdgekdError, Problem, RecipeError, UsageError, nearest
from ..pipeline import Plan, Step, plan
from ..recipe import Axis, Recipe, Search, assign, parse_recipe, parse_value
from ..registry import validation_problems

__all__ = ["Space", "planned_with", "prepare", "recipe_with"]

EXAMPLE = '[search] with fields = { "stage.distill.lr" = { low = 0.01, high = 0.5, log = true } }'


@dataclass(frozen=True)
class Space:
    """A checked search. `shared` is the last of the stages that no field changes; None where all are changed."""

    recipe: Recipe
    search: Search
    data: Dataset
    directory: Path
    stage: str
    group: str
    epochs: int
    shared: str | None
    metric: str
    direction: str
    watched: str
    key: str

    @property
    def trials(self) -> Path:
        """Where the trials of this search have their directories."""
        return self.directory / f"trials-{self.key[:8]}"

    def summary(self) -> dict[str, Any]:
        """What `edgekd check` tells of it."""
        trials, fields = self.search.trials, list(self.search.fields)
        place = {"stage": self.stage, "metric": self.metric, "directory": str(self.directory)}
        return {"trials": trials, "fields": fields, **place, "shared": self.shared}


def prepare(recipe: Recipe, directory: Path | None = None, fields: Sequence[str] = ()) -> Space:
    """Check a search: every end of a range and every choice is planned. Raises RecipeError with all problems at once.

    `fields` are `PATH=LOW..HIGH`, `PATH=LOW..HIGH:log` or `PATH=[CHOICE, ...]`; they come before those of the recipe.
    """
    search = _settings(recipe, fields)
    if not search.fields:
        raise UsageError("there are no fields to search", where="search.fields", hint=f"write {EXAMPLE}, or --field")
    bare = recipe.model_copy(update={"search": None})
    base = plan(bare, directory or Path("runs") / f"{recipe.name}-search")
    problems: list[Problem] = []
    if not len(base.data.validation):
        what = "there is no validation split to judge trials by"
        problems.append(Problem("search", what, "data.validation = 0.1"))
    step = collect(problems, "search.stage", partial(_judged, base, search.stage))
    metric = collect(problems, "search.metric", partial(_metric, base, search.metric))
    if step is None:
        raise RecipeError(problems)
    common = _upto(base, step.name)
    for path, axis in search.fields.items():
        plans = collect(problems, f"search.fields.{path}", partial(_probed, base, path, axis, step.name))
        for found in plans or []:
            same = (a.directory.name == b.directory.name for a, b in zip(common, found, strict=False))
            common = common[: next((i for i, equal in enumerate(same) if not equal), len(common))]
    if problems:
        raise RecipeError(problems)
    several = sum(s.work == step.work for s in base.steps) > 1
    student = step.name.removeprefix(f"{step.work}.")
    return Space(
        recipe=bare,
        search=search,
        data=base.data,
        directory=base.directory,
        stage=step.name,
        group=step.work,
        epochs=_epochs(step.stage),
        shared=common[-1].name if common else None,
        metric=metric,
        direction=_direction(base, metric),
        watched=f"val.{student}.{metric}" if several else f"val.{metric}",
        key=_key(base, step, search, metric, common),
    )


def planned_with(space: Space, values: Mapping[str, Any], directory: Path) -> Plan:
    """The plan of the recipe with these values, in a directory of its own. Raises RecipeError."""
    return _plan(space.recipe, space.data, values, directory)


def _settings(recipe: Recipe, fields: Sequence[str]) -> Search:
    table = recipe.search.model_dump(mode="json") if recipe.search is not None else {}
    added = dict(map(_field, fields))
    table["fields"] = {**table.get("fields", {}), **added}
    try:
        return Search.model_validate(table)
    except ValidationError as error:
        raise RecipeError(validation_problems(error, "search", Search)) from error


def _field(text: str) -> tuple[str, Any]:
    """`stage.distill.lr=0.01..0.5:log` -> its path and its axis as a table."""
    path, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not path or not value:
        hint = "for example --field stage.distill.lr=0.01..0.5:log, or 'stage.distill.ema=[0.9, 0.99]'"
        raise UsageError(f"--field wants PATH=LOW..HIGH or PATH=[CHOICES], got {text!r}", hint=hint)
    low, dots, high = value.partition("..")
    if not dots or value.startswith(("[", "{")):
        return path, parse_value(value)
    end, _, mark = high.partition(":")
    if mark not in ("", "log"):
        raise UsageError(f"--field {path}: unknown {mark!r} behind the range", hint="did you mean ':log'?")
    return path, {"low": parse_value(low), "high": parse_value(end), "log": mark == "log"}


def _judged(base: Plan, name: str | None) -> Step:
    """The step whose result is judged. Raises UsageError."""
    distilled = [s for s in base.steps if s.stage.kind == "distill"]
    if name is None:
        if not distilled:
            raise UsageError("the recipe has no stage distill to judge", hint="name another one: stage = 'prune'")
        return next(s for s in distilled if s.group == distilled[-1].group)
    group = [s for s in base.steps if s.group == name]
    step = group[0] if group else base.step(name)
    if step.stage.kind == "export":
        before = next((s.name for s in reversed(base.steps) if s.stage.kind != "export"), "")
        raise UsageError("an export is not judged on the validation split", hint=f"the stage before it: {before!r}")
    return step


def _metric(base: Plan, name: str | None) -> str:
    known = base.task.metrics(np.eye(2, len(base.data.classes), dtype=np.float32), np.zeros(2, np.int64))
    metric = name or base.task.headline
    if metric not in known:
        raise UsageError(f"no metric {metric!r} of the task {base.recipe.task.use!r}", hint=nearest(metric, known))
    return metric


def _direction(base: Plan, metric: str) -> str:
    if metric == base.task.headline:
        return base.task.direction
    return "min" if metric in LOSSES else "max"


def _epochs(stage: Any) -> int:
    trained = getattr(stage, "heal", stage)
    return int(getattr(trained, "epochs", 0))


def _values(axis: Axis) -> list[Any]:
    return list(axis.choices) if axis.choices is not None else [axis.low, axis.high]


def _plan(recipe: Recipe, data: Dataset, values: Mapping[str, Any], directory: Path) -> Plan:
    made = recipe_with(recipe, values)
    known = data if (made.data, made.seed) == (recipe.data, recipe.seed) else None
    return plan(made, directory, data=known)


def recipe_with(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values at their paths. Raises RecipeError."""
    table = _table(recipe)
    for path, value in values.items():
        assign(table, path, value)
    return parse_recipe(table)


def _table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its file says it: paths lead through the only teacher as they do there."""
    table = recipe.model_dump(mode="json", exclude_none=True)
    if len(table["teacher"]) == 1:
        table["teacher"] = table["teacher"][0]
    return table


def _probed(base: Plan, path: str, axis: Axis, stage: str) -> list[list[Step]]:
    """The steps up to `stage` at both ends, or with every choice. Raises RecipeError, of the first value that fails."""
    place = f"search.fields.{path}"
    found = []
    for value in _values(axis):
        try:
            found.append(_upto(_plan(base.recipe, base.data, {path: value}, base.directory), stage))
        except EdgekdError as error:
            first = error.problems[0]
            inner = f" ({first.where})" if first.where else ""
            raise RecipeError([Problem(place, f"{first.what}{inner}", first.hint)]) from error
    if len(found) > 1 and len({tuple(s.key for s in steps) for steps in found}) == 1:
        what = f"changes nothing up to the stage {stage!r}: every trial would be the same"
        named = path.split(".")[1] if path.startswith("stage.") else ""
        later = next((s.name for s in base.steps if s.group == named and s.stage.kind != "export"), None)
        raise RecipeError([Problem(place, what, f"search.stage = {later!r}" if later else "search another field")])
    return found


def _upto(planned: Plan, stage: str) -> list[Step]:
    return planned.steps[: planned.steps.index(planned.step(stage)) + 1]


def _key(base: Plan, step: Step, search: Search, metric: str, common: Sequence[Step]) -> str:
    """What trials must agree in to be compared. The values that the recipe has for the fields do not count."""
    table = _table(base.recipe)
    for path in search.fields:
        assign(table, path, None)
    groups = list(dict.fromkeys(s.group for s in base.steps))
    table["stage"] = table["stage"][: groups.index(step.group) + 1 - len(base.recipe.teacher)]
    return digest(
        {
            "format": FORMAT,
            "recipe": {key: table[key] for key in ("seed", "data", "task", "teacher", "stage")},
            "data": base.data.fingerprint,
            "shared": [s.key for s in common],
            "fields": dict(_described(search)),
            "judged": [step.name, metric],
        }
    )


def _described(search: Search) -> Iterator[tuple[str, Any]]:
    for path, axis in sorted(search.fields.items()):
        yield path, axis.model_dump(mode="json")
