"""The command line inside this process or as a process of its own, and one tiny finished run that tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch reads it: sums in another order are other weights, and the tests' own processes have one thread each.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from processes import PROFILE, Finished, Outcome, spawn

RECIPE = """\
version = 1
name = "tiny"
data = { use = "digits", size = 16, batch = 128 }
profiles = ["profile.toml"]

[teacher]
model = { use = "cifar-resnet", depth = 8, width = 8 }
epochs = 1

[[stage]]
use = "distill"
model = { use = "cifar-resnet", depth = 8, width = 8 }
epochs = 1

[[stage]]
use = "prune"
target = { macs = 0.8 }
channel_multiple = 2
heal = { epochs = 1 }

[[stage]]
use = "quantize"
keep_float = false
heal = { epochs = 1 }

[[stage]]
use = "export"

[gate]
size_mb = { max = 1.0 }
"""


@pytest.fixture
def edgekd(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, project: Path
) -> Callable[..., Outcome]:
    """`edgekd ARGS` in this process, which has torch imported already; in `cwd` (default: the project)."""
    import signal

    from edgekd.cli import main

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str, cwd: Path | None = None) -> Outcome:
        monkeypatch.chdir(cwd or project)
        monkeypatch.setattr(sys, "argv", ["edgekd", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with recipe.toml and profile.toml."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "recipe.toml").write_text(RECIPE)
    (directory / "profile.toml").write_text(PROFILE)
    return directory


@pytest.fixture(scope="session")
def finished(project: Path) -> Finished:
    """The recipe run once, as a process of its own."""
    outcome = spawn("run", "recipe.toml", cwd=project)
    assert outcome.code == 0, outcome.err
    return Finished(project / "runs" / "tiny", outcome)
