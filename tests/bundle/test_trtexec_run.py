"""The runner's way through trtexec, with a program in its place that replays recorded output."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import quick_profile, results, run

from edgekd.bundle import make_bundle, read_results
from edgekd.data import Dataset

REPLAY = Path(__file__).with_name("trtexec_replay.py")


@pytest.fixture
def trtexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trtexec` in PATH."""
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{REPLAY}" "$@"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("trtexec")
def test_engines_are_built_compared_judged_and_timed(
    files: list[Path], data: Dataset, tmp_path: Path, fresh: Callable[[], Path]
) -> None:
    profile = quick_profile().model_copy(update={"runtime": "tensorrt"})
    bundle = make_bundle(files[1:], tmp_path / "jetson", profile, data, images=100)
    run(bundle)
    found = results(bundle)
    told = found["networks"]["int8"]
    assert found["runtime"]["name"] == "trtexec", "TensorRT's Python package is not here, and trtexec is"
    assert found["runtime"]["version"] == "10.3.0"
    assert told["problem"] is None
    assert told["comparison"]["rows"] == 8, "few: each batch is a process"
    assert told["comparison_wide"]["rows"] == 100, "all, by an engine for more at once"
    assert told["judged"]["accuracy"] > 0.8
    assert told["performance"]["GPU Compute Time"]["median"] == 1.39775
    calls = (bundle / "engines" / "calls.txt").read_text().splitlines()
    builds = [call for call in calls if "--onnx" in call]
    assert ["maxShapes=image:1x" in builds[0], "maxShapes=image:100x" in builds[1]] == [True, True]
    assert all("--int8 --fp16" in call for call in builds)
    timed = [call for call in calls if "--exportTimes" in call]
    assert all("--useCudaGraph --useSpinWait --exposeDMA" in call for call in timed)
    assert found["warnings"] == [
        "int8: trtexec timed with Spin-wait: Disabled", "int8: trtexec timed with ExposeDMA: Disabled",
    ], "what the recorded run did, which was not asked that"  # fmt: skip
    latency = read_results(bundle / "results.json").profiles[0].variants[0].latency
    assert latency is not None
    assert latency.p50.value == pytest.approx(1.43754)
    assert latency.parts["compute"].value == pytest.approx(1.39775)
    assert latency.parts["transfers"].value == pytest.approx(0.0397949, abs=1e-6)
    run(bundle, "--again")
    again = (bundle / "engines" / "calls.txt").read_text().splitlines()
    assert len([call for call in again if "--onnx" in call]) == 2, "engines are kept"
    shutil.rmtree(bundle)
