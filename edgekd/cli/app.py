"""The application object, the options that commands share, and output to stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import UsageError

app = typer.Typer(
    name="edgekd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example stage.distill.epochs=3.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
OutOption = Annotated[Path | None, typer.Option("-o", "--out", help="The run's directory (default: runs/NAME).")]
RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
ProfileOption = Annotated[list[str], typer.Option("--profile", help="A profile's name or file; may be repeated.")]
SourceArgument = Annotated[str | None, typer.Argument(help="A run, RUN:stage or an artifact directory.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Instead of SOURCE: your network, package.module:function.")
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="Its weights (.safetensors, .pt, .th).")]
DataOption = Annotated[str | None, typer.Option("--data", help="A data set: a name, or package.module:function.")]
PageOption = Annotated[
    Path | None, typer.Option("-o", "--out", help="Also write a page (.html) or the document (.json).")
]


def check_page(out: Path | None) -> None:
    """Raise UsageError, before anything is measured, unless `out` can become a page or a document."""
    if out is None:
        return
    if out.suffix not in (".html", ".json"):
        raise UsageError(f"must end in .html or .json, got {out}", where="--out")
    if out.is_dir() or not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise UsageError(f"{out} cannot be written", where="--out", hint="name a file in a directory that is there")


def write_page(out: Path | None, document: Any, html: Callable[[Any], str]) -> None:
    """The document as a page or as JSON, as the name of the file says."""
    if out is not None:
        from ..artifact import write_atomically

        write_atomically(out, html(document) if out.suffix == ".html" else json.dumps(document, indent=1) + "\n")


def print_text(text: str) -> None:
    """Data for stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def print_json(document: Any) -> None:
    """One versioned document for stdout."""
    print_text(
        json.dumps({"version": 1, **document} if isinstance(document, dict) else document, indent=1, default=str)
    )


def _version(wanted: bool) -> None:
    if wanted:
        print_text(f"edgekd {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make a trained PyTorch network fit an edge device: distil, prune, quantize, export, measure, gate."""
