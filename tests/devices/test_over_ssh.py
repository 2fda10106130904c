"""`edgekd bench --host` from end to end: a real OpenSSH server, the real runner, ONNX Runtime on real digits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from loopback import Server
from onnx import numpy_helper
from processes import spawn
from small_bench import QUICK, there, variants

from edgekd.data import load
from edgekd.devices import Device
from edgekd.devices.ssh import ask, connected
from edgekd.recipe import load_recipe

Call = Callable[..., Any]


def begun(server: Server, rounds: int = 2) -> Path:
    """Wait until a run on the device has done some rounds; it is stopped then, until a signal lets it go on."""
    for _ in range(6000):
        for home in there(server):
            with contextlib.suppress(FileNotFoundError):
                if (home / ".log").read_text().count('"event": "round"') >= rounds:
                    signalled(home, signal.SIGSTOP)
                    return home
        time.sleep(0.05)
    raise AssertionError("nothing has begun")


def signalled(home: Path, number: signal.Signals) -> list[int]:
    """Send a signal to what runs in a bundle's directory: its processes."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if cwd.resolve() == home:
                found.append(int(cwd.parent.name))
                os.kill(found[-1], number)
    return found


@contextlib.contextmanager
def meanwhile(do: Callable[[], Any]) -> Iterator[None]:
    """Do something while the block runs; what it raises is raised at the end."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            do()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()
    if failed:
        raise failed[0]


def test_files_are_measured_on_a_device_and_nothing_stays_there(
    server: Server, work: Path, tmp_path: Path, edgekd: Call
) -> None:
    out = tmp_path / "results.json"
    names = ["fitted.onnx", "noisy.onnx"]
    done = edgekd("bench", *names, "--recipe", "recipe.toml", "--profile", "quick.toml", "--host", "device",
                  "-o", str(out), cwd=work)  # fmt: skip
    assert done.code == 0, done.err
    assert "quick · measured on" in done.out
    assert "copying" in done.err
    assert "device: fitted: outputs are right" in done.err
    found, document = variants(out), json.loads(out.read_text())
    data = load(load_recipe(work / "recipe.toml").data, 0)
    test, mean, std = data.test, *(np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (data.mean, data.std))
    images = ((test.images.numpy().astype(np.float32) / 255 - mean) / std).reshape(len(test), -1)
    for name in ("fitted", "noisy"):
        weights = numpy_helper.to_array(onnx.load(work / f"{name}.onnx").graph.initializer[0])
        right = (images @ weights).argmax(1) == test.labels.numpy()
        assert found[name]["metrics"]["accuracy"] == pytest.approx(right.mean(), abs=1e-9)
        assert found[name]["origin"] == "measured"
        assert found[name]["latency"]["p50"]["value"] > 0
        assert len(found[name]["latency"]["round_p50"]) >= 3
    assert found["fitted"]["metrics"]["accuracy"] > 0.8 > found["noisy"]["metrics"]["accuracy"]
    assert document["environment"]["host"] == "device"
    assert document["command"].startswith("edgekd bench fitted.onnx noisy.onnx")
    assert list(server.home.glob(".cache/edgekd")) == []
    # What reports and comparisons of measurements from here take, they take of a device.
    assert "fitted" in edgekd("report", str(out), "--format", "md").out
    assert edgekd("compare", str(out), str(out)).code == 0
    (tmp_path / "rules.toml").write_text("[gate]\nlatency = { p50 = { regress = 0.5 } }\naccuracy = { min = 0.9 }\n")
    judged = edgekd("gate", str(out), "--rules", str(tmp_path / "rules.toml"), "--baseline", str(out))
    assert judged.code == 1  # the last file is the noisy one
    assert sorted(line.split()[0] for line in judged.out.splitlines()[:2]) == ["FAIL", "pass"]
    files = edgekd("gate", str(out), "--rules", str(tmp_path / "rules.toml"), "--baseline", "fitted.onnx", cwd=work)
    assert files.code == 2
    assert "compared with a JSON" in files.err


@pytest.fixture(scope="module")
def small_run(work: Path) -> Path:
    """A run of a teacher and its export, as a process of its own."""
    done = spawn("run", "recipe.toml", cwd=work)
    assert done.code == 0, done.err
    return work / "runs" / "small"


def test_what_a_device_measured_of_a_run_is_in_its_report_and_its_gate(
    server: Server, work: Path, small_run: Path, edgekd: Call
) -> None:
    assert edgekd("devices", "add", "box", "device", "--profile", str(work / "slow.toml"), cwd=work).code == 0
    before = (small_run / "results.json").read_bytes()
    done = edgekd("bench", "runs/small", "--host", "box", "--json", cwd=work)
    assert done.code == 0, done.err
    assert json.loads(done.out)["profiles"][0]["profile"] == "slow"
    assert (small_run / "results.json").read_bytes() == before  # what was measured here stays what it is
    stored = small_run / "devices" / "slow.json"
    assert list(variants(stored)) == ["teacher"]
    markdown = edgekd("report", "runs/small", "--format", "md", cwd=work).out
    assert "quick" in markdown
    assert "slow" in markdown
    measured = variants(stored)["teacher"]["latency"]["p50"]["value"]
    for limit, code in ((measured * 2, 0), (measured / 2, 1)):
        (work / "rules.toml").write_text(f"[gate]\nlatency = {{ p50 = {{ max = {limit} }} }}\n")
        judged = edgekd("gate", "runs/small", "--rules", "rules.toml", "--profile", "slow.toml", cwd=work)
        assert judged.code == code, judged.out + judged.err
    # Measurements of files that the run has no more are not shown as its own.
    text = stored.read_text()
    stored.write_text(re.sub(r'"key": "[0-9a-f]+"', '"key": "0123"', text))
    assert "slow" not in edgekd("report", "runs/small", "--format", "md", cwd=work).out


SLOW = ["bench", "fitted.onnx", "--recipe", "recipe.toml", "--profile", "slow.toml", "--host", "device"]


def test_a_dropped_connection_does_not_end_the_run_and_the_same_command_picks_it_up(
    server: Server, work: Path, tmp_path: Path, edgekd: Call
) -> None:
    with meanwhile(lambda: (begun(server), server.cut())):
        lost = edgekd(*SLOW, cwd=work)
    assert lost.code == 3
    assert "the connection was lost" in lost.err
    assert "the same command picks it up" in lost.err
    [home] = there(server)
    log = (home / ".log").read_text()
    signalled(home, signal.SIGCONT)
    out = tmp_path / "results.json"
    again = edgekd(*SLOW, "-o", str(out), cwd=work)
    assert again.code == 0, again.err
    assert "runs on device already" in again.err or "has run on device meanwhile" in again.err
    assert "copying" not in again.err
    assert log.count('"event": "round"') < len(variants(out)["fitted"]["latency"]["round_p50"])
    assert there(server) == []


#: A shell's background jobs ignore SIGINT, and pass that on to the processes of a test run started so.
HEEDING = partial(signal.signal, signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_here_leaves_the_run_there(server: Server, work: Path, edgekd: Call) -> None:
    command = [sys.executable, "-m", "edgekd", *SLOW]
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True, preexec_fn=HEEDING) as stopped:
        home = begun(server)
        stopped.send_signal(signal.SIGINT)
        _, said = stopped.communicate()
    assert stopped.returncode == 130
    assert "the run goes on on device; the same command picks it up" in said
    signalled(home, signal.SIGCONT)
    for _ in range(6000):
        if (home / ".ended").exists():
            break
        time.sleep(0.05)
    again = edgekd(*SLOW, cwd=work)
    assert again.code == 0, again.err
    assert "this has run on device meanwhile: taking its results" in again.err
    assert there(server) == []


def test_two_do_not_measure_at_once(server: Server, work: Path, edgekd: Call) -> None:
    home = server.home / ".cache" / "edgekd" / "another"
    home.mkdir(parents=True)
    (home / "run.py").write_text("import time\ntime.sleep(600)\n")
    with connected(Device(name="device", host="device")) as link:
        assert ask(link, "start", key="another", command=["run.py"], who="me@laptop")["started"]
    busy = edgekd(*QUICK, cwd=work)
    assert busy.code == 3
    assert re.search(r"me@laptop measures there, begun \d+ s ago", busy.err)
    assert there(server) == []  # nothing was copied
    stop(home)
    assert edgekd(*QUICK, cwd=work).code == 0


def test_a_device_that_was_switched_off_goes_on_from_its_last_round(server: Server, work: Path, edgekd: Call) -> None:
    with meanwhile(lambda: stop(begun(server, 5))):
        died = edgekd(*SLOW, cwd=work)
    assert died.code == 3
    assert "the runner ended without a word" in died.err
    assert re.search(r"\n  round \d+ of 40: fitted ", died.err)  # its last words
    again = edgekd(*SLOW, cwd=work)
    assert again.code == 0, again.err
    assert "it goes on" in again.err
    assert re.search(r"going on after \d+ rounds of an earlier call", again.err)


def stop(home: Path) -> None:
    """Kill what runs in a bundle's directory, and wait until it is gone."""
    while signalled(home, signal.SIGKILL):
        time.sleep(0.05)


def test_what_is_kept_is_checked_by_its_hash_and_measured_anew(server: Server, work: Path, edgekd: Call) -> None:
    first = edgekd(*QUICK, "--keep", cwd=work)
    assert first.code == 0, first.err
    [home] = there(server)
    whole = (home / "fitted.onnx").read_bytes()
    (home / "fitted.onnx").write_bytes(whole[:-1] + b"\0")
    stamp = (home / "inputs.npz").stat().st_mtime_ns
    again = edgekd(*QUICK, "--keep", cwd=work)
    assert again.code == 0, again.err
    assert "copying 0.0 MB" in again.err  # the network alone
    assert (home / "fitted.onnx").read_bytes() == whole
    assert (home / "inputs.npz").stat().st_mtime_ns == stamp
    assert "goes on" not in again.err
    assert "warming up" in again.err
    [kept] = [line for line in edgekd("devices", "check", "device").out.splitlines() if line.split()[1] == "kept"]
    assert "1 bundles" in kept


def test_a_full_disk(server: Server, work: Path, edgekd: Call) -> None:
    login = (server.directory / "login").read_text()
    server.at_login(f"{login}\nulimit -f 20")  # blocks of 512 bytes in dash, of 1024 in bash
    full = edgekd(*QUICK, cwd=work)
    assert full.code == 3
    assert "its disk is full" in full.err
    assert "what has arrived is kept" in full.err
    assert not list(server.home.glob(".cache/edgekd/*/.*.part"))
    server.at_login(login)
    again = edgekd(*QUICK, cwd=work)
    assert again.code == 0, again.err

    with mounted(server.home / "tiny"):
        small = edgekd("devices", "add", "tiny", "device", "--directory", "~/tiny", cwd=work)
        small = edgekd(*QUICK[:-1], "tiny", cwd=work)
    assert small.code == 3
    assert "its disk is too full: 1 MB free in ~/tiny" in small.err
    assert "nothing was copied" in small.err


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[None]:
    """A disk of a megabyte; what comes after is skipped where this user may not mount one."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "edgekd-test", str(directory)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no small disk can be mounted here (the rest of this test has passed)")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


#: Only where files come behind the program that takes them.
FLIP = """\
import sys
data = bytearray(sys.stdin.buffer.read())
if len(data) > 40_000:
    data[-1] ^= 1
sys.stdout.buffer.write(data)
"""


def test_what_arrives_damaged_is_not_run(server: Server, work: Path, tmp_path: Path, edgekd: Call) -> None:
    """A byte changes on the way, as a broken memory does it: after ssh has checked it."""
    login = (server.directory / "login").read_text()
    flip = tmp_path / "flip.py"
    flip.write_text(FLIP)
    server.at_login(f'{login}\npython3 {flip} | sh -c "$SSH_ORIGINAL_COMMAND"\nexit')
    damaged = edgekd(*QUICK, cwd=work)
    assert damaged.code == 3
    assert "arrived damaged: " in damaged.err
    server.at_login(login)
    assert edgekd(*QUICK, cwd=work).code == 0


def test_another_architecture_is_told_before_and_gives_no_time(
    server: Server, work: Path, tmp_path: Path, edgekd: Call
) -> None:
    other = "aarch64" if os.uname().machine == "x86_64" else "x86-64"
    text = (
        (work / "quick.toml")
        .read_text()
        .replace('extends = "cpu-x86"', f'extends = "cpu-x86"\narchitecture = "{other}"')
    )
    (tmp_path / "other.toml").write_text(text)
    out = tmp_path / "results.json"
    done = edgekd(*QUICK[:4], "--profile", str(tmp_path / "other.toml"), "--host", "device", "-o", str(out), cwd=work)
    assert done.code == 0, done.err
    assert f"warning: other is {other}, the device is " in done.err
    assert variants(out)["fitted"]["latency"] is None
    assert json.loads(out.read_text())["profiles"][0]["elsewhere"]
