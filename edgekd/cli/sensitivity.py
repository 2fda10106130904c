"""The command that says what a network can do without."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import DataOption, JsonOption, PageOption, app, check_page, print_json, print_text, write_page


@app.command()
def sensitivity(
    source: Annotated[str, typer.Argument(help="A run, RUN:stage or an artifact directory.")],
    profile: Annotated[
        str | None, typer.Option(help="Says channel multiple and scheme (default: the recipe's first).")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images to measure on.")] = 256,
    importance: Annotated[str, typer.Option(help="How channels are ranked: edgekd list importances.")] = "magnitude",
    data: DataOption = None,
    out: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what each group of channels, each block, and each layer in int8 does to the answers.

    Example: edgekd sensitivity runs/demo:distill --profile cpu-x86 -o sensitivity.html
    """
    from ..report.sensitivity import sensitivity_html, sensitivity_text
    from ..screen import watching
    from ..sweep import sensitivity as measure

    check_page(out)
    with watching(False) as emit:
        document = measure(source, profile=profile, images=images, importance=importance, data=data, emit=emit)  # type: ignore[arg-type]
    write_page(out, document, sensitivity_html)
    if as_json:
        print_json(document)
    else:
        print_text(sensitivity_text(document))
