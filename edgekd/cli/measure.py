"""Commands that measure, judge and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import JsonOption, ProfileOption, app, print_json, print_text


@app.command()
def bench(
    paths: Annotated[list[str], typer.Argument(help="Runs, RUN:stage, artifacts or .onnx files, ours or not.")],
    profile: ProfileOption = [],
    recipe: Annotated[str | None, typer.Option(help="Where no run says so: the recipe that names the data.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write results.json here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency, throughput, accuracy, memory and size; everything given is measured interleaved.

    Example: edgekd bench runs/demo --profile cpu-x86
    """
    from .. import runs
    from ..bench import disturbances, environment
    from ..recipe import load_recipe
    from ..report import render
    from ..screen import note, watching

    for text in disturbances(environment()):
        note(f"warning: {text}")
    with watching(False) as emit:
        if len(paths) == 1 and (Path(paths[0]) / "recipe.toml").is_file():
            results = runs.bench_run(Path(paths[0]), profile, emit)
        else:
            results = runs.bench_paths(paths, profile, emit, load_recipe(recipe) if recipe else None)
    if out is not None:
        results.write(out)
    if as_json:
        print_json(results.model_dump(mode="json"))
    else:
        print_text(render(results, [], "text"))


@app.command()
def gate(
    paths: Annotated[list[str], typer.Argument(help="A run; or artifacts and .onnx files, measured first.")],
    rules: Annotated[
        Path | None, typer.Option(help="A TOML file with [gate] rules; default: the run's recipe.")
    ] = None,
    profile: ProfileOption = [],
    as_json: JsonOption = False,
) -> None:
    """Judge measurements by rules: exit 0 when all pass, 1 when one fails, 4 when one cannot be told.

    Example: edgekd gate runs/demo --rules gate.toml
    """
    from ..gate import exit_code, lines
    from ..verdicts import gate_run, read_rules

    table = read_rules(rules) if rules is not None else None
    if len(paths) == 1 and (Path(paths[0]) / "recipe.toml").is_file():
        verdicts = gate_run(Path(paths[0]), table, profile)
    elif table is None:
        raise UsageError("no rules to judge by", where="gate", hint="give --rules FILE with a [gate] table, or a run")
    else:
        from ..runs import gate_files
        from ..screen import watching

        with watching(False) as emit:
            verdicts = gate_files(paths, table, profile, emit)
    if as_json:
        print_json({"exit_code": exit_code(verdicts), "verdicts": [v.model_dump(mode="json") for v in verdicts]})
    else:
        for text in lines(verdicts):
            print_text(text)
    raise typer.Exit(exit_code(verdicts))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run, or a results.json.")],
    format: Annotated[str, typer.Option(help="html, md, json or text.")] = "html",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: stdout, or report.html in the run.")] = None,
) -> None:
    """Render a run's measurements.

    Example: edgekd report runs/demo --format md
    """
    from ..verdicts import report_of

    text = report_of(run, format)
    if out is None and format == "html" and run.is_dir():
        out = run / "report.html"
    if out is None:
        print_text(text)
        return
    from ..artifact import write_atomically

    write_atomically(out, text)
    print_text(str(out))
