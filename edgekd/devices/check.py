"""Whether a device is ready: one line each of what a measurement needs, with what mends it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..bench import not_here
from ..bench.accelerators import power_mode
from ..errors import EdgekdError
from ..jetpack import same_line
from ..profile import Profile
from .known import Device
from .remote import ENOUGH, INSTALL, ROOM_BYTES
from .ssh import ask, connected

__all__ = ["Check", "check_device", "not_the_device", "trtexec_version"]

#: A wall clock that is further off makes dates of results and files misleading.
CLOCK_S = 60.0
#: Governors that let the clock follow the load.
SWINGING = ("powersave", "conservative", "ondemand", "schedutil")


class Check(BaseModel):
    """One thing that was looked at: `failed` stops a measurement, `warning` disturbs it, `note` is to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    status: Literal["ok", "note", "warning", "failed"]
    found: str
    hint: str | None = None


def check_device(device: Device, profile: Profile | None) -> list[Check]:
    """Look at a device, and whether it is what `profile` describes; a device that cannot be reached is one line."""
    begun = time.monotonic()
    try:
        with connected(device) as link:
            found = ask(link, "check")
    except EdgekdError as error:
        return [Check(name="reach", status="failed", found=error.problem.what, hint=error.problem.hint)]
    seconds = time.monotonic() - begun
    reached = Check(name="reach", status="ok", found=f"{device.host}, its host key is known ({seconds:.1f} s)")
    return [reached, *_software(device, found), *_machine(found), *(_fits(profile, found) if profile else [])]


def _software(device: Device, found: dict[str, Any]) -> Iterator[Check]:
    yield Check(name="python", status="ok", found=f"{device.python} is {found['python']}")
    numpy = found["modules"]["numpy"]
    hint = f"`sudo apt install python3-numpy`, or `{device.python} -m pip install numpy`"
    yield _module("numpy", numpy, "failed", hint)
    for name in ("onnxruntime", "tensorrt"):
        yield _module(name, found["modules"][name], "note", INSTALL[name])
    if found["trtexec"]:
        path, banner = found["trtexec"]
        yield Check(name="trtexec", status="ok", found=f"{trtexec_version(banner) or 'version not said'}, {path}")
    else:
        yield Check(name="trtexec", status="note", found="not installed", hint=INSTALL["trtexec"])
    if not runtimes(found):
        hint = f"one is enough: {'; '.join(INSTALL.values())}"
        yield Check(name="runtime", status="failed", found="none of the three works", hint=hint)


def _module(name: str, state: dict[str, Any], otherwise: Literal["note", "failed"], hint: str) -> Check:
    if state["version"] is not None:
        return Check(name=name, status="ok", found=state["version"])
    return Check(name=name, status=otherwise, found=state["why"], hint=hint)


def _machine(found: dict[str, Any]) -> Iterator[Check]:
    free, place = found["free"], found["directory"]
    if found["writable"] is not None:
        hint = "edgekd devices add NAME HOST --directory DIR"
        yield Check(name="directory", status="failed", found=f"{place}: {found['writable']}", hint=hint)
    elif free is not None and free < ROOM_BYTES:
        hint = "free some space there, or: edgekd devices add NAME HOST --directory DIR"
        yield Check(name="directory", status="failed", found=f"{free / 1e6:,.0f} MB free in {place}", hint=hint)
    else:
        room = f"{free / 1e6:,.0f} MB free in " if free is not None else ""
        yield Check(name="directory", status="ok", found=f"{room}{place}")
    if found["kept"]:
        hint = f"where nothing runs: rm -r {place}"
        yield Check(name="kept", status="note", found=f"{len(found['kept'])} bundles lie in {place}", hint=hint)
    if found["holder"] is not None:
        yield Check(name="busy", status="warning", found=f"{found['holder']['who']} measures there now", hint="wait")
    yield Check(name="processor", status="ok", found=f"{_processor(found)}, {found['cores']} cores, {found['machine']}")
    if found["gpus"]:
        yield Check(name="gpu", status="ok", found="; ".join(found["gpus"].strip().splitlines()))
    if found["l4t"]:
        yield Check(name="jetson", status="ok", found=found["l4t"].splitlines()[0].lstrip("# "))
    if mode := power_mode(found["power"]):
        full = mode.startswith("MAXN")
        mend = "`sudo nvpmodel -m NUMBER` sets another (/etc/nvpmodel.conf has them), `sudo jetson_clocks` holds clocks"
        yield Check(name="power mode", status="ok" if full else "note", found=mode, hint=None if full else mend)
    if found["governor"]:
        swings = found["governor"] in SWINGING
        hint = "clocks follow the load: `sudo cpupower frequency-set -g performance`, Jetson: `sudo jetson_clocks`"
        status: Literal["ok", "warning"] = "warning" if swings else "ok"
        yield Check(name="governor", status=status, found=found["governor"], hint=hint if swings else None)
    loaded = found["load"] > found["cores"] / 2
    yield Check(
        name="load",
        status="warning" if loaded else "ok",
        found=f"{found['load']:.1f} on {found['cores']} cores",
        hint="something else is running: `ps -eo pcpu,comm --sort -pcpu | head`" if loaded else None,
    )
    off = found["time"] - time.time()
    if abs(off) > CLOCK_S:
        yield Check(
            name="clock", status="warning", found=f"{off:+.0f} s from here", hint="`sudo timedatectl set-ntp 1`"
        )


def _processor(found: dict[str, Any]) -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", found["cpu"], re.MULTILINE)
    return found["model"] or (named.group(1) if named else "processor not named")


def _fits(profile: Profile, found: dict[str, Any]) -> Iterator[Check]:
    differences = list(_differences(profile, found))
    for what, hint in differences:
        yield Check(name=profile.name, status="warning", found=what, hint=hint)
    wanted, there = ENOUGH.get(profile.runtime, (profile.runtime,)), runtimes(found)
    if not set(wanted) & set(there):
        hint = " or ".join(INSTALL.get(name, name) for name in wanted)
        yield Check(
            name=profile.name, status="failed", found=f"runs on {profile.runtime}, which is not there", hint=hint
        )
    elif not differences:
        yield Check(name=profile.name, status="ok", found="the device is what the profile says, as far as it tells")


def _differences(profile: Profile, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    another = "choose another with --profile, or write one that extends it"
    if why := not_the_device(profile, found):
        yield why, another
    there = runtimes(found)
    version = re.match(r"\d+(\.\d+)*", there.get("tensorrt") or there.get("trtexec") or "")
    if profile.tensorrt and version and not same_line(profile.tensorrt.version, [version.group()]):
        yield f"is for TensorRT {profile.tensorrt.version}, the device has {version.group()}", another
    if profile.threads > found["cores"]:
        yield f"has {profile.threads} threads, the device {found['cores']} cores", another


def not_the_device(profile: Profile, found: dict[str, Any]) -> str | None:
    """Why no time that the device measures counts for this profile, from what it says of itself; or None."""
    machine: dict[str, Any] = {"machine": found["machine"], "instruction_sets": found["flags"]}
    if found["l4t"]:
        machine |= {"jetson": found["l4t"], "board": found["model"], "power_mode": power_mode(found["power"])}
    cards = re.findall(r"^(.+), *([\d.]+|\[N/A\]), *[\d.]+ *$", found["gpus"], re.MULTILINE)
    machine["gpus"] = [{"name": n, "compute_capability": None if c.startswith("[") else c} for n, c in cards]
    why = not_here(profile, machine, runtimes=list)
    return why and why.replace("this machine", "the device").replace("this board", "the device")


def runtimes(found: dict[str, Any]) -> dict[str, str]:
    """What works on the device, by name, with its version (empty where it does not say)."""
    there = {n: found["modules"][n]["version"] for n in ("onnxruntime", "tensorrt") if found["modules"][n]["version"]}
    if found["trtexec"]:
        there["trtexec"] = trtexec_version(found["trtexec"][1]) or ""
    return there


def trtexec_version(banner: str) -> str | None:
    """`&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b17] # ...` -> 10.3.0, and v8602 -> 8.6.2; None: not said."""
    found = re.search(r"\[TensorRT v(\d+)\]", banner)
    if found is None:
        return None
    number = int(found.group(1))
    major, rest = divmod(number, 1000 if number < 10_000 else 10_000)
    return f"{major}.{rest // 100}.{rest % 100}"
