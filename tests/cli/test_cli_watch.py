"""`edgekd watch`: a run followed from a second process, by its events.jsonl."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from processes import environ

Call = Callable[..., Any]
PROGRAM = [sys.executable, "-m", "edgekd"]


def start(*arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *arguments], cwd=cwd, env=environ(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def place(project: Path, tmp_path: Path) -> Path:
    """A directory with a recipe of its own."""
    for name in ("recipe.toml", "profile.toml"):
        shutil.copy(project / name, tmp_path / name)
    return tmp_path


def test_a_finished_run_is_told_from_its_beginning_to_its_end(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    run = finished.copy(tmp_path / "run")
    assert edgekd("run", "recipe.toml", "-o", str(run), "--from", "export").code == 0
    events = [json.loads(line) for line in _text(run).splitlines()]
    assert events[0]["event"] == "begin"
    assert events[-1] == {**events[-1], "event": "end", "exit_code": 0, "error": None}
    assert all(a["at"] <= b["at"] for a, b in pairwise(events))
    assert [e["stage"] for e in events if e["event"] == "stage"] == [
        "teacher",
        "distill",
        "prune",
        "quantize",
        "export",
    ]
    done = edgekd("watch", str(run))
    assert done.code == 0
    assert done.out.strip() == "ended with exit code 0"
    assert "[1/5] teacher" in done.err
    assert "measurements:" in done.err
    shown = [json.loads(line) for line in edgekd("watch", str(run), "--json").out.splitlines()]
    assert shown == events


def test_a_run_is_followed_while_it_works(place: Path) -> None:
    run = place / "run"
    run.mkdir()
    watcher = start("watch", str(run), "--json")
    command = ["run", "recipe.toml", "-o", str(run), "--until", "distill"]
    done = subprocess.run([*PROGRAM, *command], cwd=place, env=environ(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out, error = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, error
    assert out == (run / "events.jsonl").read_text()
    assert json.loads(out.splitlines()[0])["event"] == "begin"


def test_a_killed_run_is_noticed_and_a_resumed_one_begins_anew(place: Path) -> None:
    run = place / "run"
    worker = start("run", "recipe.toml", "-o", str(run), "--set", "teacher.epochs=400", cwd=place)
    wait_for(lambda: '"step"' in _text(run))
    watcher = start("watch", str(run))
    time.sleep(1.0)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    out, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 3
    assert "killed: run the same command again to resume" in out
    with (run / "events.jsonl").open("a") as stream:
        stream.write('{"event": "st')  # what a full disk leaves
    again = start("watch", str(run))
    assert "killed" in again.communicate(timeout=60)[0]


def test_an_interrupted_and_a_failed_run_say_how_they_ended(place: Path) -> None:
    run = place / "run"
    worker = start("run", "recipe.toml", "-o", str(run), "--set", "teacher.epochs=400", cwd=place)
    wait_for(lambda: '"step"' in _text(run))
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=60)
    assert worker.returncode == 130
    end = json.loads(_text(run).splitlines()[-1])
    assert (end["event"], end["exit_code"]) == ("end", 130)
    watcher = start("watch", str(run))
    assert "interrupted: run the same command again" in watcher.communicate(timeout=60)[0]
    assert watcher.returncode == 130


def test_a_second_run_in_the_same_directory_leaves_the_firsts_events_alone(place: Path) -> None:
    run = place / "run"
    worker = start("run", "recipe.toml", "-o", str(run), "--set", "teacher.epochs=400", cwd=place)
    wait_for(lambda: '"step"' in _text(run))
    second = subprocess.run(
        [*PROGRAM, "run", "recipe.toml", "-o", str(run)], cwd=place, env=environ(), capture_output=True, text=True
    )
    assert second.returncode == 3
    assert "in use by another edgekd" in second.stderr
    assert json.loads(_text(run).splitlines()[0])["pid"] == worker.pid
    worker.kill()
    worker.communicate()


def test_a_directory_that_is_none(tmp_path: Path, edgekd: Call) -> None:
    done = edgekd("watch", str(tmp_path / "nothing"))
    assert (done.code, done.out) == (2, "")
    assert "no run at" in done.err


def test_ctrl_c_ends_only_the_watcher(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(
        json.dumps({"event": "begin", "pid": os.getpid(), "host": os.uname().nodename, "command": "x"}) + "\n"
    )
    watcher = start("watch", str(tmp_path))
    assert watcher.stderr is not None
    assert "process" in watcher.stderr.readline()
    watcher.send_signal(signal.SIGTERM)
    watcher.communicate(timeout=30)
    assert watcher.returncode == 130


def test_watching_does_not_import_torch() -> None:
    code = "import sys, edgekd.watch, edgekd.screen; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environ()).returncode == 0


def _text(run: Path) -> str:
    file = run / "events.jsonl"
    return file.read_text() if file.exists() else ""
