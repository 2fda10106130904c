"""The command that says what TensorRT makes of a file."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import JsonOption, app, print_json, print_text


@app.command()
def verify(
    paths: Annotated[list[str], typer.Argument(help=".onnx files, ours or not; runs, RUN:stage, or artifacts.")],
    profile: Annotated[
        str | None, typer.Option(help="A profile with TensorRT (default, of runs: the recipe's first).")
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="Compile for this one, for example 8.6, instead of the profile's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether TensorRT takes a file and which layers it runs in int8, without a GPU; exit 3 where not as wanted.

    Example: edgekd verify model.int8.onnx --profile jetson-orin-nano-8gb
    """
    from ..verifying import verify_paths

    found = verify_paths(paths, profile, compute_capability=compute_capability)
    if as_json:
        print_json({"ok": all(v.ok for v in found), "files": [v.model_dump(mode="json") | {"ok": v.ok} for v in found]})
    else:
        from ..report.verification import verification_text

        print_text("\n".join(verification_text(v) for v in found))
    raise typer.Exit(0 if all(v.ok for v in found) else 3)
