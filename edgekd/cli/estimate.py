"""The command that says what can be known of a device that is not here."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import JsonOption, app, print_json, print_text


class FloatPrecision(StrEnum):
    """Choices of --precision."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@app.command()
def estimate(
    paths: Annotated[list[str], typer.Argument(help="Runs, artifacts or .onnx files, ours or not.")],
    profile: Annotated[str, typer.Option(help="A profile with a datasheet: a name or a file.")],
    results: Annotated[
        list[Path], typer.Option(help="Results measured on that device: a run, or a JSON; may be repeated.")
    ] = [],
    precision: Annotated[
        FloatPrecision | None, typer.Option(help="What layers that are float in the file run in.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also layer by layer.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Of one run: put them into its results.json, for report and gate.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bound the latency on a device that is not here by its datasheet; with results from it, estimate an interval.

    Example: edgekd estimate model.int8.onnx --profile jetson-orin-nano-8gb --layers
    """
    from ..estimating import estimate_paths, write_estimates
    from ..report.estimates import estimates_text
    from ..screen import note

    if write and (len(paths) != 1 or not (Path(paths[0]) / "results.json").is_file()):
        raise UsageError("puts estimates into one run's results.json", where="--write", hint="give that run alone")
    if write and precision is not None:
        raise UsageError("the report shows what the profile's runtime does by itself", where="--write --precision")
    document = estimate_paths(paths, profile, results, precision=precision.value if precision else None)
    if write:
        write_estimates(Path(paths[0]), profile, results)
        note(f"written: {Path(paths[0]) / 'results.json'}; now edgekd gate or edgekd report")
    if as_json:
        print_json(document.model_dump(mode="json"))
    else:
        print_text(estimates_text(document, layers))
