"""What a user can get wrong or a disk can do, through the command line.

Each case: the right exit code, one message with place, expectation and hint, no traceback, and nothing lost of what
was computed before.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import environ, spawn

from edgekd.artifact import Artifact, locked

Call = Callable[..., Any]

SMALL = """\
version = 1
name = "small"
data = { use = "npz", file = "data.npz", batch = 8 }
profiles = ["profile.toml"]
[teacher]
model = { use = "cifar-resnet", depth = 8, width = 4 }
epochs = 1
[[stage]]
use = "distill"
model = { use = "cifar-resnet", depth = 8, width = 4 }
epochs = 1
"""


def arrays(path: Path, train: list[int], test: list[int], **more: Any) -> None:
    """An .npz of random 8x8 pictures with these labels."""
    rng = np.random.default_rng(0)
    splits = {
        "x_train": rng.integers(0, 256, (len(train), 8, 8, 3), np.uint8),
        "y_train": np.array(train, np.int64),
        "x_test": rng.integers(0, 256, (len(test), 8, 8, 3), np.uint8),
        "y_test": np.array(test, np.int64),
    }
    np.savez(path, **{**splits, **more})


@pytest.fixture
def small(tmp_path: Path, project: Path) -> Path:
    """A directory with a recipe on 40 random pictures of two classes."""
    shutil.copy(project / "profile.toml", tmp_path)
    (tmp_path / "recipe.toml").write_text(SMALL)
    arrays(tmp_path / "data.npz", [0, 1] * 20, [0, 1] * 5)
    return tmp_path


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("bad_input_own", None)


def refused(done: Any, code: int, where: str, what: str, hint: str) -> None:
    """One message on stderr, nothing on stdout."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    for part in (where, what, hint):
        assert part in done.err, done.err
    problems = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(problems) == 1, done.err
    assert "hint: " in done.err


RECIPES: dict[str, tuple[list[str], str, str, str]] = {
    "unknown key": (["--set", "sed=1"], "sed", "unknown key", "did you mean 'seed'?"),
    "unknown key of a stage": (
        ["--set", "stage.distill.epoch=1"],
        *("stage[0].epoch", "unknown key", "did you mean 'epochs'?"),
    ),
    "unknown key of a model": (
        ["--set", "teacher.model.widht=1"],
        *("teacher.model.widht", "unknown key", "did you mean 'width'?"),
    ),
    "unknown key of an objective": (
        ["--set", 'stage.distill.objectives=[{use="kl", temperature=2}]'],
        *("stage[0].objectives[0].temperature", "unknown key", "tau"),
    ),
    "unknown model": (
        ["--set", "teacher.model.use=cifar-resnt"],
        *("teacher.model", "no models called 'cifar-resnt'", "did you mean 'cifar-resnet'?"),
    ),
    "unknown stage": (["--set", "stage.0.use=distil"], "stage[0]", "no stages called", "did you mean 'distill'?"),
    "wrong type": (
        ["--set", "stage.distill.epochs=many"],
        *("stage[0].epochs", "valid integer", "how often all training images are seen"),
    ),
    "out of range": (
        ["--set", "stage.distill.lr=-1"],
        *("stage[0].lr", "greater than 0, got -1", "peak learning rate"),
    ),
    "missing data file": (["--set", "data.file=none.npz"], "none.npz", "no such file", "data.file is relative to here"),
    "missing weights": (
        ["--set", "teacher.weights=none.safetensors"],
        *("teacher.weights", "no such weights file", "working directory"),
    ),
    "missing profile": (
        ["--set", 'profiles=["none.toml"]'],
        "profiles[0]",
        "no such file: 'none.toml'",
        "profiles list",
    ),
    "missing plugin": (["--set", 'plugins=["none.py"]'], "plugins", "no plugin file none.py", "working directory"),
    "stages in an impossible order": (
        ["--set", 'stage=[{use="export"}, {use="quantize"}]'],
        *("stage[1]", "quantize cannot follow export", "quantize may follow teacher, distill, prune"),
    ),
    "a rule on nothing": (
        ["--set", "gate.acuracy.min=0.9"],
        *("gate.acuracy", "no metric", "did you mean 'accuracy'?"),
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(small: Path, edgekd: Call, case: str) -> None:
    arguments, where, what, hint = RECIPES[case]
    refused(edgekd("run", "recipe.toml", *arguments, cwd=small), 2, where, what, hint)
    assert not (small / "runs").exists()


def test_all_problems_of_a_recipe_come_at_once(small: Path, edgekd: Call) -> None:
    done = edgekd("check", "recipe.toml", "--set", "stage.distill.epoch=1", "--set", "teacher.lr=0", cwd=small)
    refused(done, 2, "stage[0].epoch: unknown key", "teacher.lr", "did you mean 'epochs'?")
    assert "error: 2 problems" in done.err


def test_files_that_are_no_recipe(small: Path, edgekd: Call) -> None:
    refused(edgekd("run", "none.toml", cwd=small), 2, "recipe", "no recipe none.toml", "edgekd init")
    (small / "broken.toml").write_text("version = 1\nname = broken\n")
    refused(edgekd("run", "broken.toml", cwd=small), 2, "broken.toml", "at line 2", "texts need quotes")
    (small / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused(edgekd("run", "binary.toml", cwd=small), 2, "binary.toml", "not valid TOML", "texts need quotes")


@pytest.mark.parametrize(
    ("train", "test", "more", "what", "hint"),
    [
        ([], [0, 1], {}, "the train split is empty", "put images into train"),
        ([0, 1] * 4, [], {}, "the test split is empty", "put images into test"),
        ([0, 0, 1, 1], [0, 2], {}, "the test split has the class '2', which training never saw", "add training images"),
        ([0, 1, -5, 0], [0, 1], {}, "train label -5 of image 2", "labels number the 2 classes"),
        ([0, 1], [0, 1], {"y_train": np.array([0, 1, 1])}, "2 images and 3 labels", "one label per image"),
    ],
)  # fmt: skip
def test_data(
    small: Path, edgekd: Call, train: list[int], test: list[int], more: dict[str, Any], what: str, hint: str
) -> None:
    arrays(small / "data.npz", train, test, **more)
    refused(edgekd("run", "recipe.toml", cwd=small), 2, "data (npz)", what, hint)


def test_a_truncated_data_file(small: Path, edgekd: Call) -> None:
    file = small / "data.npz"
    file.write_bytes(file.read_bytes()[:-200])
    refused(edgekd("run", "recipe.toml", cwd=small), 2, "data.npz", "damaged", "np.savez")


OWN = """\
import torch
from torch import nn

def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
def grey(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))
def broken(): raise RuntimeError("no such file: pretrained.bin")
def nothing(): return None
"""


@pytest.mark.parametrize(
    ("network", "what"),
    [
        ("seven", "[2, 7]"),
        ("grey", "fails on images [2, 3, 8, 8]"),
        ("broken", "RuntimeError: no such file: pretrained.bin"),
        ("nothing", "returned NoneType"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_network_that_does_not_fit(small: Path, edgekd: Call, network: str, what: str) -> None:
    (small / "bad_input_own.py").write_text(OWN)
    for place, override in (("stage[0].model", "stage.distill.model"), ("teacher.model", "teacher.model")):
        done = edgekd("run", "recipe.toml", "--set", f'{override}={{use="bad_input_own:{network}"}}', cwd=small)
        assert (done.code, done.out) == (2, ""), done.err
        assert "Traceback" not in done.err
        assert place in done.err
        assert what in done.err
        assert "2 problems" not in done.err  # what follows from it is not told again


def test_a_student_whose_outputs_do_not_fit_the_teachers(small: Path, finished: Any, edgekd: Call) -> None:
    """A teacher of ten classes of digits for two classes of pictures."""
    run = finished.copy(small / "digits")
    student = ["--student", "cifar-resnet", "--set", "model.depth=8", "--data", "npz", "--set", "data.file=data.npz"]
    done = edgekd("distill", "--teacher", f"{run}:teacher", *student, cwd=small)
    refused(done, 2, "00-teacher", "made for 10 classes (0, 1, 2, ...), the data have 2", "the same classes")


def test_features_that_do_not_exist(small: Path, edgekd: Call) -> None:
    hint = 'stage.distill.objectives=["ce", {use="hint", student="layer9", teacher="layer1"}]'
    done = edgekd("run", "recipe.toml", "--set", hint, cwd=small)
    refused(done, 2, "stage[0].objectives[1].student", "no module 'layer9'", "did you mean")


def weights(file: Path, classes: int = 2, width: int = 4) -> None:
    from safetensors.torch import save_file

    from edgekd.models import build, specify

    spec = specify("cifar-resnet", {"depth": 8, "width": width}, classes=classes, size=[3, 8, 8], where="")
    save_file(build(spec).state_dict(), file)


def test_weights_that_do_not_fit(small: Path, edgekd: Call) -> None:
    weights(small / "ten.safetensors", classes=10)
    done = edgekd("run", "recipe.toml", "--set", "teacher.weights=ten.safetensors", cwd=small)
    refused(done, 2, "ten.safetensors (teacher.weights)", "found [10, ", "number of classes")
    weights(small / "wide.safetensors", width=8)
    done = edgekd("run", "recipe.toml", "--set", "teacher.weights=wide.safetensors", cwd=small)
    refused(done, 2, "wide.safetensors (teacher.weights)", "wrong shape", "depth, width, number of classes")
    torch.save({"net": object}, small / "objects.pt")
    done = edgekd("run", "recipe.toml", "--set", "teacher.weights=objects.pt", cwd=small)
    refused(done, 2, "objects.pt (teacher.weights)", "", "")


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_weights(small: Path, edgekd: Call, size: int) -> None:
    file = small / "cut.safetensors"
    weights(file)
    file.write_bytes(file.read_bytes()[:size])
    done = edgekd("run", "recipe.toml", "--set", "teacher.weights=cut.safetensors", cwd=small)
    refused(done, 2, "cut.safetensors (teacher.weights)", "truncated or corrupted", "copy it again")


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_truncated_onnx_files(finished: Any, tmp_path: Path, edgekd: Call, size: int) -> None:
    file = tmp_path / "cut.onnx"
    file.write_bytes(next(finished.directory.glob("04-export-*/model.onnx")).read_bytes()[:size])
    rules = tmp_path / "rules.toml"
    rules.write_text("size_mb = { max = 1 }\n")
    for command in (["bench", str(file)], ["show", str(file)], ["gate", str(file), "--rules", str(rules)]):
        done = edgekd(*command, "--profile", "profile.toml") if command[0] != "show" else edgekd(*command)
        refused(done, 2, str(file), "", "export it again")


def test_no_onnx_file(tmp_path: Path, edgekd: Call) -> None:
    for command in ("bench", "show"):
        refused(edgekd(command, str(tmp_path / "none.onnx")), 2, "none.onnx", "No such file", "")


def files(run: Path) -> dict[str, tuple[int, int]]:
    """Every file of a run's artifacts with its size and time."""
    return {
        str(p.relative_to(run)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(run.glob("[0-9]*/*"))
        if p.is_file()
    }


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        ("01-distill-*/model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "sha256 does not match"),
        ("01-distill-*/model.safetensors", lambda b: b[: len(b) // 2], "sha256 does not match"),
        ("04-export-*/model.onnx", lambda b: b[: len(b) // 2], "sha256 does not match"),
        ("03-quantize-*/model.safetensors", None, "model.safetensors is missing"),
        ("02-prune-*/manifest.json", lambda b: b[:300], "the manifest is damaged"),
    ],
)
def test_a_corrupted_artifact_is_named_and_made_anew_when_deleted(
    finished: Any, tmp_path: Path, edgekd: Call, file: str, damage: Any, what: str
) -> None:
    run = finished.copy(tmp_path / "run")
    (target,) = run.glob(file)
    content = target.read_bytes()
    target.unlink() if damage is None else target.write_bytes(damage(content))
    before = files(run)
    done = edgekd("run", "recipe.toml", "-o", str(run))
    assert done.code == 3
    assert "Traceback" not in done.err
    assert f"error: {target.parent}: " in done.err
    assert what in done.err
    assert f"hint: delete {target.parent} and run the same command again" in done.err
    assert files(run) == before
    name = target.parent.name.split("-")[1]
    shown = edgekd("show", str(target.parent))
    assert shown.code in (2, 3)
    assert "Traceback" not in shown.err
    if name == "export":  # the quickest to make again
        shutil.rmtree(target.parent)
        mended = edgekd("run", "recipe.toml", "-o", str(run))
        assert mended.code == 0, mended.err
        assert mended.err.count("complete, skipped") == 4
        assert Artifact.open(target.parent).file("model.onnx").stat().st_size == len(content)


def test_a_directory_that_cannot_be_written(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        done = edgekd("run", "recipe.toml", "-o", str(tmp_path / place))
        refused(done, 3, str(tmp_path / place), "cannot write", "-o DIR")
    done = edgekd("export", "runs/tiny:quantize", "-o", str(tmp_path / "file"))
    assert done.code == 3
    assert "Traceback" not in done.err
    assert str(tmp_path / "file") in done.err


def test_a_run_in_use(finished: Any, edgekd: Call) -> None:
    before = files(finished.directory)
    with locked(finished.directory):
        for command in (["run", "recipe.toml"], ["bench", "runs/tiny"], ["export", "runs/tiny:distill"]):
            done = edgekd(*command)
            refused(done, 3, "runs/tiny", f"in use by another edgekd (process {os.getpid()})", "wait for it to end")
    assert files(finished.directory) == before


LONG = ["--set", "teacher.epochs=100000", "--set", "teacher.checkpoint_s=0", "-o", "runs/long"]


def begin(project: Path) -> subprocess.Popen[str]:
    """A run that trains until it is stopped, begun until its first line of progress."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekd", "run", "recipe.toml", *LONG],
        cwd=project,
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and pass that on to the processes of a test run started so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    checkpoint = project / "runs" / "long" / ".partial"
    deadline = time.monotonic() + 240
    while not list(checkpoint.glob("*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def test_interrupted_and_in_use_by_two_processes(project: Path) -> None:
    """SIGINT, SIGTERM: 130 with how to go on; a second run meanwhile: 3; afterwards the first one resumes."""
    process = begin(project)
    try:
        second = spawn("run", "recipe.toml", *LONG, cwd=project)
        assert (second.code, second.out) == (3, "")
        assert f"runs/long is in use by another edgekd (process {process.pid})" in second.err
        assert "hint: wait for it to end" in second.err
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: run the same command again to resume"
    assert "Traceback" not in err
    again = begin(project)
    try:
        time.sleep(1)  # past the checkpoint that was there before
        again.send_signal(signal.SIGTERM)
        out, err = again.communicate(timeout=60)
    finally:
        again.kill()
    assert again.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


SWALLOWED = """
import edgekd.cli, os, signal, time

def command(**_):
    exec("try:\\n os.kill(os.getpid(), signal.SIGTERM)\\n time.sleep(5)\\nexcept BaseException: pass")
    {after}

edgekd.cli.app, edgekd.cli.AGAIN_S = command, 0.2
edgekd.cli.main()
"""


@pytest.mark.parametrize("after", ["time.sleep(30)", "exec('time.sleep(30)')"])
def test_an_interrupt_that_something_swallows_comes_again_and_ends_with_130(tmp_path: Path, after: str) -> None:
    """Within `exec` of text, Python takes a KeyboardInterrupt for unhandled, and a module run by -m for killed."""
    (tmp_path / "swallowed.py").write_text(SWALLOWED.format(after=after))
    environment = {**environ(), "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "swallowed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=25)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: run the same command again to resume\n"


def test_a_full_disk_and_on_from_there(small: Path) -> None:
    """No file may grow past 4 KB: the checkpoint does not fit. With room again, the stage ends."""
    stopped = spawn("run", "recipe.toml", cwd=small, prefix="ulimit -f 4;")
    assert stopped.code == 3, stopped.err
    assert "Traceback" not in stopped.err
    assert "is the disk full" in stopped.err
    assert [p.name for p in (small / "runs" / "small").glob("[0-9]*")] == []
    done = spawn("teacher", "recipe.toml", cwd=small)
    assert done.code == 0, done.err
    assert Artifact.open(small / done.out.strip()).manifest.kind == "teacher"


def test_a_disk_that_fills_up_later(finished: Any, tmp_path: Path) -> None:
    """Quantized weights do not fit: what was there stays, and nothing half-written looks complete."""
    run = finished.copy(tmp_path / "run")
    for directory in [*run.glob("03-*"), *run.glob("04-*")]:
        shutil.rmtree(directory)
    before = files(run)
    project = finished.directory.parents[1]
    no_training = ["--set", "stage.quantize.heal.epochs=0", "--set", "stage.quantize.calibration=8"]
    done = spawn("run", "recipe.toml", "-o", str(run), *no_training, cwd=project, prefix="ulimit -f 30;")
    assert done.code == 3, (done.code, done.err)
    assert "Traceback" not in done.err
    assert "is the disk full" in done.err
    assert "03-quantize" in done.err
    assert before.items() <= files(run).items()
    assert not list(run.glob("03-*"))
    for directory in run.glob("[0-9]*"):
        Artifact.open(directory)


def test_a_bug_is_said_to_be_one(edgekd: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd import inspect

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(inspect, "describe", fails)
    done = edgekd("show", "kl")
    assert done.code == 70
    assert "This is a bug in edgekd (ZeroDivisionError)" in done.err
    assert "edgekd doctor" in done.err
