"""Commands that measure and judge."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import JsonOption, ProfileOption, app, print_json, print_text


class OnInconclusive(StrEnum):
    """Choices of --on-inconclusive."""

    inconclusive = "inconclusive"
    passed = "pass"
    failed = "fail"


@app.command()
def bench(
    paths: Annotated[list[str], typer.Argument(help="Runs, RUN:stage, artifacts or .onnx files, ours or not.")],
    profile: ProfileOption = [],
    recipe: Annotated[str | None, typer.Option(help="Where no run says so: the recipe that names the data.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Also write results.json here; of files, every call's time beside it."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="NAME|USER@HOST", help="Measure on a device that ssh reaches.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="With --host: leave the bundle and its results there.")] = False,
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

    if keep and host is None:
        raise UsageError("keeps what lies on a device, and none is named", where="--keep", hint="--host NAME")
    told = disturbances(environment()) if host is None else []
    for text in told:
        note(f"warning: {text}")
    with watching(False) as emit:
        given = load_recipe(recipe) if recipe else None
        if host is not None:
            from ..devices import find_device
            from ..devices.bench import bench_on, not_run

            results = bench_on(find_device(host), paths, profile, emit, given, keep=keep, out=out)
        elif len(paths) == 1 and (Path(paths[0]) / "recipe.toml").is_file():
            results = runs.bench_run(Path(paths[0]), profile, emit)
        else:
            samples = out.with_suffix(".samples.json") if out is not None else None
            results = runs.bench_paths(paths, profile, emit, given, samples=samples)
    for text in dict.fromkeys(w for p in results.profiles for w in p.warnings if w not in told):
        note(f"warning: {text}")
    if out is not None and host is None:
        results.write(out)
    if as_json:
        print_json(results.model_dump(mode="json"))
    else:
        print_text(render(results, [], "text"))
    if host is not None and (failed := not_run(results)):
        note(f"error: {', '.join(failed)} did not run there: see the warnings")
        raise typer.Exit(3)


@app.command()
def gate(
    paths: Annotated[
        list[str], typer.Argument(help="A run, a results JSON; or artifacts, .onnx files: measured first.")
    ],
    rules: Annotated[
        Path | None, typer.Option(help="A TOML file with [gate] rules; default: the run's recipe.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="What `regress` compares with: a run or model, measured beside, or a committed JSON."),
    ] = None,
    profile: ProfileOption = [],
    on_inconclusive: Annotated[
        OnInconclusive, typer.Option(help="What an inconclusive rule counts as.")
    ] = OnInconclusive.inconclusive,
    other_machine: Annotated[
        bool, typer.Option("--allow-other-machine", help="Take a JSON baseline from another machine or runtime.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Also write the verdicts as JUnit XML here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge measurements by rules: exit 0 when all pass, 1 when one fails, 4 when one cannot be told.

    Example: edgekd gate runs/demo --rules gate.toml --baseline main.onnx
    """
    from ..gate import exit_code, lines
    from ..screen import watching
    from ..verdicts import gate_results, gate_stored, read_rules

    table = read_rules(rules) if rules is not None else None
    run = Path(paths[0]) if len(paths) == 1 and (Path(paths[0]) / "recipe.toml").is_file() else None
    if run is None and table is None:
        raise UsageError("no rules to judge by", where="gate", hint="give --rules FILE with a [gate] table, or a run")
    with watching(False) as emit:
        if run is not None and baseline is None:
            results, verdicts = gate_stored(run, table, profile)
        elif table is not None and len(paths) == 1 and paths[0].endswith(".json"):
            results, verdicts = gate_results(Path(paths[0]), table, profile, baseline, other_machine=other_machine)
        else:
            from ..gating import gate_files, gate_run

            if run is not None:
                results, verdicts = gate_run(run, table, profile, baseline, emit, other_machine=other_machine)
            else:
                assert table is not None
                results, verdicts = gate_files(paths, table, profile, baseline, emit, other_machine=other_machine)
    if junit is not None:
        from ..artifact import write_atomically
        from ..report import render

        write_atomically(junit, render(results, verdicts, "junit"))
    code = exit_code(verdicts, on_inconclusive.value)
    if as_json:
        print_json({"exit_code": code, "verdicts": [v.model_dump(mode="json") for v in verdicts]})
    else:
        for text in lines(verdicts):
            print_text(text)
    raise typer.Exit(code)
