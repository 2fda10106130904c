"""Commands that say what edgekd knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, print_json, print_text


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="objectives, models, data, stages, importances, profiles, recipes, ...")],
    as_json: JsonOption = False,
) -> None:
    """List what recipes can name, with a line each.

    Example: edgekd list objectives
    """
    from ..inspect import listing

    rows = listing(kind)
    if as_json:
        print_json({"kind": kind, "items": [{"name": n, "summary": s} for n, s in rows]})
        return
    width = max((len(n) for n, _ in rows), default=0)
    for name, text in rows:
        print_text(f"{name:<{width}}  {text}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A component's or profile's name, an artifact, or an .onnx file.")],
    profile: Annotated[
        str | None, typer.Option(help="Of files and quantized artifacts: the profile to time layers with.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Where none lies beside: the recipe that names the data.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Of an int8 .onnx file: the float file of the same network.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print what is known of a component, an artifact or an ONNX file, ours or not; of networks layer by layer.

    Example: edgekd show model.int8.onnx --against model.onnx
    """
    from ..inspect import describe

    document = describe(name, profile=profile, recipe=recipe, against=against)
    if as_json:
        print_json(document)
    else:
        print_text(document["text"])


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say which runtimes and targets this machine has, and for each missing one why, and what to install.

    Example: edgekd doctor
    """
    from ..inspect import diagnosis

    document = diagnosis()
    if as_json:
        print_json(document)
        return
    for key, value in document["machine"].items():
        print_text(f"{key:<16} {value}")
    for runtime in document["runtimes"]:
        print_text(f"{'ok     ' if runtime['available'] else 'missing'} {runtime['name']:<16} {runtime['text']}")
    for text in document["warnings"]:
        print_text(f"warning: {text}")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors: put `#:schema ./recipe.schema.json` on a recipe's first line.

    Example: edgekd schema > recipe.schema.json
    """
    from ..inspect import recipe_schema

    print_text(json.dumps(recipe_schema(), indent=1))
