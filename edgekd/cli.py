"""The command line: parse, call, exit code. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import EdgekdError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="edgekd",
    help="Make a trained PyTorch network fit an edge device: distil, prune, quantize, export, measure, gate.",
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


def main() -> None:
    """Run the command line and exit with the code that the outcome has."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    # Threads that spin at barriers make training ten times slower where another process wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = 0
    try:
        app(standalone_mode=False)
    except EdgekdError as error:
        from .screen import show_error

        show_error(error)
        code = error.exit_code
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted: run the same command again to resume", file=sys.stderr)  # noqa: T201
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except Exception as error:
        code = _other(error)
    sys.exit(code)


def _other(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # the parser's own usage errors
        error.show()
        return int(error.exit_code)
    if isinstance(error, OSError):
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)  # noqa: T201
        print("hint: is the disk full, or a path not readable or writable?", file=sys.stderr)  # noqa: T201
        return 3
    traceback.print_exc()
    print(  # noqa: T201
        f"\nThis is a bug in edgekd ({type(error).__name__}). Please report it with the lines above, the command and "
        "the output of `edgekd doctor`.",
        file=sys.stderr,
    )
    return 70


def _as_interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def _print_json(document: Any) -> None:
    _print(json.dumps({"version": 1, **document} if isinstance(document, dict) else document, indent=1, default=str))


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where to write; made if missing.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a commented recipe and your own network and data as a starting point.

    Example: edgekd init my-project
    """
    from .scaffold import scaffold

    for path in scaffold(directory, force):
        _print(str(path))


@app.command()
def demo(out: OutOption = None, as_json: JsonOption = False) -> None:
    """Run the whole chain on real handwritten digits, in about two minutes.

    Example: edgekd demo
    """
    _run("demo", [], out, None, None, False, as_json)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    out: OutOption = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and all after it again.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Do everything again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: all stages, measurement, gate, report. What is complete is skipped; a killed run resumes.

    Example: edgekd run recipe.toml --set stage.distill.epochs=30
    """
    _run(recipe, overrides, out, start, until, force, as_json)


def _run(
    recipe: str,
    overrides: list[str],
    out: Path | None,
    start: str | None,
    until: str | None,
    force: bool,
    as_json: bool,
) -> None:
    from . import runs
    from .gate import lines
    from .report import render
    from .screen import note, watching

    with watching(as_json) as emit:
        command = " ".join(["edgekd", *sys.argv[1:]])
        done = runs.run(
            recipe,
            overrides=overrides,
            directory=out,
            emit=emit,
            start=start,
            until=until,
            force=force,
            command=command,
        )
        if done is None:
            return
        if as_json:
            verdicts = [v.model_dump(mode="json") for v in done.verdicts]
            emit({"event": "result", "results": done.results.model_dump(mode="json"), "verdicts": verdicts})
    if not as_json:
        _print(render(done.results, done.verdicts, "text"))
        for text in lines(done.verdicts):
            _print(text)
    note(f"report: {done.directory / 'report.html'}")
    raise typer.Exit(done.exit_code)


@app.command()
def check(
    recipe: RecipeArgument, overrides: SetOption = [], out: OutOption = None, as_json: JsonOption = False
) -> None:
    """Validate a recipe and print the plan, and what of it is already done. Nothing is trained.

    Example: edgekd check recipe.toml
    """
    from .pipeline import plan, summarise
    from .recipe import load_recipe

    planned = plan(load_recipe(recipe, overrides), out)
    rows = summarise(planned)
    if as_json:
        _print_json({"directory": str(planned.directory), "stages": rows})
        return
    size = "x".join(map(str, planned.data.size))
    counts = [len(split) for split in (planned.data.train, planned.data.validation, planned.data.test)]
    _print(f"{planned.recipe.name}: {len(planned.data.classes)} classes, {size}")
    _print("images: {:,} training, {:,} validation, {:,} test".format(*counts))
    for row in rows:
        _print(f"  {row['stage']:<12} {'complete' if row['done'] else 'to do':<9} {row['directory']}")


def _stage_command(stage: str, recipe: str, overrides: list[str], out: Path | None, as_json: bool) -> None:
    """Run a recipe until a stage."""
    _run(recipe, overrides, out, None, stage, False, as_json)


@app.command()
def teacher(
    recipe: RecipeArgument, overrides: SetOption = [], out: OutOption = None, as_json: JsonOption = False
) -> None:
    """Train or load the teacher of a recipe.

    Example: edgekd teacher recipe.toml
    """
    _stage_command("teacher", recipe, overrides, out, as_json)


@app.command()
def distill(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; or give --teacher, --student and --data.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A run, RUN:stage or artifact to learn from.")] = None,
    student: Annotated[str | None, typer.Option(help="A model: a name, or package.module:function.")] = None,
    data: Annotated[str | None, typer.Option(help="A data set: a name, or package.module:function.")] = None,
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a student with a teacher: a recipe up to its stage `distill`, or a teacher, a student and data.

    Example: edgekd distill --teacher runs/demo:teacher --student cifar-resnet --set model.depth=8 --set epochs=5
    """
    if recipe is not None:
        _stage_command("distill", recipe, overrides, out, as_json)
        return
    if teacher is None or student is None:
        raise UsageError("give a recipe, or --teacher and --student", hint="edgekd distill --help shows an example")
    _single("distill", teacher, None, None, data, [f'model.use="{student}"', *overrides], out, as_json)


SourceArgument = Annotated[str | None, typer.Argument(help="A run, RUN:stage or an artifact directory.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Instead of SOURCE: your network, package.module:function.")
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="Its weights (.safetensors, .pt, .th).")]
DataOption = Annotated[str | None, typer.Option("--data", help="A data set: a name, or package.module:function.")]


@app.command()
def prune(
    source: SourceArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take channels away and heal.

    Example: edgekd prune runs/demo:distill --set target.macs=0.6 --set heal.epochs=2
    """
    _single("prune", source, model, weights, data, overrides, out, as_json)


@app.command()
def quantize(
    source: SourceArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize to int8 as the profile's runtime fuses it, and heal.

    Example: edgekd quantize runs/demo:prune --set heal.epochs=0
    """
    _single("quantize", source, model, weights, data, overrides, out, as_json)


@app.command()
def export(
    source: SourceArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    target: Annotated[list[str], typer.Option(help="onnx.")] = ["onnx"],
    overrides: SetOption = [],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the file that a runtime loads, and compare it with the network on real images.

    Example: edgekd export runs/demo:quantize --target onnx --set input=uint8
    """
    _single("export", source, model, weights, data, [f"targets={json.dumps(target)}", *overrides], out, as_json)


def _single(
    stage: str,
    source: str | None,
    model: str | None,
    weights: Path | None,
    data: str | None,
    overrides: list[str],
    out: Path | None,
    as_json: bool,
) -> None:
    from .screen import watching
    from .single import run_single

    with watching(as_json) as emit:
        artifact = run_single(stage, source, model, weights, data, overrides, out, emit)
    if as_json:
        _print_json({"path": str(artifact.path), "manifest": artifact.manifest.model_dump(mode="json")})
    else:
        _print(str(artifact.path))


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
    from . import runs
    from .recipe import load_recipe
    from .report import render
    from .screen import watching

    with watching(False) as emit:
        if len(paths) == 1 and (Path(paths[0]) / "recipe.toml").is_file():
            results = runs.bench_run(Path(paths[0]), profile, emit)
        else:
            results = runs.bench_paths(paths, profile, emit, load_recipe(recipe) if recipe else None)
    if out is not None:
        results.write(out)
    if as_json:
        _print_json(results.model_dump(mode="json"))
    else:
        _print(render(results, [], "text"))


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
    from .gate import exit_code, lines
    from .verdicts import gate_run, read_rules

    table = read_rules(rules) if rules is not None else None
    if len(paths) == 1 and (Path(paths[0]) / "recipe.toml").is_file():
        verdicts = gate_run(Path(paths[0]), table, profile)
    elif table is None:
        raise UsageError("no rules to judge by", where="gate", hint="give --rules FILE with a [gate] table, or a run")
    else:
        from .runs import gate_files
        from .screen import watching

        with watching(False) as emit:
            verdicts = gate_files(paths, table, profile, emit)
    if as_json:
        _print_json({"exit_code": exit_code(verdicts), "verdicts": [v.model_dump(mode="json") for v in verdicts]})
    else:
        for text in lines(verdicts):
            _print(text)
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
    from .verdicts import report_of

    text = report_of(run, format)
    if out is None and format == "html" and run.is_dir():
        out = run / "report.html"
    if out is None:
        _print(text)
        return
    from .artifact import write_atomically

    write_atomically(out, text)
    _print(str(out))


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="objectives, models, data, stages, profiles, recipes, ...")],
    as_json: JsonOption = False,
) -> None:
    """List what recipes can name, with a line each.

    Example: edgekd list objectives
    """
    from .inspect import listing

    rows = listing(kind)
    if as_json:
        _print_json({"kind": kind, "items": [{"name": n, "summary": s} for n, s in rows]})
        return
    width = max((len(n) for n, _ in rows), default=0)
    for name, text in rows:
        _print(f"{name:<{width}}  {text}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A component's or profile's name, an artifact, or an .onnx file.")],
    as_json: JsonOption = False,
) -> None:
    """Print what is known of a component, an artifact or an ONNX file.

    Example: edgekd show kl
    """
    from .inspect import describe

    document = describe(name)
    if as_json:
        _print_json(document)
    else:
        _print(document["text"])


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say which runtimes and targets this machine has, and for each missing one why, and what to install.

    Example: edgekd doctor
    """
    from .inspect import diagnosis

    document = diagnosis()
    if as_json:
        _print_json(document)
        return
    for key, value in document["machine"].items():
        _print(f"{key:<16} {value}")
    for runtime in document["runtimes"]:
        _print(f"{'ok     ' if runtime['available'] else 'missing'} {runtime['name']:<16} {runtime['text']}")
    for text in document["warnings"]:
        _print(f"warning: {text}")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors: put `#:schema ./recipe.schema.json` on a recipe's first line.

    Example: edgekd schema > recipe.schema.json
    """
    from .inspect import recipe_schema

    _print(json.dumps(recipe_schema(), indent=1))
