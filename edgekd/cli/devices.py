"""Commands about devices that ssh reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import JsonOption, app, print_json, print_text

devices = typer.Typer(help="Devices that ssh reaches, measured with `edgekd bench --host`.", no_args_is_help=True)
app.add_typer(devices, name="devices")


@devices.command()
def add(
    name: Annotated[str, typer.Argument(help="What you call it.")],
    host: Annotated[str, typer.Argument(help="user@address, or a name of ~/.ssh/config.")],
    profile: Annotated[str | None, typer.Option(help="What it is measured as, by a profile's name or file.")] = None,
    python: Annotated[str, typer.Option(help="The interpreter there that has NumPy and the runtime.")] = "python3",
    directory: Annotated[
        str | None, typer.Option(help="Where files lie there meanwhile (default: ~/.cache/edgekd).")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where ssh's own configuration has none.")] = None,
) -> None:
    """Remember a device under a name; one of the same name is replaced.

    Example: edgekd devices add orin me@192.168.1.20 --profile jetson-orin-nano-8gb
    """
    from ..devices import DIRECTORY, Device, add_device
    from ..profile import load_profile
    from ..screen import note

    if profile is not None:
        load_profile(profile, "--profile")
        profile = str(Path(profile).resolve()) if profile.endswith(".toml") else profile
    for option, value in (("--python", python), ("--directory", directory)):
        if value is not None and not value.strip():
            raise UsageError("must not be empty", where=option)
    told = {"name": name, "host": host, "python": python, "directory": directory or DIRECTORY}
    file = add_device(Device(**told, profile=profile, port=port))
    note(f"written: {file}")
    note(f"is it ready? edgekd devices check {name}")


@devices.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the devices that were added.

    Example: edgekd devices list
    """
    from ..devices import devices_file, known_devices
    from ..report.columns import aligned
    from ..screen import note

    known = known_devices()
    if as_json:
        print_json({"file": str(devices_file()), "devices": [d.model_dump() for d in known.values()]})
        return
    if not known:
        note(f"none yet in {devices_file()}; edgekd devices add NAME user@address")
        return
    rows = [("name", "host", "profile", "python", "directory")]
    for d in known.values():
        host = f"{d.host} (port {d.port})" if d.port else d.host
        rows.append((d.name, host, d.profile or "–", d.python, d.directory))
    print_text("\n".join(aligned(rows)))


@devices.command()
def check(
    device: Annotated[str, typer.Argument(metavar="NAME|HOST", help="A device's name, or any user@host.")],
    profile: Annotated[str | None, typer.Option(help="Is it what this says? Default: its own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a device is ready to be measured, and what is missing; exit 3 if something is.

    Example: edgekd devices check me@192.168.1.20
    """
    from ..devices import find_device
    from ..devices.check import check_device
    from ..profile import load_profile

    found = find_device(device)
    name = profile or found.profile
    checks = check_device(found, load_profile(name, "--profile") if name else None)
    failed = [c for c in checks if c.status == "failed"]
    if as_json:
        print_json({"device": found.model_dump(), "ready": not failed, "checks": [c.model_dump() for c in checks]})
    else:
        width = max(len(c.name) for c in checks)
        for c in checks:
            print_text(f"{c.status:<7}  {c.name:<{width}}  {c.found}")
            if c.hint:
                print_text(f"{'':<7}  {'':<{width}}  hint: {c.hint}")
    raise typer.Exit(3 if failed else 0)
