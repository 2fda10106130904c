"""A recipe's stages, validated, named and in a possible order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pydantic import ValidationError

from .artifact import Artifact
from .errors import EdgekdError, Problem, RecipeError
from .recipe import Recipe
from .registry import resolve, validation_problems

__all__ = ["collect", "drafts"]


def collect(problems: list[Problem], where: str, call: Callable[[], Any]) -> Any:
    """The call's result, or None with its errors added to `problems`."""
    try:
        return call()
    except EdgekdError as error:
        problems += [p if p.where else Problem(where, p.what, p.hint) for p in error.problems]
        return None


def drafts(recipe: Recipe, source: Artifact | None, problems: list[Problem]) -> Iterator[tuple[str, Any, str]]:
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
        config = collect(problems, where, partial(_config, use, args, where))
        if config is None:
            previous = None
            continue
        before = kinds.get(_stem(getattr(config, "after", None) or ""), previous)
        if before is not None and _ours(before) and before not in config.follows and not (use == before == "teacher"):
            allowed = ", ".join(config.follows) or "nothing: it comes first"
            problems.append(Problem(where, f"{use} cannot follow {before}", f"{use} may follow {allowed}"))
        previous = use
        name = use if use not in kinds else next(n for i in range(2, 1000) if (n := f"{use}-{i}") not in kinds)
        kinds[name] = use
        yield name, config, where


def _ours(kind: str) -> bool:
    """Whether edgekd ships this stage, and so knows what may come after it; of others their authors know."""
    stage, _ = resolve("stages", kind)
    return stage.__module__.startswith("edgekd.")


def _stem(name: str) -> str:
    """The stage of a student: `distill` of `distill.small`."""
    return name.partition(".")[0]


def _config(use: str, args: dict[str, Any], where: str) -> Any:
    component, _ = resolve("stages", use, where)
    try:
        return component.model_validate(args)  # type: ignore[attr-defined]
    except ValidationError as error:
        raise RecipeError(validation_problems(error, where, component)) from error  # type: ignore[arg-type]
