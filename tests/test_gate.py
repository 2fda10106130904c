"""The gate: what a rule table means, verdicts at their boundaries, and what a user can get wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekd.bench import wilson
from edgekd.bench.results import Interval, Latency, ProfileResults, Results, Variant
from edgekd.errors import ArtifactError, RecipeError, UsageError
from edgekd.gate import RuleFor, Verdict, exit_code, judge, lines, parse_rules, read, write_gate
from edgekd.gate.verdict import text


def latency(p50: Interval, p99: float | None = 3.0) -> Latency:
    p90, p95 = (Interval(value=p50.value * k, low=p50.value * k * 0.9, high=p50.value * k * 1.1) for k in (1.1, 1.2))
    tail = Interval(value=p99, low=p99 * 0.9, high=p99 * 1.1) if p99 is not None else None
    return Latency(
        p50=p50, p90=p90, p95=p95, p99=tail, mean=p50.value, spread=0.02, samples=500,
        round_p50=[p50.value] * 12, batch=1, threads=1,
    )  # fmt: skip


def variant(name: str, accuracy: float, p50: tuple[float, float, float], **more: Any) -> Variant:
    table: dict[str, Any] = {
        "key": name,
        "file": f"{name}.onnx",
        "precision": "fp32",
        "metrics": {"accuracy": accuracy, "top5": 0.99},
        "latency": latency(Interval(value=p50[0], low=p50[1], high=p50[2])),
        "size_mb": 0.5,
        "parameters": 1000,
    }
    return Variant(name=name, **{**table, **more})


def results(*variants: Variant, **more: Any) -> Results:
    profile = ProfileResults(profile="cpu-x86", device="x", runtime="y", rounds=12, variants=list(variants))
    table: dict[str, Any] = {"headline": "accuracy", "profiles": [profile], **more}
    return Results(name="r", command="c", test_images=100, classes=["a", "b"], environment={}, **table)


TEACHER = variant("teacher", 0.92, (4.0, 3.9, 4.1))


def student(**more: Any) -> Variant:
    table: dict[str, Any] = {
        "drop": Interval(value=0.01, low=-0.002, high=0.022),
        "speedup": Interval(value=4.0, low=3.9, high=4.1),
        "agreement": 0.95,
    }
    return variant("student", 0.91, (1.0, 0.95, 1.05), **{**table, **more})


def one(metric: str, bound: str, limit: float, *variants: Variant) -> Verdict:
    (verdict,) = judge(results(*(variants or (TEACHER, student()))), [RuleFor("cpu-x86", metric, bound, limit)])
    return verdict


@pytest.mark.parametrize(
    ("bound", "limit", "expected"),
    [
        ("max", 1.05, "pass"),  # the interval is [0.95, 1.05]: its end may touch the limit
        ("max", 1.0499, "inconclusive"),
        ("max", 0.95, "inconclusive"),
        ("max", 0.9499, "fail"),
        ("speedup", 3.9, "pass"),  # [3.9, 4.1]
        ("speedup", 3.9001, "inconclusive"),
        ("speedup", 4.1, "inconclusive"),
        ("speedup", 4.1001, "fail"),
    ],
)
def test_latency_is_judged_by_its_whole_interval(bound: str, limit: float, expected: str) -> None:
    verdict = one("latency.p50", bound, limit)
    assert verdict.verdict == expected
    assert (verdict.low, verdict.found, verdict.high) == ((0.95, 1.0, 1.05) if bound == "max" else (3.9, 4.0, 4.1))
    assert ("too noisy after 12 rounds" in verdict.shown) == (expected == "inconclusive")


def test_accuracy_is_judged_on_the_figure_with_the_paired_interval_beside_it() -> None:
    verdict = one("accuracy", "drop", 0.01)
    assert verdict.verdict == "pass"  # 0.022 at the end of the interval does not matter
    assert (verdict.low, verdict.found, verdict.high) == (-0.002, 0.01, 0.022)
    assert one("accuracy", "drop", 0.0099).verdict == "fail"
    assert one("accuracy", "min", 0.91).verdict == "pass"
    assert one("accuracy", "min", 0.9101).verdict == "fail"


def test_a_limit_met_exactly_does_not_fail_by_a_rounding_error() -> None:
    assert 0.92 - 0.91 > 0.01
    exact = student(drop=Interval(value=0.92 - 0.91, low=0.0, high=0.02))
    assert one("accuracy", "drop", 0.01, TEACHER, exact).verdict == "pass"


def test_other_quantiles_have_intervals_too() -> None:
    assert one("latency.p95", "max", 1.33).verdict == "pass"  # 1.2 [1.08, 1.32]
    assert one("latency.p95", "max", 1.2).verdict == "inconclusive"
    assert one("latency.p95", "max", 1.07).verdict == "fail"
    ratio = one("latency.p95", "speedup", 3.0)
    assert (ratio.found, ratio.verdict) == (pytest.approx(4.0), "pass")
    assert ratio.low is not None
    assert 3.2 < ratio.low < 3.5  # both sides within a tenth: together more than a tenth, less than a fifth


def test_drop_and_speedup_against_another_stage() -> None:
    middle = variant("prune", 0.915, (2.0, 1.9, 2.1))
    document = results(TEACHER, middle, student())
    rules = [
        RuleFor("cpu-x86", "accuracy", "drop", 0.006, against="prune"),
        RuleFor("cpu-x86", "latency.p50", "speedup", 2.5, against="prune"),
    ]
    drop, speedup = judge(document, rules)
    assert drop.rule == "accuracy drop against prune"
    assert drop.found == pytest.approx(0.005)
    assert (drop.verdict, speedup.verdict, speedup.found) == ("pass", "fail", 2.0)
    with pytest.raises(UsageError, match="no variant 'prun'"):
        judge(document, [RuleFor("cpu-x86", "accuracy", "drop", 0.1, against="prun")])
    with pytest.raises(UsageError, match="beside a student"):
        judge(document, [RuleFor("cpu-x86", "accuracy", "drop", 0.1, against="student")])


def test_strict_asks_it_of_the_whole_interval() -> None:
    def strict(bound: str, limit: float) -> Verdict:
        (verdict,) = judge(results(TEACHER, student()), [RuleFor("cpu-x86", "accuracy", bound, limit, strict=True)])
        return verdict

    assert one("accuracy", "drop", 0.015).verdict == "pass"
    assert strict("drop", 0.015).verdict == "inconclusive"  # 0.01 [-0.002, 0.022]
    assert "not told apart by 100 test images" in strict("drop", 0.015).shown
    assert strict("drop", 0.0221).verdict == "pass"
    assert strict("drop", -0.0021).verdict == "fail"
    low = wilson(0.91, 100).low
    assert strict("min", low - 1e-6).verdict == "pass"
    assert strict("min", low + 1e-6).verdict == "inconclusive"


def test_p99_of_too_few_samples_is_inconclusive_with_the_reason() -> None:
    few = student(latency=latency(Interval(value=1, low=1, high=1), p99=None))
    verdict = one("latency.p99", "max", 5.0, TEACHER, few)
    assert (verdict.verdict, verdict.found) == ("inconclusive", None)
    assert "500 samples are too few for p99" in verdict.shown


def test_sizes_agreement_and_other_metrics_of_the_task() -> None:
    assert one("size_mb", "max", 0.5).verdict == "pass"
    assert one("size_mb", "max", 0.49).verdict == "fail"
    assert one("parameters", "max", 999).verdict == "fail"
    assert one("agreement", "min", 0.95).verdict == "pass"
    assert one("top5", "drop", 0.0).verdict == "pass"


def test_a_headline_metric_where_less_is_better() -> None:
    worse = variant("student", 0.0, (1, 1, 1), metrics={"error": 0.12})
    first = variant("teacher", 0.0, (4, 4, 4), metrics={"error": 0.10})
    document = results(first, worse, headline="error", direction="min")
    drop, limit = judge(document, [RuleFor("cpu-x86", "error", "drop", 0.01), RuleFor("cpu-x86", "error", "max", 0.2)])
    assert (drop.verdict, limit.verdict) == ("fail", "pass")
    assert drop.found == pytest.approx(0.02)


def test_accuracy_names_the_headline_metric_where_there_is_none_of_that_name() -> None:
    document = results(variant("only", 0, (1, 1, 1), metrics={"top1": 0.8}), headline="top1")
    assert judge(document, [RuleFor("cpu-x86", "accuracy", "min", 0.7)])[0].found == 0.8


def test_the_last_variant_is_judged_or_the_one_named() -> None:
    rules = [RuleFor("cpu-x86", "accuracy", "min", 0.9)]
    assert judge(results(TEACHER, student()), rules)[0].variant == "student"
    assert judge(results(TEACHER, student()), rules, variant="teacher")[0].found == 0.92
    with pytest.raises(UsageError, match=r"did you mean 'student'"):
        judge(results(TEACHER, student()), rules, variant="studnet")


def test_everything_that_was_not_measured_is_said_at_once() -> None:
    rules = [
        RuleFor("cpu-x86", "macs", "max", 1),
        RuleFor("cpu-x86", "f1", "min", 0.5),
        RuleFor("jetson", "size_mb", "max", 1),
        RuleFor("cpu-x86", "accuracy", "min", 0.5),
    ]
    with pytest.raises(RecipeError) as caught:
        judge(results(TEACHER, student()), rules)
    text = [str(p) for p in caught.value.problems]
    assert len(text) == 3
    assert "macs of student was not measured on cpu-x86" in text[0]
    assert "measured are: agreement, parameters, size_mb" in text[0]
    assert "accuracy, top5" in text[1]
    assert "nothing was measured on profile 'jetson'" in text[2]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("rule", [("accuracy", "drop"), ("latency.p50", "speedup"), ("latency.p95", "speedup")])
def test_a_file_alone_has_no_teacher_to_compare_with(rule: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="not measured beside a teacher"):
        one(*rule, 0.5, TEACHER)


def test_nan_is_an_error_and_not_a_verdict() -> None:
    with pytest.raises(UsageError, match="accuracy of student on cpu-x86 is not a number"):
        one("accuracy", "min", 0.5, TEACHER, student(metrics={"accuracy": math.nan}))


def test_a_profile_adds_to_the_general_rules_and_replaces_the_same_bound() -> None:
    table = {
        "accuracy": {"min": 0.9, "drop": 0.01},
        "latency": {"p50": {"max": 2.0, "speedup": 4}},
        "cpu-x86": {"accuracy": {"drop": 0.02}, "size_mb": {"max": 1.0}},
    }
    rules, problems = parse_rules(table, ["cpu-x86", "jetson"])
    assert not problems
    by_profile = {p: {r.name: r.limit for r in rules if r.profile == p} for p in ("cpu-x86", "jetson")}
    general = {"accuracy min": 0.9, "accuracy drop": 0.01, "latency.p50 max": 2.0, "latency.p50 speedup": 4.0}
    assert by_profile["jetson"] == general
    assert by_profile["cpu-x86"] == general | {"accuracy drop": 0.02, "size_mb max": 1.0}


def test_all_problems_of_a_table_at_once() -> None:
    table = {
        "accuracy": {"mim": 0.9, "drop": 1},
        "latency": {"p5": {"max": 1}, "p95": {"speed": 1}, "p99": {"max": "2"}, "max": 3},
        "size_mb": {},
        "macs": {"max": -1},
        "agreement": {"min": 95},
        "parameters": {"max": True},
        "size": {"max": 1},
        "cpu-x68": {"accuracy": {"min": 0.9}},
        "cpu-x86": {"top5": 0.9},
        "f1": {"min": math.inf},
        "loss": {"regress": "five"},
        "top1": {"min": 0.5, "against": "prune"},
        "top2": {"strict": True},
        "top3": {"min": 0.5, "strict": 1},
        "load_ms": {"max": 5, "strict": True},
        "ece": {"regress": 5},
    }
    rules, problems = parse_rules(table, ["cpu-x86"])
    assert {r.metric for r in rules} == {"top1", "top3", "load_ms"}  # their limits were right
    found = {p.where: p for p in problems}
    assert set(found) == {
        "gate.accuracy.mim",
        "gate.accuracy.drop",
        "gate.latency.p5",
        "gate.latency.p95.speed",
        "gate.latency.p99.max",
        "gate.latency.max",
        "gate.size_mb",
        "gate.macs.max",
        "gate.agreement.min",
        "gate.parameters.max",
        "gate.size",
        "gate.cpu-x68",
        "gate.cpu-x86.top5",
        "gate.f1.min",
        "gate.loss.regress",
        "gate.top1.against",
        "gate.top2",
        "gate.top3.strict",
        "gate.load_ms.strict",
        "gate.ece.regress",
    }
    assert found["gate.accuracy.mim"].hint == "did you mean 'min'?"
    assert found["gate.latency.p95.speed"].hint == "did you mean 'speedup'?"
    assert found["gate.size"].hint == "did you mean 'size_mb'?"
    assert found["gate.cpu-x68"].hint == "did you mean 'cpu-x86'?"
    assert found["gate.accuracy.drop"].hint == "0.01 is one point"
    assert found["gate.agreement.min"].hint == "0.95 is 95 %"


def test_regress_is_a_share_of_the_baselines_figure() -> None:
    rules, problems = parse_rules({"latency": {"p50": {"regress": "5%"}}, "size_mb": {"regress": 0.1}}, ["cpu-x86"])
    assert not problems
    assert [(r.name, r.limit) for r in rules] == [("latency.p50 regress", 0.05), ("size_mb regress", 0.1)]


def test_no_table_is_no_rules() -> None:
    assert parse_rules({}, ["cpu-x86"]) == ([], [])


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [([], 0), (["pass"], 0), (["pass", "inconclusive"], 4), (["inconclusive", "fail", "pass"], 1), (["fail"], 1)],
)
def test_exit_codes(verdicts: list[Any], code: int) -> None:
    made = [one("size_mb", "max", 1).model_copy(update={"verdict": v}) for v in verdicts]
    assert exit_code(made) == code
    assert exit_code(made, "fail") == (1 if code == 4 else code)
    assert exit_code(made, "pass") == (0 if code == 4 else code)


def test_terminal_lines_are_aligned_and_hints_come_last_and_once() -> None:
    rules = [
        RuleFor("cpu-x86", "accuracy", "drop", 0.005),
        RuleFor("cpu-x86", "latency.p50", "speedup", 4.05),
        RuleFor("cpu-x86", "latency.p50", "max", 1.01),
        RuleFor("cpu-x86", "size_mb", "max", 1.0),
    ]
    drop, speedup, p50, size, *hints = lines(judge(results(TEACHER, student()), rules))
    assert [x[:4] for x in (drop, speedup, p50, size)] == ["FAIL", "????", "????", "pass"]
    assert "allowed ≤ 0.50 points   found 1.00 points [-0.20, 2.20]" in drop
    assert "allowed ≥ 4.05x         found 4.00x [3.90, 4.10]: too noisy" in speedup
    assert len({x.index("allowed") for x in (drop, speedup, p50, size)}) == 1
    assert hints[0] == "hint: the largest loss is at student: 1.00 points"
    assert len(hints) == 2


def test_rounding_never_hides_why_a_rule_failed() -> None:
    verdict = one("latency.p50", "speedup", 4.1001)
    assert verdict.verdict == "fail"
    assert (verdict.allowed, verdict.shown) == ("≥ 4.1001x", "4.0000x [3.9000, 4.1000]")


def test_nothing_has_no_minus() -> None:
    assert text("change", [0.05, -0.0001, 0.0, -0.02]) == ["+5.0 %", "+0.0 %", "+0.0 %", "-2.0 %"]
    assert text("points", [0.01, -0.00001]) == ["1.00 points", "0.00 points"]


def test_gate_json_comes_back_equal_and_other_files_are_refused(tmp_path: Path) -> None:
    verdicts = [one("accuracy", "drop", 0.01), one("size_mb", "max", 0.1)]
    file = tmp_path / "gate.json"
    write_gate(file, verdicts)
    assert read(file) == verdicts
    with pytest.raises(UsageError, match="no verdicts"):
        read(tmp_path / "none.json")
    for content, message in (
        ("{", "not JSON"),
        ("[]", "gate schema None, expected 1"),
        ('{"schema_version": 9}', "gate schema 9"),
        ('{"schema_version": 1, "verdicts": [{}]}', "damaged"),
    ):
        file.write_text(content)
        with pytest.raises(ArtifactError, match=message):
            read(file)


def test_gate_does_not_import_torch() -> None:
    code = "import sys, edgekd.gate, edgekd.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
