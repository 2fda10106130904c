"""Commands that run a recipe, or prepare to."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import JsonOption, OutOption, RecipeArgument, SetOption, app, print_json, print_text


class CI(StrEnum):
    """Choices of --ci."""

    github = "github"
    gitlab = "gitlab"


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where to write; made if missing.")] = Path(),
    ci: Annotated[CI | None, typer.Option(help="Also write a workflow that gates pull requests.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a commented recipe and your own network and data as a starting point.

    Example: edgekd init my-project --ci github
    """
    from ..scaffold import scaffold
    from ..screen import note

    for path in scaffold(directory, force, ci.value if ci is not None else None):
        print_text(str(path))
    note(f"next: {'' if directory == Path() else f'cd {shlex.quote(str(directory))} && '}edgekd run recipe.toml")


@app.command()
def demo(out: OutOption = None, as_json: JsonOption = False) -> None:
    """Run the whole chain on real handwritten digits, in about two minutes.

    Example: edgekd demo
    """
    run_recipe("demo", [], out, None, None, False, as_json)


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
    run_recipe(recipe, overrides, out, start, until, force, as_json)


def run_recipe(
    recipe: str,
    overrides: list[str],
    out: Path | None,
    start: str | None,
    until: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run a recipe, or a part of it, and show what came out."""
    from .. import ranks, runs
    from ..gate import lines
    from ..report import render
    from ..screen import note, watching

    made: list[tuple[str, str]] = []

    with watching(as_json) as emit:

        def watch(event: dict[str, Any]) -> None:
            if event["event"] == "stage":
                made.append((event["stage"], event["path"]))
            emit(event)

        command = shlex.join(["edgekd", *sys.argv[1:]])
        done = runs.run(
            recipe,
            overrides=overrides,
            directory=out,
            emit=watch,
            start=start,
            until=until,
            force=force,
            command=command,
        )
        if not ranks.first():
            raise typer.Exit(done.exit_code if done is not None else 0)
        if done is None:
            if not as_json:
                last = until or made[-1][0]
                print_text("\n".join(path for stage, path in made if stage == last or stage.startswith(f"{last}.")))
            return
        if as_json:
            verdicts = [v.model_dump(mode="json") for v in done.verdicts]
            emit({"event": "result", "results": done.results.model_dump(mode="json"), "verdicts": verdicts})
    if not as_json:
        print_text(render(done.results, done.verdicts, "text"))
        for warning in dict.fromkeys(w for p in done.results.profiles for w in p.warnings):
            note(f"warning: {warning}")
        for text in lines(done.verdicts):
            print_text(text)
    note(f"report: {done.directory / 'report.html'}")
    raise typer.Exit(done.exit_code)


@app.command()
def check(
    recipe: RecipeArgument, overrides: SetOption = [], out: OutOption = None, as_json: JsonOption = False
) -> None:
    """Validate a recipe and print the plan, and what of it is already done. Nothing is trained.

    Example: edgekd check recipe.toml
    """
    from ..pipeline import plan, summarise, teacher_caches
    from ..recipe import load_recipe
    from ..screen import watching

    loaded = load_recipe(recipe, overrides)
    with watching(False) as emit:
        planned = plan(loaded, out, emit=emit)
    space = None
    if loaded.search is not None:
        from ..search import prepare

        space = prepare(loaded)
    rows = summarise(planned)
    caches = teacher_caches(planned)
    if as_json:
        print_json(
            {
                "directory": str(planned.directory),
                "stages": rows,
                "teacher_caches": caches,
                "search": space and space.summary(),
            }
        )
        return
    size = "x".join(map(str, planned.data.size))
    counts = [len(split) for split in (planned.data.train, planned.data.validation, planned.data.test)]
    print_text(f"{planned.recipe.name}: {len(planned.data.classes)} classes, {size}")
    print_text("images: {:,} training, {:,} validation, {:,} test".format(*counts))
    wide = max(12, *(len(row["stage"]) for row in rows))
    for row in rows:
        print_text(f"  {row['stage']:<{wide}} {'complete' if row['done'] else 'to do':<9} {row['directory']}")
    for step in planned.steps:
        if step.choice is not None:
            print_text(f"student of {step.name}: {step.choice.text}")
    for cache in caches:
        missing, whole = cache["missing_bytes"] / 1e6, cache["bytes"] / 1e6
        state = "is there" if not missing else "to build" if missing == whole else f"{missing:.3f} MB of it to build"
        print_text(f"teacher cache: {whole:.3f} MB on disk, {state}: {cache['directory']}")
    if space is not None:
        told = space.summary()
        print_text(f"search: {told['trials']} trials for {told['metric']} of {told['stage']}: {told['directory']}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The directory of a run, begun or about to begin.")],
    as_json: JsonOption = False,
) -> None:
    """Follow a run from a second terminal; exit with its exit code, or 3 when it was killed.

    Example: edgekd watch runs/demo
    """
    from ..screen import note, watching
    from ..watch import follow

    end: dict[str, Any] = {}
    with watching(as_json) as show:
        for event in follow(run):
            if event["event"] == "begin" and not as_json:
                note(f"process {event['pid']}: {event['command']}")
            elif event["event"] != "end" or as_json:
                show(event)
            end = event
    code = int(end.get("exit_code", 0))
    if not as_json:
        print_text(f"ended with exit code {code}" + (f": {end['error']}" if end.get("error") else ""))
    raise typer.Exit(code)
