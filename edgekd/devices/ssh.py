"""The user's own OpenSSH client: requests to the program `agent.py` on a device, and what ssh's failures mean.

Keys, agents, ~/.ssh/config, jump hosts and known host keys are ssh's own matter: nothing is asked on the terminal
(BatchMode), and no host key is taken that ssh does not know. `EDGEKD_SSH` is a command line to use in place of `ssh`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from ..errors import MissingExtra, StageError, UsageError
from .agent import MARK
from .known import Device
from .trouble import of_device, of_ssh

__all__ = ["Link", "Lost", "ask", "connected", "follow"]

VARIABLE = "EDGEKD_SSH"
#: Given to ssh only where the user's configuration has nothing of the kind.
OPTIONS = {"connecttimeout": ("none", "ConnectTimeout=15"), "serveraliveinterval": ("0", "ServerAliveInterval=10")}
#: Nobody is there to be asked, and what an interactive session has is not wanted here.
QUIETLY = ("-o", "BatchMode=yes", "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes")
BLOCK = 1 << 16
#: Older interpreters cannot read the agent, so this is read before it.
PREFACE = """\
import sys
if sys.version_info < (3, 8):
    sys.stdout.write({mark!r} + '{{"error": "old python", "python": "%d.%d"}}\\n' % sys.version_info[:2])
    sys.exit(0)
if sys.path[:1] == ['']: del sys.path[0]
import json
space = {{"__name__": "edgekd_agent"}}
exec(compile({source!r}, "edgekd on the device", "exec"), space)
space["answer"](json.loads({request!r}), sys.stdin.buffer)
"""


class Lost(StageError):
    """The connection ended in the middle."""


@dataclass(frozen=True)
class Link:
    """How a device is reached: ssh's command line up to what is run there."""

    device: Device
    command: tuple[str, ...]


@contextlib.contextmanager
def connected(device: Device) -> Iterator[Link]:
    """A link that keeps one connection for all its requests, closed at the end. Raises UsageError, MissingExtra.

    Nothing is sent yet. A connection that the user's own configuration shares (ControlPath) is left to it.
    """
    ssh = _ssh()
    address = (*(("-p", str(device.port)) if device.port else ()), "--", device.host)
    resolved = _resolved((*ssh, "-G", *address))
    command = [*ssh, "-T", "-x", "-a", *QUIETLY]
    for key, (absent, option) in OPTIONS.items():
        if resolved.get(key, absent) == absent:
            command += ["-o", option]
    if resolved.get("controlpath", "none") != "none":
        yield Link(device, (*command, *address))
        return
    with tempfile.TemporaryDirectory(prefix="edgekd-", ignore_cleanup_errors=True) as directory:
        shared = ("-o", f"ControlPath={directory}/s")  # a socket's path may have 104 bytes
        master = ("-o", "ControlMaster=auto", "-o", "ControlPersist=60")
        try:
            yield Link(device, (*command, *shared, *master, *address))
        finally:
            if os.path.exists(f"{directory}/s"):
                subprocess.run([*ssh, *shared, "-O", "exit", *address], capture_output=True)


def ask(
    link: Link, do: str, files: Sequence[Path] = (), sent: Callable[[int], None] | None = None, **request: Any
) -> dict[str, Any]:
    """The device's last answer to one request. `files` go with it; `sent` hears how many bytes have gone so far.

    Raises StageError or MissingExtra with what is missing and how to get it, and Lost.
    """
    answer: dict[str, Any] = {}
    for answer in follow(link, do, files, sent, **request):  # noqa: B007
        pass
    return answer


def follow(
    link: Link, do: str, files: Sequence[Path] = (), sent: Callable[[int], None] | None = None, **request: Any
) -> Iterator[dict[str, Any]]:
    """Every answer as it comes; raises like `ask`."""
    device = link.device
    text = json.dumps({"do": do, "directory": device.directory, **request})
    script = PREFACE.format(mark=MARK, source=_agent(), request=text).encode()
    code = f"import sys; exec(getattr(sys.stdin, 'buffer', sys.stdin).read({len(script)}).decode())"
    remote = f"{_quoted(device.python)} -c {shlex.quote(code)}"
    with tempfile.TemporaryFile() as said:
        try:
            child = subprocess.Popen(
                [*link.command, remote], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=_environment()
            )
        except OSError as error:
            raise UsageError(f"{link.command[0]}: {error.strerror}", where=VARIABLE) from error
        assert child.stdin is not None
        assert child.stdout is not None
        unread: list[OSError] = []
        writer = threading.Thread(target=_write, args=(child.stdin, script, files, sent, unread), daemon=True)
        writer.start()
        begun = answered = False
        try:
            for line in child.stdout:
                _, found, rest = line.decode("utf-8", "replace").rpartition(MARK)
                if not found or not rest.endswith("\n"):  # a login script's words; a line that was cut off
                    continue
                reply = json.loads(rest)
                begun = True
                if "error" in reply:
                    raise of_device(device, reply)
                if "begun" not in reply:
                    answered = True
                    yield reply
        except BaseException:
            child.kill()
            raise
        finally:
            status = child.wait()
            child.stdout.close()
            writer.join()
            if unread:  # why the device then misses what it expects
                hint = "leave the files where they are until they have arrived, and run the same command again"
                what = f"cannot be read any more: {unread[0].strerror}"
                raise StageError(what, where=str(unread[0].filename), hint=hint) from unread[0]
        said.seek(0)
        if begun and (status == 255 or status < 0):
            hint = "run the same command again: what has arrived there is kept"
            raise Lost("the connection was lost", where=device.name, hint=hint)
        if status != 0 or not answered:
            raise of_ssh(device, status, said.read().decode("utf-8", "replace"))


def _write(
    stream: IO[bytes],
    script: bytes,
    files: Sequence[Path],
    sent: Callable[[int], None] | None,
    unread: list[OSError],
) -> None:
    """Send the script and the files, and close the stream; a file that cannot be read goes to `unread`."""
    total = 0
    with contextlib.suppress(BrokenPipeError, ValueError):  # the device has said why it takes no more
        try:
            stream.write(script)
            for path in files:
                with path.open("rb") as file:
                    while block := file.read(BLOCK):
                        stream.write(block)
                        total += len(block)
                        if sent is not None:
                            sent(total)
        except BrokenPipeError:
            raise
        except OSError as error:
            unread.append(error)
        finally:
            stream.close()


def _ssh() -> tuple[str, ...]:
    line = os.environ.get(VARIABLE)
    if line:
        try:
            return tuple(shlex.split(line))
        except ValueError as error:
            raise UsageError(f"not a command line: {error}", where=VARIABLE, hint="ssh -F FILE") from error
    found = shutil.which("ssh")
    if found is None:
        hint = "install it (Debian: openssh-client), or name another in EDGEKD_SSH"
        raise MissingExtra("no OpenSSH client", where="ssh", hint=hint)
    return (found,)


def _resolved(command: Sequence[str]) -> dict[str, str]:
    """What the user's configuration says of a host; nothing where the client cannot tell."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    except OSError:
        return {}
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}  # failures are told apart by their English words


def _quoted(path: str) -> str:
    """For the device's shell, with its home directory for ~/."""
    return '"$HOME"/' + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


@cache
def _agent() -> str:
    return Path(__file__).with_name("agent.py").read_text(encoding="utf-8")
