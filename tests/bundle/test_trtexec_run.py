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

from edgekd.bench import disturbances
from edgekd.bench.accelerators import gpus, with_capability
from edgekd.bundle import make_bundle, read_results
from edgekd.bundle.runner.device import cards_of, smi_cards
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


H100 = "NVIDIA H100 80GB HBM3, 570.86.15, 345, 1980, 2619, 34, 700.00, Enabled, 0x0000000000000001"
T4 = "NVIDIA T4, 570.86.15, 300, 1590, 5001, 84, 70.00, Disabled, 0x0000000000000044"
CAPABILITIES = {H100: "9.0, 81559", T4: "7.5, 15360"}


def machine_with(directory: Path, *cards: str) -> None:
    """`nvidia-smi` beside the other tools, which answers as that of tests/bench/test_environment.py does."""
    lines, told = "\n".join(cards), "\n".join(CAPABILITIES[card] for card in cards)
    tool = directory / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\ncase $1 in *compute_cap*) cat <<'E'\n{told}\nE\n;; *) cat <<'E'\n{lines}\nE\n;; esac\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


@pytest.mark.usefixtures("trtexec")
@pytest.mark.parametrize(("name", "own", "other"), [("gpu-h100", H100, T4), ("gpu-t4", T4, H100)], ids=["h100", "t4"])
def test_a_card_is_timed_as_its_profile_only(
    files: list[Path], data: Dataset, tmp_path: Path, name: str, own: str, other: str
) -> None:
    bundle = make_bundle(files[1:], tmp_path / "card", quick_profile(name), data, images=50)
    machine_with(tmp_path / "bin", own)
    run(bundle)
    found = results(bundle)
    assert found["device"]["gpus"] == with_capability(gpus(own), CAPABILITIES[own])
    profile = read_results(bundle / "results.json").profiles[0]
    assert profile.elsewhere is None
    assert profile.variants[0].latency is not None
    machine_with(tmp_path / "bin", other)
    assert "of another bundle, runtime or device" in run(bundle).stderr
    builds = [c for c in (bundle / "engines" / "calls.txt").read_text().splitlines() if "--onnx" in c]
    assert len(builds) == 4, "the engines for one row and for many, anew"
    assert builds[0].split("--timingCacheFile=")[1].split()[0] != builds[2].split("--timingCacheFile=")[1].split()[0]
    profile = read_results(bundle / "results.json").profiles[0]
    assert profile.elsewhere is not None
    assert f"{other.partition(',')[0]} here has" in profile.elsewhere
    assert profile.variants[0].latency is None


def test_the_card_that_cuda_uses_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(tmp_path, T4, H100)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert smi_cards() == with_capability(gpus(f"{T4}\n{H100}"), "7.5, 15360\n9.0, 81559")
    used = {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
    assert [card["name"] for card in cards_of(used)] == ["NVIDIA H100 80GB HBM3", "NVIDIA T4"]
    assert [card["name"] for card in cards_of({})] == ["NVIDIA T4", "NVIDIA H100 80GB HBM3"]
    alone = cards_of({"gpu": "NVIDIA L4", "compute_capability": "8.9"})[0]
    assert alone == {"name": "NVIDIA L4", "compute_capability": "8.9", "persistence_mode": None, "throttled": []}
    assert disturbances({"cores": 1, "load_average": [0.0], "governor": None, "cpu_quota": None, "gpus": [alone]}) == []
