"""What went wrong between here and a device: ssh's words and the device's errors as messages that help."""

from __future__ import annotations

import shlex
from typing import Any

from ..errors import MissingExtra, StageError
from .known import Device

__all__ = ["login", "of_device", "of_ssh", "plain"]

#: Numbers of the operating system for a full disk, a quota, and a file that may not grow.
FULL = ("ENOSPC", "EDQUOT", "EFBIG")
FORBIDDEN = ("EROFS", "EACCES", "EPERM")


def plain(text: str) -> str:
    """Text of another machine without what would steer a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def login(device: Device) -> str:
    """The command that logs in by hand."""
    return shlex.join(["ssh", *(["-p", str(device.port)] if device.port else []), device.host])


def of_ssh(device: Device, status: int, said: str) -> StageError | MissingExtra:
    """ssh ended with `status` (255: its own failure) and nothing came back from the device."""
    lines = [line.strip() for line in plain(said).splitlines() if line.strip()]
    last, by_hand = lines[-1] if lines else "ssh said nothing", login(device)
    if status == 255:
        for words, what, hint in FAILURES:
            if words in said:
                return StageError(f"{what}: {last}", where=device.name, hint=hint.format(login=by_hand))
        return StageError(f"ssh failed: {last}", where=device.name, hint=f"try by hand: {by_hand}")
    if status in (126, 127) or "not found" in last or "No such file" in last:
        return MissingExtra(
            f"no {device.python} there: {last}",
            where=device.name,
            hint="edgekd needs Python 3.8 or newer with NumPy on the device: `sudo apt install python3-numpy`, or name "
            "another interpreter: edgekd devices add NAME HOST --python PATH",
        )
    return StageError(f"{device.python} ended with status {status} there: {last}", where=device.name,
                      hint=f"try by hand: {by_hand}")  # fmt: skip


#: Words of OpenSSH's messages (sshconnect.c, sshconnect2.c, clientloop.c, misc.c), what they mean, what helps.
FAILURES = (
    ("Could not resolve hostname", "no such host", "is the name right, in ~/.ssh/config or in the network? {login}"),
    ("HOST IDENTIFICATION HAS CHANGED", "its host key is another than before, so nothing was sent",
     "if it was installed anew: `ssh-keygen -R HOST` with its address, then once `{login}`"),
    ("Host key verification failed", "its host key is not known here", "log in once and compare it: {login}"),
    ("Permission denied", "no key that it takes", "copy yours there: `ssh-copy-id HOST`; or start your agent: ssh-add"),
    ("Too many authentication failures", "no key that it takes", "name the right one in ~/.ssh/config: IdentityFile"),
    ("Connection refused", "nothing answers there", "is its ssh server running, and on this port? {login}"),
    ("timed out", "it does not answer", "is it switched on and in this network? {login}"),
    ("No route to host", "it cannot be reached", "is it switched on and in this network? {login}"),
    ("Network is unreachable", "it cannot be reached", "is this machine in the network? {login}"),
    ("onnection closed", "it closed the connection", "its log says why: `journalctl -u ssh`; try {login}"),
    ("Broken pipe", "it closed the connection", "run the same command again; by hand: {login}"),
    ("onnection reset", "it closed the connection", "its log says why: `journalctl -u ssh`; try {login}"),
)  # fmt: skip


def of_device(device: Device, reply: dict[str, Any]) -> StageError | MissingExtra:
    """The device answered that something failed there."""
    error, where = reply["error"], device.name
    if error == "old python":
        return MissingExtra(
            f"{device.python} there is Python {reply['python']}, edgekd needs 3.8 or newer",
            where=where,
            hint="install one beside it (on a Jetson: python3.8), and name it: edgekd devices add NAME HOST --python "
            "python3.8",
        )
    free = f" ({reply['free'] / 1e6:,.0f} MB free)" if reply.get("free") is not None else ""
    what = plain(f"{reply['path'] or device.directory}: {reply['strerror']}")
    if error in FULL:
        hint = "free some space there, or take another disk: edgekd devices add NAME HOST --directory DIR"
        return StageError(f"its disk is full{free}: {what}; what has arrived is kept", where=where, hint=hint)
    if error in FORBIDDEN:
        hint = "take a directory that you may write to: edgekd devices add NAME HOST --directory DIR"
        return StageError(f"cannot write there: {what}", where=where, hint=hint)
    return StageError(f"failed there: {what}", where=where)
