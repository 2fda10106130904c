"""The command that measures which student a device likes."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UsageError
from .app import JsonOption, PageOption, ProfileOption, app, check_page, print_json, print_text, write_page


@app.command()
def students(
    family: Annotated[str, typer.Option(help="cifar-resnet, mobilenet or vit.")],
    profile: ProfileOption = [],
    size: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Images: channels, height, width (default: 3,32,32).")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes (default: 10).")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe that says size, classes, profiles, and the teacher to compare with.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32,int8 or one of them (default: what the profile has).")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Depths to measure instead of the usual ones.")
    ] = None,
    widths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Widths to measure instead of the usual ones.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again what was measured on this machine before.")
    ] = False,
    out: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a family's shapes on a profile, float and int8: which of them lie on the front of latency and capacity.

    Example: edgekd students --family cifar-resnet --profile cpu-x86 -o front.html
    """
    from ..recipe import load_recipe
    from ..report.students import students_html, students_text
    from ..screen import note, watching
    from ..students import fronts

    check_page(out)
    shape = _numbers("--size", size)
    if shape and len(shape) != 3:
        raise UsageError(f"expected channels, height and width, got {size}", where="--size", hint="--size 3,32,32")
    with watching(False) as emit:
        document = fronts(
            family,
            profile,
            size=shape or None,
            classes=classes,
            recipe=load_recipe(recipe) if recipe else None,
            precisions=precision.split(",") if precision else [],
            depths=_numbers("--depths", depths),
            widths=_factors("--widths", widths),
            again=force,
            emit=emit,
        )
    for warning in dict.fromkeys(w for front in document["fronts"] for w in front["warnings"]):
        note(f"warning: {warning}")
    write_page(out, document, students_html)
    if as_json:
        print_json(document)
    else:
        print_text(students_text(document))
        for front in document["fronts"]:
            note(f"kept in {front['cache']}; --force measures again")


def _numbers(option: str, text: str | None) -> list[int]:
    values = _factors(option, text)
    if any(value != int(value) for value in values):
        raise UsageError(f"expected whole numbers, got {text!r}", where=option, hint=_example(option))
    return [int(value) for value in values]


def _factors(option: str, text: str | None) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [-1.0]
    if not all(0 < value < 1e6 for value in values):
        raise UsageError(f"expected numbers above 0 and commas, got {text!r}", where=option, hint=_example(option))
    return values


def _example(option: str) -> str:
    return f"for example {option} {'3,32,32' if option == '--size' else '8,16'}"
