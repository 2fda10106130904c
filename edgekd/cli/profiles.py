"""Commands about profiles: what there is, what is in one, whether a file is right, and one for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app, print_json, print_text

profiles = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(profiles, name="profiles", help="List, show, check and detect hardware profiles.")


@profiles.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the shipped profiles, and say which of them this machine is.

    Example: edgekd profiles list
    """
    from ..catalogue import catalogue, catalogue_text

    rows = catalogue()
    if as_json:
        print_json({"profiles": rows})
    else:
        print_text(catalogue_text(rows))


@profiles.command()
def show(
    name: Annotated[str, typer.Argument(help="A shipped profile's name, or a file.")],
    as_json: JsonOption = False,
) -> None:
    """Print a profile with everything it inherits and every default, as TOML that loads again.

    Example: edgekd profiles show jetson-orin-nano-8gb-super > board.toml
    """
    from ..profile import load_profile, profile_toml

    profile = load_profile(name, "profiles show")
    if as_json:
        print_json({"profile": profile.model_dump(mode="json")})
    else:
        print_text(profile_toml(profile))


@profiles.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Profiles: files, or shipped names.")],
    as_json: JsonOption = False,
) -> None:
    """Say everything that is wrong with profiles of your own, and everything that is odd; exit 2 if any is wrong.

    Example: edgekd profiles check board.toml
    """
    from dataclasses import asdict

    from ..catalogue import vetted
    from ..errors import RecipeError
    from ..screen import note

    found = [vetted(file) for file in files]
    problems = [problem for one in found for problem in one.problems]
    if as_json:
        rows = [
            {"file": v.file, "problems": [*map(asdict, v.problems)], "warnings": [*map(asdict, v.warnings)]}
            for v in found
        ]
        print_json({"files": rows})
        raise typer.Exit(RecipeError.exit_code if problems else 0)
    for one in found:
        for warning in one.warnings:
            note(f"warning: {warning}")
        if not one.problems:
            print_text(f"ok  {one.file}")
    if problems:
        raise RecipeError(problems)


@profiles.command()
def detect(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file to write (default: stdout).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a profile for this machine: its CPU, or its NVIDIA GPU, or the Jetson that it is.

    Example: edgekd profiles detect -o mine.toml
    """
    from ..artifact import write_atomically
    from ..detect import detect as detect_machine
    from ..errors import UsageError
    from ..screen import note

    if out is not None and out.suffix != ".toml":
        raise UsageError(f"must end in .toml, got {out}", where="--out", hint="a profile is named after its file")
    found = detect_machine()
    if out is not None:
        write_atomically(out, found.toml())
        note(f"written: {out}; use it with --profile {out}, or look at it: edgekd profiles show {out}")
    if as_json:
        print_json({"profile": found.table, "notes": found.notes})
    elif out is None:
        print_text(found.toml())
