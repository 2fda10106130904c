"""Commands that show what was measured, and set one measurement beside another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import JsonOption, app, print_json, print_text


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run, or a results.json.")],
    format: Annotated[str, typer.Option(help="html, md, text, json, junit, csv or github-benchmark.")] = "html",
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


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run, or a results JSON.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="What is compared with it.")],
    format: Annotated[str, typer.Option(help="text or md.")] = "text",
    as_json: JsonOption = False,
) -> None:
    """Show what changed from one run to another, with intervals and marks.

    Example: edgekd compare runs/main runs/mine
    """
    from ..report import compare as differ
    from ..verdicts import results_at

    if format not in ("text", "md"):
        raise UsageError(f"no format {format!r}", where="--format", hint="known: md, text")
    a, b = results_at(first), results_at(second)
    found, notes = differ.compare(a, b)
    if as_json:
        print_json(differ.comparison_table(found, notes))
    else:
        write = differ.comparison_text if format == "text" else differ.comparison_markdown
        print_text(write(found, notes, b.headline))


baseline = typer.Typer(help="The committed measurement that `regress` rules compare with.", no_args_is_help=True)
app.add_typer(baseline, name="baseline")


@baseline.command()
def update(
    run: Annotated[Path, typer.Argument(help="A run whose measurements become the baseline, or a results JSON.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to commit.")] = Path("baseline.json"),
) -> None:
    """Make a run's measurements the baseline, and show what that changes. Nothing else moves a baseline.

    Example: edgekd baseline update runs/demo -o baseline.json
    """
    from ..errors import ArtifactError
    from ..report import compare as differ
    from ..screen import note
    from ..verdicts import as_baseline, results_at

    new = as_baseline(results_at(run))
    if out.exists():
        try:
            print_text(differ.comparison_text(*differ.compare(results_at(out), new), new.headline))
        except (ArtifactError, UsageError) as error:
            note(f"the old baseline cannot be compared: {error.problem.what}")
    else:
        print_text(f"first baseline: {', '.join(f'{v.name} on {p.profile}' for p in new.profiles for v in p.variants)}")
    new.write(out)
    note(f"written: {out}; commit it")
