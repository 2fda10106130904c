"""A real OpenSSH server on 127.0.0.1, with keys, configuration and log of its own, and a client that knows it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
#: Root's sshd wants it; distributions make it when they start theirs.
SEPARATION = Path("/run/sshd")


class Server(NamedTuple):
    """`home` is the home directory on the "device"; `login` is sourced there before each command, by `sh`."""

    directory: Path
    port: int
    process: int

    @property
    def home(self) -> Path:
        return self.directory / "device"

    def ssh(self, key: str = "user", known: str = "known_hosts") -> str:
        """What EDGEKD_SSH is set to: the configuration of a user whose host is `device`."""
        config = self.directory / f"config-{key}-{known}"
        lines = [
            "Host inner\n ProxyJump device",
            f"Host device inner\n HostName 127.0.0.1\n Port {self.port}\n IdentityFile {self.directory / key}",
            f" IdentitiesOnly yes\n IdentityAgent none\n UserKnownHostsFile {self.directory / known}",
            " GlobalKnownHostsFile /dev/null",
            # What a command for people has in its configuration, and a program must not trip over.
            " RemoteCommand uptime\n RequestTTY force\n LocalForward 1 localhost:1\n ExitOnForwardFailure yes\n",
        ]
        config.write_text("\n".join(lines))
        return f"ssh -F {shlex.quote(str(config))}"

    def at_login(self, script: str) -> None:
        (self.directory / "login").write_text(script + "\n")

    def sessions(self) -> list[int]:
        """The server's processes, one or two a connection."""
        found, parents = [self.process], {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:
                continue
            name = text[text.index("(") + 1 : text.rindex(")")]
            parents[int(stat.parent.name)] = (int(text.rpartition(")")[2].split()[1]), name)
        for child, (parent, name) in sorted(parents.items()):
            if parent in found and name.startswith("sshd"):
                found.append(child)
        return found[1:]

    def cut(self) -> None:
        """Drop every connection, as a network that is gone."""
        for process in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """Run sshd while the block lasts; skips the test, with the reason, where there is none."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no OpenSSH here (Debian: apt install openssh-server openssh-client)")
    if os.getuid() == 0 and not SEPARATION.is_dir():
        SEPARATION.mkdir(mode=0o755)
    for name in ("host", "other_host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    (directory / "device").mkdir()
    (directory / "login").touch()
    force = directory / "force"
    # What sshd gives a command: the login shell runs it, here with another home directory.
    force.write_text(
        f'export HOME={directory}/device\ncd\n. {directory}/login\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    shutil.copy(directory / "user.pub", directory / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": directory / "host",
        "PidFile": "none",
        "AuthorizedKeysFile": directory / "authorized_keys",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "UsePAM": "no",
        "StrictModes": "no",
        "LogLevel": "VERBOSE",
        "ForceCommand": f"/bin/sh {force}",
    }
    (directory / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    for known, host in (("known_hosts", "host"), ("changed_hosts", "other_host")):
        key = " ".join((directory / f"{host}.pub").read_text().split()[:2])
        (directory / known).write_text(f"[127.0.0.1]:{port} {key}\n")
    log = directory / "sshd.log"
    command = [SSHD, "-D", "-f", str(directory / "sshd_config"), "-E", str(log)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    server = Server(directory, port, process.pid)
    try:
        _wait(server, process, log)
        yield server
    finally:
        server.cut()
        process.terminate()
        process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            pytest.skip(f"sshd does not run here: {log.read_text().strip()}")
        try:
            socket.create_connection(("127.0.0.1", server.port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())
