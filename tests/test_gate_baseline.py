"""Rules that compare with a baseline: paired in one session, or read from another one's document."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest

from edgekd.bench import packed, paired_drop, paired_ratio, unpaired_ratio
from edgekd.bench.results import Interval, ProfileResults, Results, Variant
from edgekd.bench.stats import summarize
from edgekd.errors import UsageError
from edgekd.gate import Baseline, RuleFor, Verdict, judge

HERE = {"cpu": "A", "instruction_sets": ["avx2"], "machine": "x86_64"}
RNG = np.random.default_rng(0)
TRUTH = RNG.random(1000) < 0.92


def variant(name: str, ms: float, drift: Any = 1.0, right: Any = TRUTH, noise: float = 0.004, **more: Any) -> Variant:
    """Twelve rounds around `ms`, of which `drift` is what the machine did in each."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    medians = ms * np.ones(12) * drift * np.exp(rng.normal(0, noise, 12))
    rounds = [m * np.exp(rng.normal(0, 0.01, 100)) for m in medians]
    table: dict[str, Any] = {
        "key": f"key of {name}",
        "file": f"{name}.onnx",
        "precision": "fp32",
        "metrics": {"accuracy": float(right.mean()), "loss": 0.3},
        "correct": packed(right),
        "latency": summarize(rounds, batch=1, threads=1),  # type: ignore[arg-type]
        "size_mb": 1.0,
        "load_ms": Interval(value=10.0, low=9.5, high=10.5),
    }
    return Variant(name=name, **{**table, **more})


def document(*variants: Variant, environment: Any = HERE, runtime: str = "onnxruntime 1", data: str = "d") -> Results:
    profile = ProfileResults(profile="p", device="A", runtime=runtime, rounds=12, variants=list(variants))
    return Results(
        name="r", command="c", headline="accuracy", test_images=1000, data=data, classes=["a", "b"],
        profiles=[profile], environment=environment,
    )  # fmt: skip


def one(results: Results, baseline: Baseline | None, metric: str, limit: float, **more: Any) -> Verdict:
    (verdict,) = judge(results, [RuleFor("p", metric, "regress", limit, **more)], baseline=baseline)
    return verdict


def beside(base: Variant, own: Variant) -> Baseline:
    return Baseline(document(base, own), "main", interleaved=True)


@pytest.mark.parametrize(
    ("slower", "expected"), [(1.0, "pass"), (1.03, "pass"), (1.05, "inconclusive"), (1.08, "fail"), (0.5, "pass")]
)
def test_interleaved_rounds_are_paired(slower: float, expected: str) -> None:
    drift = np.exp(np.random.default_rng(1).normal(0, 0.3, 12))  # hopeless, were it not the same for both
    base, own = variant("base", 1.0, drift), variant("student", slower, drift)
    verdict = one(document(own), beside(base, own), "latency.p50", 0.05)
    assert verdict.verdict == expected
    assert base.latency is not None
    assert own.latency is not None
    ratio = paired_ratio(own.latency.round_p50, base.latency.round_p50)
    assert (verdict.found, verdict.low, verdict.high) == pytest.approx((ratio.value - 1, ratio.low - 1, ratio.high - 1))
    assert "same rounds" in verdict.shown
    assert verdict.allowed == "≤ +5.0 %"


def test_tails_are_compared_with_intervals() -> None:
    base, own = variant("base", 1.0), variant("student", 1.3)
    assert one(document(own), beside(base, own), "latency.p95", 0.05).verdict == "fail"
    assert one(document(own), beside(base, own), "latency.p99", 0.05).verdict == "fail"
    same = one(document(own), beside(own, own), "latency.p99", 0.0)
    assert same.verdict == "inconclusive"  # nothing is known to within 0 %


def test_of_another_session_the_teachers_latency_cancels_the_machines_mood() -> None:
    """Today everything is 1.7 times slower: what stands is the ratio to the teacher of each session."""
    then = document(variant("teacher", 4.0), variant("student", 1.0))
    for slower, expected in ((1.0, "pass"), (1.2, "fail")):
        teacher, student = variant("teacher", 6.8, noise=0.005), variant("student", 1.7 * slower, noise=0.006)
        verdict = one(document(teacher, student), Baseline(then, "baseline.json"), "latency.p50", 0.05)
        assert verdict.verdict == expected
        assert "relative to teacher" in verdict.shown
        (old, new) = (
            [np.asarray(v.latency.round_p50) for v in r.profiles[0].variants if v.latency]
            for r in (then, document(teacher, student))
        )
        ratio = unpaired_ratio(new[1] / new[0], old[1] / old[0])
        assert verdict.found == pytest.approx(ratio.value - 1)


def test_without_a_common_teacher_the_milliseconds_are_compared() -> None:
    then = document(variant("student", 1.0))
    verdict = one(document(variant("student", 1.7)), Baseline(then, "baseline.json"), "latency.p50", 0.05)
    assert (verdict.verdict, verdict.found) == ("fail", pytest.approx(0.7, abs=0.02))
    assert "another session" in verdict.shown


def test_accuracy_is_paired_image_by_image_even_from_another_session() -> None:
    worse = TRUTH.copy()
    worse[:40] = False
    then, now = document(variant("student", 1.0)), document(variant("student", 1.0, right=worse))
    verdict = one(now, Baseline(then, "b.json"), "accuracy", 0.05)
    drop = paired_drop(TRUTH, worse)
    assert verdict.verdict == "pass"
    assert (verdict.found, verdict.low, verdict.high) == pytest.approx(
        tuple(x / TRUTH.mean() for x in (drop.value, drop.low, drop.high))
    )
    assert "McNemar p =" in verdict.shown
    assert one(now, Baseline(then, "b.json"), "accuracy", 0.03).verdict == "fail"
    assert one(now, Baseline(then, "b.json"), "accuracy", 0.045, strict=True).verdict == "inconclusive"
    other = document(variant("student", 1.0), data="other images")
    unpaired = one(now, Baseline(other, "b.json"), "accuracy", 0.05)
    assert (unpaired.low, unpaired.found) == (None, pytest.approx(drop.value / TRUTH.mean()))


def test_costs_and_losses_grow_where_less_is_better() -> None:
    then = document(variant("student", 1.0))
    now = document(variant("student", 1.0, size_mb=1.06, metrics={"accuracy": 0.9, "loss": 0.27}))
    assert one(now, Baseline(then, "b"), "size_mb", 0.05).found == pytest.approx(0.06)
    assert one(now, Baseline(then, "b"), "size_mb", 0.05).verdict == "fail"
    assert one(now, Baseline(then, "b"), "loss", 0.05).found == pytest.approx(-0.1)
    slower = document(variant("student", 1.0, load_ms=Interval(value=13.0, low=12.5, high=13.5)))
    assert one(slower, Baseline(then, "b"), "load_ms", 0.05).verdict == "fail"
    assert one(now, Baseline(then, "b"), "load_ms", 0.05).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"environment": {**HERE, "cpu": "B"}}, "cpu 'B' and here 'A'"),
        ({"environment": {**HERE, "power_mode": "15W"}}, "power mode '15W' and here None"),
        ({"runtime": "onnxruntime 0"}, "runtime 'onnxruntime 0' and here 'onnxruntime 1'"),
    ],
)
def test_another_machines_latency_is_refused_unless_allowed(change: dict[str, Any], told: str) -> None:
    then = document(variant("student", 1.0), **change)
    now = document(variant("student", 1.01))
    with pytest.raises(UsageError, match="not comparable") as caught:
        one(now, Baseline(then, "b.json"), "latency.p50", 0.05)
    assert told in str(caught.value)
    assert "--allow-other-machine" in str(caught.value)
    allowed = one(now, Baseline(then, "b.json", other_machine=True), "latency.p50", 0.05)
    assert "another machine" in allowed.shown
    assert one(now, Baseline(then, "b.json"), "size_mb", 0.05).verdict == "pass"  # a size is the same everywhere


def test_what_a_baseline_lacks_is_said() -> None:
    then = document(variant("student", 1.0, metrics={"loss": 0.3}, load_ms=None))
    now = document(variant("student", 1.0))
    with pytest.raises(UsageError, match="the baseline has no accuracy on p") as caught:
        one(now, Baseline(then, "b.json"), "accuracy", 0.05)
    assert "baseline b.json" in str(caught.value)
    assert "it has: loss, size_mb, latency" in str(caught.value)
    with pytest.raises(UsageError, match="no load_ms"):
        one(now, Baseline(then, "b.json"), "load_ms", 0.05)
    elsewhere = then.model_copy(update={"profiles": [then.profiles[0].model_copy(update={"profile": "jetson"})]})
    with pytest.raises(UsageError, match="was not measured on profile 'p'"):
        one(now, Baseline(elsewhere, "b.json"), "size_mb", 0.05)
    broken = document(variant("student", 1.0, metrics={"accuracy": math.nan}))
    with pytest.raises(UsageError, match="not a number"):
        one(now, Baseline(broken, "b.json"), "accuracy", 0.05)


def test_without_a_baseline_nothing_is_known() -> None:
    verdict = one(document(variant("student", 1.0)), None, "latency.p50", 0.05)
    assert (verdict.verdict, verdict.found) == ("inconclusive", None)
    assert "no baseline" in verdict.shown
    assert "--baseline" in str(verdict.hint)
