"""One stage on its own: from a run, an artifact, or a network and weights of the user's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import ranks
from .artifact import MANIFEST, Artifact, writing
from .errors import UsageError
from .pipeline import Plan, plan, run_steps
from .recipe import Component, Recipe, apply_override, parse_recipe
from .runs import Source, find_source

__all__ = ["recipe_beside", "run_single"]

#: What a stage can go on from: a quantized network can only be exported.
KINDS = {
    "distill": ("teacher",),
    "prune": ("teacher", "distill", "prune", "fuse"),
    "quantize": ("teacher", "distill", "prune", "fuse", "average"),
    "export": ("teacher", "distill", "prune", "fuse", "average", "quantize"),
}


@ranks.together()
def run_single(
    stage: str,
    source: str | None,
    model: str | None,
    weights: Path | None,
    data: str | None,
    overrides: Sequence[str],
    out: Path | None,
    emit: Callable[[dict[str, Any]], None],
) -> list[Artifact]:
    """Run one stage and return its artifact: one, or one per quantization scheme.

    The recipe's code does the work: a network with weights becomes a run of two stages in `out` (default:
    `runs/NAME-STAGE`); an artifact gets its new sibling in its own run, or in `out` with a copy of the teacher, so
    that the next step can go on from there. Overrides are the stage's own keys, or `data.*`, `profiles` and `seed` of
    the recipe; `teacher.*` with `model`.
    Raises UsageError, RecipeError or StageError.
    """
    if (source is None) == (model is None):
        raise UsageError("give a SOURCE, or --model with --weights", hint=f"edgekd {stage} --help shows an example")
    args: dict[str, Any] = {}
    general = [o for o in overrides if o.startswith(("data.", "teacher.", "profiles=", "seed="))]
    for override in overrides:
        if override not in general:
            apply_override(args, override)
    if model is not None:
        recipe = _recipe_for(model, weights, data, stage, args, general)
        planned = plan(recipe, out or Path("runs") / recipe.name)
        return _made(planned, emit)
    assert source is not None
    found = find_source(source, KINDS[stage])
    recipe = recipe_beside(found, source, data, general)
    directory = out or found.artifact.path.parent
    teacher = found.artifact if stage == "distill" else found.teacher
    update: dict[str, Any] = {"stage": [Component.model_validate({"use": stage, **args})]}
    if any(o.startswith("profiles=") for o in general):
        update["gate"] = {}  # its rules may be of profiles that are not meant here, and a stage alone is not judged
    single = recipe.model_copy(update=update)
    planned = plan(single, directory, source=found.artifact, teacher=teacher)
    if teacher is not None and teacher.path.parent != directory:
        ranks.from_first(lambda: _bring(teacher, directory))
    return _made(planned, emit)


def _made(planned: Plan, emit: Callable[[dict[str, Any]], None]) -> list[Artifact]:
    """The artifacts of a plan's last stage."""
    made = run_steps(planned, emit)
    last = planned.steps[-1].group
    return [artifact for step, artifact in zip(planned.steps, made, strict=True) if step.group == last]


def _bring(teacher: Artifact, directory: Path) -> None:
    """Copy the teacher's artifact, atomically."""
    destination = directory / teacher.path.name
    if not (destination / MANIFEST).is_file():
        with writing(destination) as temporary:
            shutil.copytree(teacher.path, temporary, dirs_exist_ok=True)


def _recipe_for(
    model: str, weights: Path | None, data: str | None, stage: str, args: dict[str, Any], general: Sequence[str]
) -> Recipe:
    if weights is None:
        raise UsageError("--model needs --weights", hint="an untrained network is not worth compressing")
    if data is None:
        raise UsageError("--model needs --data", hint="for example --data digits, or --data package.module:function")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{model}-{stage}").lstrip(".-")
    table = {
        "version": 1,
        "name": name,
        "data": {"use": data},
        "teacher": {"model": {"use": model}, "weights": str(weights)},
        "stage": [{"use": stage, **args}],
    }
    return parse_recipe(table, general)


def recipe_beside(found: Source, text: str, data: str | None, general: Sequence[str]) -> Recipe:
    """The recipe of a source's run, with other `data` and overrides where given; one made up for a lone artifact.

    `text` is how the source was named. Raises UsageError where nothing names the data.
    """
    if found.recipe is None and data is None:
        raise UsageError("no recipe beside this artifact names its data", where=text, hint="give --data NAME")
    if found.recipe is not None:
        table = found.recipe.model_dump(mode="json", exclude_none=True)
    else:
        model = found.artifact.manifest.model
        table = {"version": 1, "name": found.name, "teacher": {"model": {"use": model.use, **model.args}}}
    if data is not None:
        # The network was trained on inputs that were normalised so, whatever the other data's own figures are.
        used = found.artifact.manifest.preprocessing
        table["data"] = {"use": data, "normalize": {"mean": used.mean, "std": used.std}}
    return parse_recipe(table, general)
