"""The command that tries out what a recipe leaves open."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from .app import JsonOption, OutOption, RecipeArgument, SetOption, app, print_json, print_text


@app.command()
def search(
    recipe: RecipeArgument,
    fields: Annotated[
        list[str],
        typer.Option("--field", metavar="PATH=RANGE", help="Beside the recipe's: PATH=LOW..HIGH[:log] or PATH=[A, B]."),
    ] = [],
    overrides: SetOption = [],
    out: OutOption = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna's storage, where workers share no disk.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try values for fields of a recipe, and write the best recipe. Again: goes on; at once: one more worker.

    Example: edgekd search recipe.toml --field stage.distill.lr=0.01..0.5:log --set search.trials=20
    """
    from ..report.trials import trials_text
    from ..screen import note, watching
    from ..search import search as run_search

    command = shlex.join(["edgekd", *sys.argv[1:]])
    with watching(False) as emit:
        document = run_search(
            recipe, overrides=overrides, fields=fields, directory=out, storage=storage, emit=emit, command=command
        )
    if as_json:
        print_json(document)
        return
    print_text(trials_text(document))
    directory, best = document["directory"], document["best"]
    note(f"plot: {directory}/search.html")
    note(f"best recipe: {directory}/best.toml; to go on from what it trained:")
    note(f"  edgekd run {shlex.quote(f'{directory}/best.toml')} -o {shlex.quote(best['directory'])}")
