"""One OpenSSH server for all tests of a process; each gets it with an empty home directory and a plain login."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Server, serving
from small_bench import write_work


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with fitted.onnx, noisy.onnx, recipe.toml, quick.toml and slow.toml; tests add what they need."""
    directory = tmp_path_factory.mktemp("work")
    write_work(directory)
    return directory


@pytest.fixture
def server(running: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Its `python3` is this interpreter; ssh's configuration knows it as `device`."""
    shutil.rmtree(running.home)
    running.home.mkdir()
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (bin / "python3").chmod(0o755)
    running.at_login(f"PATH={shlex.quote(str(bin))}:$PATH OMP_NUM_THREADS=1; export PATH OMP_NUM_THREADS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDGEKD_SSH", running.ssh())
    return running
