"""What `edgekd students` shows: a family's front on each profile, for images of a size or for a recipe's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..artifact import ModelSpec
from ..data import load
from ..errors import Problem, RecipeError, UsageError
from ..models import specify
from ..profile import Profile, load_profile
from ..recipe import Recipe
from ..registry import load_plugin
from .families import candidates
from .front import measured_family

__all__ = ["fronts"]

PRECISIONS = ("fp32", "int8")


def fronts(
    family: str,
    profiles: Sequence[str],
    *,
    size: list[int] | None = None,
    classes: int | None = None,
    recipe: Recipe | None = None,
    precisions: Sequence[str] = (),
    depths: Sequence[int] = (),
    widths: Sequence[float] = (),
    again: bool = False,
    emit: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """A versioned document with a front for each profile.

    A `recipe` gives what is not named: size and classes of its data, profiles, and its first teacher, which the
    speed-ups then refer to. Else the images are 3x32x32 in 10 classes and the profile is cpu-x86. Raises UsageError,
    RecipeError or StageError, those of all profiles and shapes before anything is measured.
    """
    teacher: ModelSpec | None = None
    if recipe is not None:
        for plugin in recipe.plugins:
            load_plugin(Path(plugin))
        data = load(recipe.data, recipe.seed)
        size, classes = size or data.size, classes or len(data.classes)
        teacher = _teacher(recipe, size, classes)
        profiles = profiles or recipe.profiles
    size, classes = size or [3, 32, 32], classes or 10
    loaded = [load_profile(name, "--profile") for name in profiles or ["cpu-x86"]]
    wanted = {profile.name: _precisions(profile, precisions) for profile in loaded}
    for profile in loaded:
        candidates(family, profile.channel_multiple, size, classes, depths, widths, "--family")
    found = []
    for profile in loaded:
        measure = partial(measured_family, family, profile, size, classes, precisions=wanted[profile.name])
        shapes: dict[str, Any] = {"depths": depths, "widths": widths, "teacher": teacher}
        found.append(measure(**shapes, again=again, progress=partial(_told, emit, f"{family} on {profile.name}")))
    return {"version": 1, "family": family, "fronts": found}


def _precisions(profile: Profile, asked: Sequence[str]) -> list[str]:
    has = [p for p in PRECISIONS if p in profile.precisions]
    wrong = [p for p in asked if p not in has]
    if wrong:
        what = f"{wrong[0]!r} is not measured on {profile.name}"
        raise UsageError(what, where="--precision", hint=f"there are: {', '.join(has)}")
    return [p for p in has if p in asked or not asked]


def _teacher(recipe: Recipe, size: list[int], classes: int) -> ModelSpec:
    model = recipe.teacher[0].get("model")
    table = {"use": model} if isinstance(model, str) else model
    if not isinstance(table, dict) or not isinstance(table.get("use"), str):
        raise RecipeError([Problem("teacher.model", "missing: this key is required", "see `edgekd check`")])
    args = {key: value for key, value in table.items() if key != "use"}
    return specify(table["use"], args, classes=classes, size=size, where="teacher.model")


def _told(emit: Callable[[dict[str, Any]], None] | None, what: str, done: int, total: int) -> None:
    if emit is not None:
        emit({"event": "bench", "profile": what, "done": done, "total": total})
