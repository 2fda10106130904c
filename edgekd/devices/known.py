"""The devices a user knows: names for hosts, kept in `devices.toml` in the user's configuration directory."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..artifact import write_atomically
from ..errors import Problem, RecipeError, StageError, UsageError, nearest
from ..registry import validation_problems

__all__ = ["DIRECTORY", "Device", "add_device", "check_host", "devices_file", "find_device", "known_devices"]

#: Where things lie on a device unless it is told otherwise.
DIRECTORY = "~/.cache/edgekd"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
#: [user@]host, with an address in IPv4 or IPv6 or a name of ~/.ssh/config; neither half may look like an option.
HOST = re.compile(r"(?:[A-Za-z0-9_.][A-Za-z0-9_.+-]*@)?[A-Za-z0-9_:.\[][A-Za-z0-9_:.%\[\]-]*")


class Device(BaseModel):
    """A machine that ssh reaches, and how edgekd works there."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    host: str = Field(description="user@host, or a name of ~/.ssh/config")
    profile: str | None = Field(None, description="what it is measured as, unless --profile says otherwise")
    python: str = Field("python3", min_length=1, description="the interpreter there that has NumPy and the runtime")
    directory: str = Field(DIRECTORY, min_length=1, description="where files lie there while something is measured")
    port: int | None = Field(None, gt=0, lt=65536, description="None: what ssh takes by itself")


def devices_file() -> Path:
    """`$XDG_CONFIG_HOME/edgekd/devices.toml`, by default below ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "edgekd" / "devices.toml"


def known_devices() -> dict[str, Device]:
    """All devices by name, in the file's order. Raises UsageError when the file cannot be read as such."""
    file = devices_file()
    try:
        return _parsed(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise UsageError("not a text file", where=str(file), hint="mend it, or delete it and add anew") from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(file)) from error


def find_device(text: str) -> Device:
    """A device by its name, or any host that ssh knows. Raises UsageError."""
    known = known_devices()
    if text in known:
        return known[text]
    check_host(text, "--host", known)
    return Device(name=text, host=text)


def check_host(host: str, where: str, known: dict[str, Device] | None = None) -> None:
    """Raise UsageError unless `host` is a host and nothing that ssh could take for an option."""
    if HOST.fullmatch(host) is None:
        hint = nearest(host, known) if known and NAME.fullmatch(host) else None
        what = f"not a host: {host!r}"
        raise UsageError(what, where=where, hint=hint or "user@address, or a name of ~/.ssh/config or `devices list`")


def add_device(device: Device) -> Path:
    """Write a device into the file, in place of one of the same name; everything else in it stays as it is.

    Raises UsageError (a name or host that is none, a file that is broken) or StageError (it cannot be written).
    """
    if NAME.fullmatch(device.name) is None:
        raise UsageError(f"not a name: {device.name!r}", where="NAME", hint="letters, digits, - and _: orin-lab")
    check_host(device.host, "HOST")
    known, file = known_devices(), devices_file()
    table = {k: v for k, v in device.model_dump(exclude={"name"}, exclude_defaults=True).items() if v is not None}
    section = f"[{device.name}]\n" + "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in table.items())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if device.name in known:
            # Up to the next table: its comments and those of others stay.
            text = re.sub(rf"(?ms)^\[\s*{device.name}\s*\].*?(?=^\s*(?:\[|#)|\Z)", lambda _: section + "\n", text)
        else:
            text = f"{text.rstrip()}\n\n{section}".lstrip()
        if _parsed(text, file) != {**known, device.name: device}:
            raise UsageError(f"{device.name} stands there in a way of its own", where=str(file), hint="change it there")
        write_atomically(file, text)
    except OSError as error:
        what = f"cannot write {error.filename or file}: {error.strerror}"
        raise StageError(what, hint="is the disk full, or the directory not yours?") from error
    return file


def _parsed(text: str, file: Path) -> dict[str, Device]:
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "mend that line, or delete the file and add the devices anew"
        raise UsageError(f"not valid TOML: {error}", where=str(file), hint=hint) from error
    found, problems = {}, []
    for name, table in tables.items():
        where = f"{file}: {name}"
        try:
            if not isinstance(table, dict):
                raise UsageError("must be a table", where=where, hint=f'[{name}] and below it host = "user@address"')
            if NAME.fullmatch(name) is None:
                raise UsageError("not a name of letters, digits, - and _", where=where)
            found[name] = Device.model_validate({**table, "name": name})
            check_host(found[name].host, f"{where}.host")
        except ValidationError as error:
            problems += [Problem(f"{where}.{p.where}", p.what, p.hint) for p in validation_problems(error, "", Device)]
        except UsageError as error:
            problems.append(error.problem)
    if problems:
        raise RecipeError(problems)
    return found
