"""`edgekd bench --host` from end to end: a real OpenSSH server, the real runner, ONNX Runtime on real digits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from loopback import Server
from onnx import TensorProto, helper, numpy_helper

from edgekd.bundle import make_bundle
from edgekd.bundle.packing import packed
from edgekd.data import load
from edgekd.data.digits import digits
from edgekd.devices import Device
from edgekd.devices.ssh import ask, connected
from edgekd.profile import load_profile
from edgekd.recipe import load_recipe

Call = Callable[..., Any]
RECIPE = """\
version = 1
name = "small"
data = { use = "digits", size = 16, batch = 128 }
profiles = ["quick.toml"]
[teacher]
model = { use = "cifar-resnet", depth = 8, width = 4 }
epochs = 1
[[stage]]
use = "export"
[gate]
size_mb = { max = 1.0 }
"""
PROFILE = """\
extends = "cpu-x86"
[protocol]
rounds = {rounds}
precision = 10.0
block_s = {block}
warmup_s = 0.01
cap_s = 20.0
batches = [1]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe, profiles, and two linear classifiers of digits: fitted, and the same with noise."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "recipe.toml").write_text(RECIPE)
    (directory / "quick.toml").write_text(PROFILE.format(rounds=3, block=0.01))
    (directory / "slow.toml").write_text(PROFILE.format(rounds=40, block=0.05))
    data = digits(16)
    images = (data.train.images.numpy().reshape(len(data.train), -1) / 255 - 0.5) / 0.25
    answers = np.eye(10)[data.train.labels.numpy()]
    weights = np.linalg.lstsq(images, answers, rcond=1e-3)[0].astype(np.float32)
    noise = np.random.default_rng(0).normal(0, weights.std(), weights.shape).astype(np.float32)
    for name, values in (("fitted", weights), ("noisy", weights + 2 * noise)):
        graph = helper.make_graph(
            [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])],
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
            [numpy_helper.from_array(values, "w")],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
                  directory / f"{name}.onnx")  # fmt: skip
    return directory


def there(server: Server) -> list[Path]:
    """The bundles that lie on the device."""
    return [path.parent for path in server.home.glob(".cache/edgekd/*/bundle.json")]


def begun(server: Server, rounds: int = 2) -> Path:
    """Wait until a run on the device has done some rounds."""
    for _ in range(6000):
        for home in there(server):
            with contextlib.suppress(FileNotFoundError):
                if (home / ".log").read_text().count('"event": "round"') >= rounds:
                    return home
        time.sleep(0.05)
    raise AssertionError("nothing has begun")


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


def variants(file: Path) -> dict[str, Any]:
    document = json.loads(file.read_text())
    (profile,) = document["profiles"]
    return {v["name"]: v for v in profile["variants"]}


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
    command = [sys.executable, "-m", "edgekd", "run", "recipe.toml"]
    subprocess.run(command, cwd=work, check=True, capture_output=True)
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


QUICK = ["bench", "fitted.onnx", "--recipe", "recipe.toml", "--profile", "quick.toml", "--host", "device"]
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
    out = tmp_path / "results.json"
    again = edgekd(*SLOW, "-o", str(out), cwd=work)
    assert again.code == 0, again.err
    assert "runs on device already" in again.err or "has run on device meanwhile" in again.err
    assert "copying" not in again.err
    assert log.count('"event": "round"') < len(variants(out)["fitted"]["latency"]["round_p50"])
    assert there(server) == []


def test_an_interrupt_here_leaves_the_run_there(server: Server, work: Path, edgekd: Call) -> None:
    command = [sys.executable, "-m", "edgekd", *SLOW]
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True) as stopped:
        begun(server)
        stopped.send_signal(signal.SIGINT)
        _, said = stopped.communicate()
    assert stopped.returncode == 130
    assert "the run goes on on device; the same command picks it up" in said
    for _ in range(6000):
        if (there(server)[0] / ".ended").exists():
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
    """Kill what runs in a bundle's directory."""
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if cwd.resolve() == home:
                os.kill(int(cwd.parent.name), 9)


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


@pytest.fixture
def bundle(work: Path, tmp_path: Path) -> Path:
    """A bundle whose runner tests replace."""
    return make_bundle([work / "fitted.onnx"], tmp_path / "own", load_profile(str(work / "quick.toml")), None)


def with_runner(bundle: Path, text: str) -> None:
    """Another run.py, as the manifest says."""
    (bundle / "run.py").write_text(text)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"]["run.py"] = [hashlib.sha256(text.encode()).hexdigest(), len(text.encode())]
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def test_a_bundle_that_is_damaged_here_is_not_sent(server: Server, bundle: Path, edgekd: Call) -> None:
    (bundle / "fitted.onnx").write_bytes((bundle / "fitted.onnx").read_bytes()[:-1] + b"\0")
    damaged = edgekd("bench", str(bundle), "--host", "device")
    assert damaged.code == 3
    assert "fitted.onnx is corrupted" in damaged.err
    (bundle / "bundle.json").write_text("{")
    assert "the manifest is damaged" in edgekd("bench", str(bundle), "--host", "device").err
    assert there(server) == []


def test_a_runner_that_fails_is_quoted_and_the_next_call_begins_anew(
    server: Server, bundle: Path, edgekd: Call
) -> None:
    with_runner(bundle, "import sys\nprint('no such \\33[31mkernel')\nsys.exit('and no hope')\n")
    for _ in range(2):
        failed = edgekd("bench", str(bundle), "--host", "device")
        assert failed.code == 3
        assert "the runner failed with status 1" in failed.err
        assert "no such [31mkernel" in failed.err  # without what would steer the terminal
        assert "and no hope" in failed.err
        assert "has run on device meanwhile" not in failed.err


def test_results_of_another_bundle_are_not_taken(server: Server, bundle: Path, edgekd: Call) -> None:
    done = edgekd("bench", str(bundle), "--host", "device", "--keep")
    assert done.code == 0, done.err
    [home] = there(server)
    other = (home / "results.json").read_text().replace('"bundle":"', '"bundle":"0')
    with_runner(bundle, f"open('results.json', 'w').write({other!r})\n")
    refused = edgekd("bench", str(bundle), "--host", "device")
    assert refused.code == 3
    assert "the results of another bundle" in refused.err
    assert len(there(server)) == 2  # what it wrote is still there


def test_one_network_of_several_that_is_wrong_leaves_the_others_their_figures(
    server: Server, work: Path, tmp_path: Path, edgekd: Call
) -> None:
    bundle = make_bundle(
        [work / "fitted.onnx", work / "noisy.onnx"], tmp_path / "two", load_profile(str(work / "quick.toml")), None
    )
    expected = dict(np.load(bundle / "expected.npz"))
    np.savez(bundle / "expected.npz", **{**expected, "noisy.y": expected["noisy.y"] * 3})
    manifest = json.loads((bundle / "bundle.json").read_text())
    content = (bundle / "expected.npz").read_bytes()
    manifest["files"]["expected.npz"] = [hashlib.sha256(content).hexdigest(), len(content)]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    out = tmp_path / "results.json"
    done = edgekd("bench", str(bundle), "--host", "device", "-o", str(out))
    assert done.code == 3
    assert "error: noisy did not run there" in done.err
    assert "outputs differ from ONNX Runtime's" in done.err
    found = variants(out)
    assert found["noisy"]["latency"] is None
    assert found["fitted"]["latency"]["p50"]["value"] > 0
    assert there(server) == []


def test_a_bundle_brings_its_profile(server: Server, bundle: Path, edgekd: Call) -> None:
    wrong = edgekd("bench", str(bundle), "--host", "device", "--profile", "cpu-x86")
    assert wrong.code == 2
    assert "was made for quick" in wrong.err
    for ending in (".tar.gz", ".tar.zst"):
        archive = bundle.with_name(f"packed{ending}")
        packed(bundle, "packed", archive)
        wrong = edgekd("bench", str(archive), "--host", "device", "--profile", "cpu-x86")
        assert "was made for quick" in wrong.err
        archive.write_bytes(archive.read_bytes()[:2000])
        damaged = edgekd("bench", str(archive), "--host", "device")
        assert damaged.code == 3
        assert "damaged: " in damaged.err
    none = edgekd("bench", "x.onnx", "--host", "device")
    assert none.code == 2
    assert "is measured as one profile, got none" in none.err
    assert edgekd("bench", "x.onnx", "--keep").code == 2


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
