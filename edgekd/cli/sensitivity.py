"""The command that says what a network can do without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import DataOption, JsonOption, app, print_json, print_text


@app.command()
def sensitivity(
    source: Annotated[str, typer.Argument(help="A run, RUN:stage or an artifact directory.")],
    profile: Annotated[
        str | None, typer.Option(help="Says channel multiple and scheme (default: the recipe's first).")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images to measure on.")] = 256,
    importance: Annotated[str, typer.Option(help="How channels are ranked: edgekd list importances.")] = "magnitude",
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write a page (.html) or the document (.json).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what each group of channels, each block, and each layer in int8 does to the answers.

    Example: edgekd sensitivity runs/demo:distill --profile cpu-x86 -o sensitivity.html
    """
    import json

    from ..report.sensitivity import sensitivity_html, sensitivity_text
    from ..screen import watching
    from ..sweep import sensitivity as measure

    if out is not None and out.suffix not in (".html", ".json"):
        raise UsageError(f"must end in .html or .json, got {out}", where="--out")
    with watching(False) as emit:
        document = measure(source, profile=profile, images=images, importance=importance, data=data, emit=emit)  # type: ignore[arg-type]
    if out is not None:
        from ..artifact import write_atomically

        text = sensitivity_html(document) if out.suffix == ".html" else json.dumps(document, indent=1) + "\n"
        write_atomically(out, text)
    if as_json:
        print_json(document)
    else:
        print_text(sensitivity_text(document))
