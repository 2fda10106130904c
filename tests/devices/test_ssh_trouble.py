"""What goes wrong between here and a device, with a real OpenSSH client and server: one message each, and its mend."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from loopback import Server

from edgekd.devices import Device, agent
from edgekd.devices.check import check_device, trtexec_version
from edgekd.devices.remote import greet
from edgekd.devices.ssh import ask, connected, follow
from edgekd.errors import EdgekdError, MissingExtra, StageError, UsageError
from edgekd.profile import load_profile

Call = Callable[..., Any]
DEVICE = Device(name="device", host="device")


def refused(device: Device = DEVICE) -> EdgekdError:
    with pytest.raises(EdgekdError) as raised, connected(device) as link:
        greet(link, load_profile("cpu-x86"))
    assert raised.value.exit_code == 3
    assert raised.value.problem.hint
    return raised.value


def test_a_device_answers_through_the_users_own_configuration(server: Server) -> None:
    with connected(DEVICE) as link:
        assert greet(link, load_profile("cpu-x86"))["machine"] == os.uname().machine
        control = next(part for part in link.command if part.startswith("ControlPath="))
        socket = Path(control.partition("=")[2])
        assert socket.is_socket()  # the next request takes the same connection
        before = len((server.directory / "sshd.log").read_text().split("Accepted publickey"))
        ask(link, "hello")
        assert len((server.directory / "sshd.log").read_text().split("Accepted publickey")) == before
    assert not socket.exists()
    for _ in range(6000):
        if not server.sessions():
            break
        time.sleep(0.05)
    assert server.sessions() == []  # and the connection with it
    with connected(Device(name="inner", host="inner")) as link:  # its configuration has a jump host
        assert ask(link, "hello")["directory"] == str(server.home / ".cache" / "edgekd")
    with connected(Device(name="port", host="127.0.0.1", port=1)) as link, pytest.raises(StageError, match="refused"):
        ask(link, "hello")


def test_a_connection_that_the_user_shares_is_left_to_the_user(server: Server, tmp_path: Path) -> None:
    config = server.directory / "config-shared"
    text = Path(server.ssh().split()[-1]).read_text()
    config.write_text(f"Host *\n ControlMaster auto\n ControlPersist 20\n ControlPath {tmp_path}/cm\n{text}")
    ssh = ["ssh", "-F", str(config)]
    os.environ["EDGEKD_SSH"] = " ".join(ssh)  # restored by the fixture's monkeypatch
    with connected(DEVICE) as link:
        assert not [part for part in link.command if "ControlPath" in part]
        ask(link, "hello")
    assert (tmp_path / "cm").is_socket()
    subprocess.run([*ssh, "-O", "exit", "device"], capture_output=True, check=True)


@pytest.mark.parametrize(
    ("key", "known", "said", "hint"),
    [
        ("stranger", "known_hosts", "no key that it takes: ", "ssh-copy-id"),
        ("user", "no_hosts", "its host key is not known here", "compare it: ssh device"),
        ("user", "changed_hosts", "its host key is another than before", "ssh-keygen -R"),
    ],
)
def test_keys_that_are_wrong(
    key: str, known: str, said: str, hint: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKD_SSH", server.ssh(key, known))
    error = refused()
    assert error.problem.what.startswith(said)
    assert hint in str(error.problem.hint)
    assert not (server.directory / "no_hosts").exists()  # nothing was accepted on the user's behalf
    assert list(server.home.iterdir()) == []


def test_hosts_that_are_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such host" in refused(Device(name="gone", host="gone.invalid")).problem.what
    assert "nothing answers there" in refused(Device(name="x", host="127.0.0.1", port=1)).problem.what
    monkeypatch.setenv("EDGEKD_SSH", "no-such-ssh -v")
    with pytest.raises(UsageError, match="no-such-ssh"), connected(DEVICE) as link:
        ask(link, "hello")
    monkeypatch.delenv("EDGEKD_SSH")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingExtra, match="no OpenSSH client"), connected(DEVICE):
        pass


def test_login_scripts_that_talk_are_not_taken_for_answers(server: Server) -> None:
    login = (server.directory / "login").read_text()
    server.at_login(login + '\necho Welcome; echo \'{"error": "ENOSPC"}\'; echo and more >&2')
    with connected(DEVICE) as link:
        assert ask(link, "hello")["numpy"]


def wrapper(directory: Path, text: str) -> Device:
    """A device whose interpreter is a script."""
    script = directory / "wrapped python"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return Device(name="device", host="device", python=str(script))


def test_interpreters_that_will_not_do(server: Server, tmp_path: Path) -> None:
    error = refused(Device(name="device", host="device", python="no-such-python"))
    assert "no no-such-python there" in error.problem.what
    assert "--python" in str(error.problem.hint)
    # Ubuntu 18.04, and so JetPack 4, has Python 3.6.9.
    pretend = 'import sys; sys.version_info = (3, 6, 9, "final", 0); exec(sys.argv[1])'
    error = refused(wrapper(tmp_path, f"exec {sys.executable} -c '{pretend}' \"$2\""))
    assert "is Python 3.6, edgekd needs 3.8 or newer" in error.problem.what
    error = refused(wrapper(tmp_path, f'exec {sys.executable} -S "$@"'))  # without site-packages
    assert "has no NumPy" in error.problem.what
    only_numpy = tmp_path / "only-numpy"
    only_numpy.mkdir()
    for found in Path(numpy.__file__).parents[1].glob("numpy*"):
        (only_numpy / found.name).symlink_to(found)
    error = refused(wrapper(tmp_path, f'PYTHONPATH={only_numpy} exec {sys.executable} -S "$@"'))
    assert "cpu-x86 runs on onnxruntime" in error.problem.what
    assert "none of onnxruntime, tensorrt, trtexec" in error.problem.what
    assert "pip install onnxruntime" in str(error.problem.hint)


def test_the_interpreter_may_lie_below_the_home_directory_there(server: Server) -> None:
    (server.home / "a b").mkdir()
    (server.home / "a b" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (server.home / "a b" / "python").chmod(0o755)
    with connected(Device(name="device", host="device", python="~/a b/python")) as link:
        assert ask(link, "hello")["numpy"]
    sly = Device(name="device", host="device", python="python3; touch injected")
    with connected(sly) as link, pytest.raises(MissingExtra):
        ask(link, "hello")
    assert not (server.home / "injected").exists()


def test_a_directory_that_is_not_writable(server: Server) -> None:
    device = Device(name="device", host="device", directory="/sys/edgekd")  # where root may not make files either
    with connected(device) as link, pytest.raises(StageError, match="cannot write there: /sys/edgekd"):
        ask(link, "receive", key="k", contents=[])
    [found] = [c for c in check_device(device, None) if c.name == "directory"]
    assert found.status == "failed"
    assert "--directory" in str(found.hint)


def test_a_connection_that_ends_while_the_device_works(server: Server) -> None:
    """The agent notices, too: it does not go on for nobody."""
    home = server.home / ".cache" / "edgekd" / "k"
    home.mkdir(parents=True)
    (home / "run.py").write_text("import time\nprint('{}', flush=True)\ntime.sleep(60)\n")
    with connected(DEVICE) as link:
        assert ask(link, "start", key="k", command=["run.py"], who="me")["started"]
        with pytest.raises(StageError, match="the connection was lost"):
            [server.cut() for _ in follow(link, "follow", key="k")]
    with connected(DEVICE) as link:
        seen = ask(link, "look", key="k", contents={})
        assert seen["state"] == "running"
        assert seen["holder"]["who"] == "me"
        assert all(os.getsid(process) not in (0, os.getsid(0)) for process in working_in(home))
        assert any(os.getsid(process) == process for process in working_in(home))  # a session of its own
        assert not ask(link, "start", key="k", command=["run.py"], who="you")["started"]
        stop(home)
        for _ in range(6000):
            if ask(link, "look", key="k", contents={})["state"] != "running":
                break
            time.sleep(0.05)
        assert ask(link, "look", key="k", contents={})["state"] == "died"


def test_a_file_that_vanishes_while_it_is_sent_is_one_message(server: Server, tmp_path: Path) -> None:
    first, gone = tmp_path / "first", tmp_path / "gone"
    first.write_bytes(b"a")
    contents = [("first", 1, hashlib.sha256(b"a").hexdigest()), ("gone", 5, "0" * 64)]
    with connected(DEVICE) as link, pytest.raises(StageError, match="cannot be read any more") as raised:
        ask(link, "receive", [first, gone], key="k", contents=contents)
    assert raised.value.problem.where == str(gone)
    assert "run the same command again" in str(raised.value.problem.hint)
    assert [path.name for path in (server.home / ".cache" / "edgekd" / "k").iterdir()] == ["first"]


def test_the_lock_tells_of_nobody_who_is_gone(server: Server) -> None:
    """Whoever takes the lock for an instant is not taken for the runner that had it before."""
    root = server.home / ".cache" / "edgekd"
    home = root / "k"
    home.mkdir(parents=True)
    (home / "run.py").write_text("")
    with connected(DEVICE) as link:
        assert ask(link, "start", key="k", command=["run.py"], who="me")["started"]
        assert ask(link, "follow", key="k")["state"] == "ended"
    assert (root / "lock").read_text() == ""
    (root / "lock").write_text(json.dumps({"key": "k", "who": "killed", "since": 0.0}))  # by one who was killed
    held = agent._hold(str(root))
    assert held is not None
    assert agent._state(str(root), str(home), "k") == "ended"
    os.close(held)


def working_in(home: Path) -> list[int]:
    """The processes whose directory is a bundle's."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if cwd.resolve() == home:
                found.append(int(cwd.parent.name))
    return found


def stop(home: Path) -> None:
    """Kill what runs there, as a device does that is switched off."""
    for process in working_in(home):
        os.kill(process, 9)


def test_the_check_of_a_device(server: Server, tmp_path: Path, edgekd: Call) -> None:
    done = edgekd("devices", "check", "device", "--profile", "cpu-x86", "--json")
    document = json.loads(done.out)
    checks = {c["name"]: c for c in document["checks"]}
    assert done.code == 0
    assert document["ready"]
    assert checks["numpy"]["found"] == numpy.__version__
    assert checks["onnxruntime"]["status"] == "ok"
    assert checks["tensorrt"]["status"] == "note"
    assert os.uname().machine in checks["processor"]["found"]
    assert checks["cpu-x86"]["status"] == "ok"
    assert list(server.home.glob(".cache/edgekd")) == []  # it leaves nothing behind
    other = edgekd("devices", "check", "device", "--profile", "jetson-orin-nano-8gb")
    assert other.code == 3
    assert "is aarch64" in other.out
    assert "runs on tensorrt, which is not there" in other.out
    gone = edgekd("devices", "check", "me@gone.invalid")
    assert gone.code == 3
    assert gone.out.startswith("failed   reach  no such host")


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        # First lines in public logs; the one of 10.3 is in https://github.com/NVIDIA/TensorRT/issues/4494.
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --help\n=== Model Options ===", "8.6.1"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --int8", "10.3.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100500] [b18] # trtexec --help", "10.5.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9]", "10.13.3"),
        ("trtexec: error while loading shared libraries", None),
    ],
)
def test_versions_of_trtexec(banner: str, version: str | None) -> None:
    assert trtexec_version(banner) == version


def test_what_is_sent_to_a_device_is_python_3_8() -> None:
    source = Path(agent.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))
    imported = {
        a.name.partition(".")[0] for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names
    }
    assert imported <= set(sys.stdlib_module_names)
