"""Efficiencies of networks that were measured, their range, and what each is worth when it is left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from estimated_files import convolution, device
from numpy.random import default_rng

from edgekd.bench.results import Interval, Latency, ProfileResults, Results, Variant
from edgekd.errors import UsageError
from edgekd.estimate import Fit, estimate_of, estimates_of, fit, roofline
from edgekd.profile import Profile

#: Of the networks below: their rooflines over what was measured.
EFFICIENCIES = [0.1, 0.2, 0.4, 0.5]


def network(directory: Path, index: int, dtype: Any = np.float32) -> Path:
    """One convolution on a larger image the higher its number."""
    name = f"{np.dtype(dtype).name}-{index}.onnx"
    return convolution(directory / name, kernel=(1, 3, 5, 7)[index], dtype=dtype)


def latency(ms: float, batch: int = 1) -> Latency:
    own = Interval(value=ms, low=ms * 0.99, high=ms * 1.01)
    return Latency(
        p50=own, p90=own, p95=own, mean=ms, spread=0.0, samples=9, round_p50=[ms] * 3, batch=batch, threads=1
    )


def variant(file: Path, ms: float, **more: Any) -> Variant:
    table: dict[str, Any] = {"size_mb": file.stat().st_size / 1e6, "file": str(file), "latency": latency(ms), **more}
    return Variant(name=file.stem, key="", precision="fp32", **table)


def document(path: Path, *variants: Variant, **more: Any) -> Path:
    table: dict[str, Any] = {"profile": "board", "device": "serial number 7", "runtime": "r", "rounds": 3, **more}
    Results(
        name="r", command="c", headline="accuracy", test_images=0, classes=[], environment={},
        profiles=[ProfileResults(variants=list(variants), **table)],
    ).write(path)  # fmt: skip
    return path


def fitted_to(profile: Profile, *results: Path) -> Fit:
    return fit({path: Results.read(path) for path in results}, profile)


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Path, list[float], list[float]]:
    """(results of four fp32 networks, their rooflines, what was measured)."""
    files = [network(tmp_path, i) for i in range(4)]
    bounds = [roofline(file, device()).ms for file in files]
    times = [bound / e for bound, e in zip(bounds, EFFICIENCIES, strict=True)]
    return document(tmp_path / "results.json", *map(variant, files, times)), bounds, times


def test_the_efficiency_is_a_mean_with_its_range(measured: tuple[Path, list[float], list[float]]) -> None:
    results, bounds, times = measured
    found = fitted_to(device(), results)
    (own,) = found.efficiencies.values()
    assert found.device == "serial number 7"
    assert own.value == pytest.approx((0.1 * 0.2 * 0.4 * 0.5) ** (1 / 4))
    assert (own.low, own.high, own.networks) == (pytest.approx(0.1), pytest.approx(0.5), 4)
    # Left out in turn: the others' geometric mean in place of its own efficiency.
    for i, known in enumerate(found.known):
        others = [e for j, e in enumerate(EFFICIENCIES) if j != i]
        mean = math.prod(others) ** (1 / 3)
        assert known.measured_ms == times[i]
        assert known.left_out_ms == pytest.approx(bounds[i] / mean)
        factor = EFFICIENCIES[i] / mean
        assert known.off_by == pytest.approx(max(factor, 1 / factor))
    assert own.off_by == pytest.approx((0.2 * 0.4 * 0.5) ** (1 / 3) / 0.1)


def test_another_networks_estimate_is_an_interval(
    measured: tuple[Path, list[float], list[float]], tmp_path: Path
) -> None:
    found = fitted_to(device(), measured[0])
    bound = roofline(convolution(tmp_path / "new.onnx", kernel=3, strides=[2, 2]), device())
    estimate = estimate_of(bound, device(), found)
    own = estimate.fitted
    assert own is not None
    assert (own.low_ms, own.high_ms) == (pytest.approx(bound.ms / 0.5), pytest.approx(bound.ms / 0.1))
    assert own.ms == pytest.approx(bound.ms / 0.004**0.25)
    assert (estimate.floor_ms, estimate.roofline_ms, estimate.source) == (bound.floor_ms, bound.ms, "made up")
    assert own.coverage == pytest.approx(3 / 5)
    # In a precision that nothing was measured in there is no fit.
    half = roofline(network(tmp_path, 0, np.float16), device())
    assert estimate_of(half, device(), found).fitted is None


def test_the_smallest_to_the_largest_of_n_hold_as_many_as_they_say(
    measured: tuple[Path, list[float], list[float]], tmp_path: Path
) -> None:
    """(n-1)/(n+1) of further draws, whatever their distribution: seen in 4,000 samples of five."""
    own = estimate_of(roofline(network(tmp_path, 0), device()), device(), fitted_to(device(), measured[0])).fitted
    assert own is not None
    draws = default_rng(0).lognormal(size=(4000, own.networks + 1))
    inside = (draws[:, -1] > draws[:, :-1].min(1)) & (draws[:, -1] < draws[:, :-1].max(1))
    assert inside.mean() == pytest.approx(own.coverage, abs=0.03)


def test_one_network_says_nothing_of_the_range(tmp_path: Path) -> None:
    file = network(tmp_path, 1)
    bound = roofline(file, device())
    found = fitted_to(device(), document(tmp_path / "r.json", variant(file, bound.ms * 8)))
    assert found.efficiencies["fp32"].off_by is None
    assert found.known[0].left_out_ms is None
    own = estimate_of(bound, device(), found).fitted
    assert own is not None
    assert (own.ms, own.high_ms, own.coverage) == (pytest.approx(bound.ms * 8), None, 0.0)
    assert own.low_ms == bound.floor_ms


def test_precisions_are_fitted_apart_and_a_file_counts_once(tmp_path: Path) -> None:
    files = [network(tmp_path, 0), network(tmp_path, 1), network(tmp_path, 0, np.float16)]
    same = tmp_path / "same.onnx"
    same.write_bytes(files[0].read_bytes())
    bounds = [roofline(file, device()).ms for file in files]
    one = document(tmp_path / "a.json", variant(files[0], bounds[0] * 2), variant(same, bounds[0] * 3))
    two = document(tmp_path / "b.json", variant(files[1], bounds[1] * 4), variant(files[2], bounds[2] * 10))
    found = fitted_to(device(), one, two)
    assert {p: e.networks for p, e in found.efficiencies.items()} == {"fp32": 2, "fp16": 1}
    assert found.efficiencies["fp16"].value == pytest.approx(0.1)
    assert found.efficiencies["fp32"].high == pytest.approx(0.5)


def test_the_roofline_is_that_of_the_batch_that_was_measured(tmp_path: Path) -> None:
    file = network(tmp_path, 1)
    bound = roofline(file, device(), batch=8)
    eight = variant(file, 0.0, latency=latency(bound.ms * 5, 8))
    found = fitted_to(device(), document(tmp_path / "r.json", eight))
    assert found.known[0].batch == 8
    assert found.efficiencies["fp32"].value == pytest.approx(0.2)


def test_files_are_found_beside_the_results_and_only_those_that_were_measured(tmp_path: Path) -> None:
    (tmp_path / "came").mkdir()
    file, other = network(tmp_path / "came", 1), network(tmp_path / "came", 2)
    moved, changed = variant(file, 1.0), variant(other, 1.0)
    results = document(
        tmp_path / "came" / "results.json",
        moved.model_copy(update={"file": "bundle/float32-1.onnx"}),
        changed.model_copy(update={"size_mb": changed.size_mb * 2}),
    )
    found = fitted_to(device(), results)
    assert [k.name for k in found.known] == ["float32-1"]
    assert found.known[0].file == str(file)
    (note,) = found.notes
    assert note.startswith(f"float32-2 of {results} is left out: the file that was measured is not here")


def test_what_a_device_measured_for_a_run_is_found_by_its_key(tmp_path: Path) -> None:
    file = network(tmp_path, 1)
    there = variant(file, 1.0).model_copy(update={"file": "a-bundles-name.onnx", "key": "4f"})
    here = variant(file, 1.0).model_copy(update={"key": "4f"})
    told = "power mode 15W, the profile is about MAXN"
    (profile,) = Results.read(document(tmp_path / "results.json", there, warnings=[told])).profiles
    other = profile.model_copy(update={"profile": "cpu-x86", "variants": [here], "warnings": []})
    both = Results.read(tmp_path / "results.json").model_copy(update={"profiles": [other, profile]})
    found = fit({tmp_path: both}, device())
    assert [k.file for k in found.known] == [str(file)]
    assert found.notes == [f"{tmp_path}: {told}"]


def test_a_measurement_below_its_lower_bound_is_told(tmp_path: Path) -> None:
    file = network(tmp_path, 0)
    floor = roofline(file, device()).floor_ms
    fast = fitted_to(device(), document(tmp_path / "r.json", variant(file, floor / 2)))
    assert any("below its lower bound" in note and "power mode" in note for note in fast.notes)
    slow = fitted_to(device(), document(tmp_path / "s.json", variant(file, floor * 2)))
    assert slow.notes == []


@pytest.mark.parametrize(
    ("more", "profile", "said"),
    [
        ({"profile": "other"}, {}, "they have: other"),
        ({"elsewhere": "no such machine"}, {}, "not measured on board: no such machine"),
        ({"settings": {"power_mode": "15W"}}, {"power_mode": "MAXN"}, "power mode 15W, and the profile is about MAXN"),
    ],
)
def test_results_that_are_not_of_the_device_are_no_results(
    more: dict[str, Any], profile: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = network(tmp_path, 0)
    timed = {} if "elsewhere" not in more else {"latency": None}
    results = document(tmp_path / "r.json", variant(file, 1.0, **timed), **more)
    with pytest.raises(UsageError, match="no network measured on board") as raised:
        fitted_to(device(**profile), results)
    assert said in str(raised.value.problem.hint)


def test_files_that_cannot_be_estimated_leave_a_word(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_text("x")
    found, unknown = estimates_of({"good": network(tmp_path, 0), "bad": bad}, device())
    assert list(found) == ["good"]
    assert unknown == ["no estimate of bad: not an ONNX file, or a truncated one"]
    assert estimates_of({"bad": bad}, device().model_copy(update={"datasheet": None})) == ({}, [])


def test_networks_measured_on_this_machine(tmp_path: Path) -> None:
    """The whole way with real measurements: a datasheet of this machine that is beyond what it can do."""
    from edgekd.runs import bench_paths

    files = [str(network(tmp_path, i)) for i in range(3)]
    here = tmp_path / "here.toml"
    here.write_text(
        'extends = "cpu-x86"\ndescription = "a processor"\n'
        "datasheet = { fp32_tflops = 1000.0, int8_tops = 1000.0, bandwidth_gb_s = 100000.0, source = 'made up' }\n"
        "protocol = { rounds = 3, precision = 10.0, block_s = 0.01, warmup_s = 0.01, batches = [1] }\n"
    )
    results = bench_paths(files, [str(here)])
    (profile,) = results.profiles
    if profile.elsewhere is not None:
        pytest.skip(profile.elsewhere)
    assert all(v.latency is not None and v.estimate is None for v in profile.variants)
    results.write(tmp_path / "results.json")
    settings = Profile.model_validate(profile.settings)
    found: Fit = fitted_to(settings, tmp_path / "results.json")
    (own,) = found.efficiencies.values()
    assert own.networks == 3
    assert 0 < own.low <= own.value <= own.high < 1
    assert own.off_by is not None
    assert own.off_by >= 1
    assert found.notes == [f"{tmp_path / 'results.json'}: {text}" for text in profile.warnings]  # of a busy machine
