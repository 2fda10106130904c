"""run.py as a process: checks, compares, measures, keeps what it has, and says what is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import quick_profile, results, run

from edgekd.bench import bootstrap_median_by_round
from edgekd.bench.stats import bootstrap_median
from edgekd.bundle import make_bundle
from edgekd.bundle.runner import contents, rounds, work
from edgekd.data import Dataset
from edgekd.tasks import Classification

Fresh = Callable[[], Path]


@pytest.fixture(scope="module")
def measured(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The bundle run once, and what it said with --progress."""
    bundle = Path(shutil.copytree(made, tmp_path_factory.mktemp("measured") / "digits"))
    lines = run(bundle, "--progress").stdout.splitlines()
    return bundle, [json.loads(line) for line in lines]


def test_accuracy_rounds_and_progress(measured: tuple[Path, list[dict]], data: Dataset) -> None:
    bundle, said = measured
    found, inputs = results(bundle), np.load(bundle / "inputs.npz")
    expected = np.load(bundle / "expected.npz")
    assert found["complete"] is True
    assert found["runtime"]["name"] == "onnxruntime"
    for name in ("fp32", "int8"):
        told = found["networks"][name]
        metrics = Classification().metrics(expected[f"{name}.logits"], inputs["labels"])
        assert {key: told["judged"][key] for key in metrics} == pytest.approx(metrics)
        assert told["comparison"]["agreement"] == 1.0
        assert told["problem"] is None
    assert len(found["rounds"]) == 3
    for one in found["rounds"]:
        assert sorted(one["order"]) == ["fp32", "int8"]
        for block in one["networks"].values():
            assert len(block["ns"]) >= 3
            assert block["p50"] == pytest.approx(np.median(block["ns"]) / 1e6, rel=1e-2)
    events = [one["event"] for one in said]
    assert events[0] == "verify"
    assert events[-1] == "done"
    assert [one["done"] for one in said if one["event"] == "round"] == [1, 2, 3]
    assert said[-1]["code"] == 0
    assert "round 3 of 3" in (bundle / "run.log").read_text()


def test_a_complete_bundle_is_not_measured_twice_unless_asked(measured: tuple[Path, list[dict]]) -> None:
    bundle, _ = measured
    before = results(bundle)
    run(bundle)
    assert results(bundle)["rounds"] == before["rounds"]
    run(bundle, "--again")
    assert results(bundle)["rounds"] != before["rounds"]


@pytest.mark.parametrize("name", ["int8.onnx", "inputs.npz", "run.py", "README.txt"])
def test_a_corrupted_bundle_is_told_by_the_files_name(fresh: Fresh, name: str) -> None:
    bundle = fresh()
    with (bundle / name).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"#")
    assert f"{name} is corrupted (sha256 does not match)" in run(bundle, code=3).stderr
    assert not (bundle / "results.json").exists()


def test_a_missing_file_and_a_damaged_manifest(fresh: Fresh) -> None:
    bundle = fresh()
    (bundle / "expected.npz").unlink()
    assert "expected.npz is missing" in run(bundle, code=3).stderr
    (bundle / "bundle.json").write_text("{")
    assert "bundle.json is damaged" in run(bundle, code=3).stderr


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ("tensorrt", "TensorRT's Python package does not import: No module named 'tensorrt'"),
        ("trtexec", "trtexec is neither in PATH nor in /usr/src/tensorrt/bin"),
    ],
)
def test_a_runtime_that_is_not_there(fresh: Fresh, runtime: str, said: str) -> None:
    outcome = run(fresh(), "--runtime", runtime, code=3)
    assert said in outcome.stderr
    assert "hint: on a Jetson: sudo apt install" in outcome.stderr


def test_a_tensorrt_profile_never_gets_figures_of_a_cpu(files: list[Path], tmp_path: Path) -> None:
    profile = quick_profile().model_copy(update={"runtime": "tensorrt"})
    bundle = make_bundle(files, tmp_path / "jetson", profile, None)
    outcome = run(bundle, code=3)
    assert "TensorRT is not here" in outcome.stderr
    assert "and no trtexec" in outcome.stderr


def test_wrong_options_are_usage_errors(fresh: Fresh) -> None:
    assert "invalid choice" in run(fresh(), "--runtime", "abacus", code=2).stderr


def test_a_network_whose_outputs_are_wrong_is_not_measured_and_the_others_are(
    files: list[Path], data: Dataset, tmp_path: Path
) -> None:
    """The int8 network's weights are swapped after its outputs were recorded, as a broken engine would give them."""
    bundle = make_bundle(files, tmp_path / "wrong", quick_profile(), data, images=50)
    expected = dict(np.load(bundle / "expected.npz"))
    expected["int8.logits"] = -expected["int8.logits"]
    np.savez(bundle / "expected.npz", **expected)
    told = json.loads((bundle / "bundle.json").read_text())
    told["files"]["expected.npz"] = [contents.file_sha256(str(bundle / "expected.npz")),
                                     (bundle / "expected.npz").stat().st_size]  # fmt: skip
    (bundle / "bundle.json").write_text(json.dumps(told))
    assert "int8: outputs differ from ONNX Runtime's" in run(bundle, code=3).stderr
    found = results(bundle)
    assert set(found["rounds"][0]["networks"]) == {"fp32"}
    assert "problem" in found["networks"]["int8"]


def test_comparison_sees_zeros_nan_shapes_and_other_answers() -> None:
    network = {"outputs": [{"name": "logits"}], "logits": "logits"}
    rng = np.random.default_rng(0)
    expected = {"logits": rng.standard_normal((100, 10))}
    tolerance = {"rms_ratio": 0.05, "agreement": 0.98}

    def problem(found: np.ndarray) -> str | None:
        return contents.compared(network, {"logits": found}, expected, tolerance)["problem"]

    assert problem(expected["logits"]) is None
    assert problem(expected["logits"] + 0.01 * rng.standard_normal((100, 10))) is None
    assert problem(np.zeros((100, 10))) == "output logits is zero everywhere"
    spoiled = expected["logits"].copy()
    spoiled[3, 4] = np.nan
    assert problem(spoiled) == "output logits: 1 of 1000 values are NaN or infinite"
    assert "shape [100, 9]" in str(problem(expected["logits"][:, :9]))
    assert "differ from ONNX Runtime's by 1.0e-01" in str(problem(expected["logits"] * 1.1))
    others = expected["logits"].copy()  # ten answers change by the smallest step that changes them
    for row in others[:10]:
        row[row.argsort()[-2]] = row.max() + 1e-6
    loose = contents.compared(network, {"logits": others}, expected, {"rms_ratio": 1.0, "agreement": 0.98})
    assert loose["problem"] == "90.0 % of the answers are ONNX Runtime's, expected at least 98.0 %"
    assert loose["agreement"] == 0.9


def test_killed_it_goes_on_where_it_was(files: list[Path], data: Dataset, tmp_path: Path) -> None:
    """SIGHUP, as when a connection ends, is nothing; SIGKILL leaves the rounds; the next call adds to them.

    It tells each round into a pipe of one page, so it is never more than some thirty ahead of what is read.
    """
    profile = quick_profile(rounds=120, block_s=1e-4, cap_s=600.0)
    bundle = make_bundle(files, tmp_path / "killed", profile, data, images=50)
    command = [sys.executable, str(bundle / "run.py"), "--progress"]
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 4096)
    with open(read, "rb", buffering=0) as said, subprocess.Popen(command, stdout=write) as process:
        os.close(write)
        told = (json.loads(line) for line in said)
        next(one for one in told if one.get("done") == 2)
        process.send_signal(signal.SIGHUP)
        second = run(bundle, code=3)
        assert f"already running here (process {process.pid})" in second.stderr
        next(one for one in told if one.get("done") == 50)
        process.kill()
    kept = results(bundle)
    assert not kept["complete"]
    count = len(kept["rounds"])
    assert 50 <= count < 120
    outcome = run(bundle)
    assert f"going on after {count} rounds" in outcome.stderr
    found = results(bundle)
    assert found["complete"]
    assert found["rounds"][:count] == kept["rounds"]
    assert [one["session"] for one in found["rounds"]] == [0] * count + [1] * (len(found["rounds"]) - count)
    assert len(found["rounds"]) >= 120


def test_nobody_has_to_listen(fresh: Fresh) -> None:
    """Progress goes to a reader that leaves after one line, words to a terminal that is gone; the run ends well."""
    bundle = fresh()
    command = f'"{sys.executable}" "{bundle}/run.py" --progress 2>&- | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, json.loads(done.stdout)["event"]) == (0, "verify")
    assert results(bundle)["complete"]


def test_a_clock_that_is_set_meanwhile_is_told_and_changes_no_time(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes ahead by an hour after the networks are warm; times are the monotonic clock's."""
    real, ahead = time.time, [0.0]

    class Clock:
        monotonic, time = staticmethod(time.monotonic), staticmethod(lambda: real() + ahead[0])

    def tell(event: str, words: str, **_: object) -> None:
        ahead[0] = 3600.0 if event == "round" else ahead[0]

    monkeypatch.setattr(work, "time", Clock)
    running = work.Run(str(made), str(tmp_path), "auto", False, tell)
    running.work()
    assert running.results["warnings"] == [
        "the wall clock jumped by 3600 s while measuring; times are by the monotonic clock"
    ]
    assert all(block["p50"] < 1000 for one in running.results["rounds"] for block in one["networks"].values())


def test_interrupted_it_says_how_to_go_on(files: list[Path], tmp_path: Path) -> None:
    bundle = make_bundle(files[:1], tmp_path / "b", quick_profile(rounds=1000, cap_s=60.0), None)
    process = subprocess.Popen([sys.executable, str(bundle / "run.py")], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round 1 "):
            process.terminate()
            break
    said = process.stderr.read()
    assert process.wait() == 130
    assert "run the same command again to go on" in said
    assert not results(bundle)["complete"]


def test_results_of_another_bundle_or_damaged_ones_are_kept_and_made_anew(measured, fresh: Fresh) -> None:
    bundle = fresh()
    other = results(measured[0])
    (bundle / "results.json").write_text(json.dumps({**other, "bundle": "0" * 64}))
    assert "kept as results.json.old" in run(bundle).stderr
    assert json.loads((bundle / "results.json.old").read_text())["bundle"] == "0" * 64
    (bundle / "results.json").write_text('{"bundle": ')
    assert "damaged and is made anew" in run(bundle).stderr
    assert results(bundle)["complete"]


def test_a_directory_that_cannot_be_written(fresh: Fresh, tmp_path: Path) -> None:
    """Somebody who is not root may have it read-only; root stops at what is no directory."""
    bundle = fresh()
    (tmp_path / "file").write_text("")
    outcome = run(bundle, "--out", str(tmp_path / "file"), code=3)
    assert "cannot write" in outcome.stderr or "File exists" in outcome.stderr
    if os.getuid():
        bundle.chmod(0o555)
        assert "--out DIR" in run(bundle, code=3).stderr
        bundle.chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    run(bundle, "--out", str(elsewhere))
    assert results(elsewhere)["complete"]
    assert not (bundle / "results.json").exists()


def test_a_full_disk_keeps_what_was_written(measured: tuple[Path, list[dict]], fresh: Fresh) -> None:
    """A limit on file sizes stands for the disk: what is known before the rounds fits, three rounds do not."""
    bundle = fresh()
    size = len(json.dumps({**results(measured[0]), "rounds": []}))
    outcome = run(bundle, code=3, preexec_fn=lambda: limit_file_size(size))
    assert "cannot write" in outcome.stderr
    assert "is the disk full" in outcome.stderr
    assert len(results(bundle)["rounds"]) < 3
    assert not results(bundle)["complete"]


def limit_file_size(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("count", [2, 3, 12, 40])
def test_the_runners_interval_is_edgekds(count: int) -> None:
    values = np.random.default_rng(count).gamma(9.0, 0.1, count)
    expected = bootstrap_median(values)
    assert rounds.median_interval(list(values)) == (expected.value, expected.low, expected.high)


def test_rounds_go_on_until_medians_and_ratios_are_known() -> None:
    """Two networks whose times wander together: the ratio is known at once, the medians are not."""

    def measured(precision: float, noise: float, most: float = 60.0) -> list[dict]:
        rng = np.random.default_rng(1)
        wander = iter(np.exp(noise * rng.standard_normal(400)))
        now = {"value": 1.0}

        def block(factor: float) -> dict[str, list[int]]:
            return {"ns": [int(1e6 * factor * now["value"])] * 5}

        found: list[dict] = []
        protocol = {"rounds": 5, "precision": precision, "cap_s": most}
        now["value"] = next(wander)
        calls = {"a": lambda: block(1.0), "b": lambda: block(2.0)}
        rounds.measure_rounds(calls, protocol, found, lambda done, wanted: now.update(value=next(wander)), 0)
        return found

    assert len(measured(0.5, 0.01)) == 5
    many = measured(0.02, 0.05)
    assert len(many) > 10
    assert {tuple(one["order"]) for one in many} == {("a", "b"), ("b", "a")}, "in an order drawn anew"
    interval = bootstrap_median_by_round([[n / 1e6 for n in r["networks"]["a"]["ns"]] for r in many])
    assert max(interval.high - interval.value, interval.value - interval.low) <= 0.02 * interval.value
    assert len(measured(0.0001, 0.05, most=0.0)) == 3, "three are always done, and none is begun after the cap"
