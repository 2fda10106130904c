"""Try out what a recipe leaves open: `edgekd search`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ranks
from ..errors import StageError, UsageError
from ..recipe import Recipe, load_recipe
from ..report.trial_plots import short_names
from .space import Space, prepare

if TYPE_CHECKING:
    import optuna

    from .study import Claimed

__all__ = ["Space", "prepare", "search"]

Emit = Callable[[dict[str, Any]], None]
POLL_S = 0.5


def _quiet(event: dict[str, Any]) -> None:
    """Events of a search that nobody watches."""


def search(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    fields: Sequence[str] = (),
    directory: str | Path | None = None,
    storage: str | None = None,
    emit: Emit = _quiet,
    command: str = "edgekd.search",
) -> dict[str, Any]:
    """Run trials until there are as many as the recipe says, pruned ones included; the content of `trials.json`.

    Calling it again goes on where it was stopped; several processes may call it at once. Leaves `best.toml`,
    `trials.json` and `search.html` in the directory. Raises RecipeError and UsageError (nothing was trained), or
    StageError.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    try:
        from . import results, study, trial
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("optuna", "sqlalchemy", "alembic"):
            raise
        raise UsageError(f"search needs {error.name}", where="search", hint="pip install 'edgekd[search]'") from error
    if ranks.launched() > 1:
        hint = "start `edgekd search` several times instead: each is a worker of the same search"
        raise UsageError("a search does not run as one of several processes", where="search", hint=hint)
    space = prepare(recipe, Path(directory) if directory else None, fields)
    shared = False
    with study.quiet():
        found = study.open_study(space, storage)
        while (claimed := _next(space, found, emit)) is not None:
            with claimed.lock, study.beating(claimed.trial):
                if not shared:
                    trial.share(space, emit)
                    shared = True
                emit(_begun(space, claimed))
                trial.work(space, found, claimed, emit, command)
            emit({"event": "tried", **results.ended(results.write(space, found), claimed.trial.number)})
        document = results.write(space, found)
    if document["best"] is None:
        said = next((t["error"] for t in document["trials"] if t["error"]), "all were pruned")
        hint = f"see {space.directory / 'trials.json'}; other ranges may do better"
        raise StageError(f"no trial came to its end: {said}", where="search", hint=hint)
    return document


def _next(space: Space, found: optuna.Study, emit: Emit) -> Claimed | None:
    """The next trial to work at; None when all have ended, those of other workers too, who may leave one."""
    from . import study

    told = False
    while (claimed := study.claim(space, found)) is None and (others := study.busy(found)):
        if not told:
            emit({"event": "waiting", "for": f"other workers, who are at {others} trial{'s' if others > 1 else ''}"})
        told = True
        time.sleep(POLL_S)
    return claimed


def _begun(space: Space, claimed: Claimed) -> dict[str, Any]:
    short = short_names(list(space.search.fields))
    values = {short[path]: value for path, value in claimed.trial.params.items()}
    place = {"number": claimed.trial.number, "trials": space.search.trials, "resumed": claimed.resumed}
    return {"event": "trial", **place, "values": values}
