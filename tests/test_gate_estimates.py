"""What estimates may decide: nothing unless the rules say so, and then no more than they know."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgekd.bench.results import Estimate, Fitted, Interval, Latency, ProfileResults, Results, Variant
from edgekd.gate import RuleFor, Verdict, exit_code, judge, lines, parse_rules

WHY = "board is aarch64, this machine is x86-64"


def latency(ms: float) -> Latency:
    own = Interval(value=ms, low=ms * 0.99, high=ms * 1.01)
    return Latency(
        p50=own, p90=own, p95=own, p99=own, mean=ms, spread=0.0, samples=9, round_p50=[ms] * 3, batch=1, threads=1
    )


def fitted(ms: float, low: float, high: float | None, networks: int = 3) -> Fitted:
    return Fitted(ms=ms, low_ms=low, high_ms=high, networks=networks)


def variant(name: str, floor: float | None, own: Fitted | None = None, **more: Any) -> Variant:
    estimate = None
    if floor is not None:
        estimate = Estimate(
            floor_ms=floor,
            roofline_ms=2 * floor,
            bound="memory",
            batch=1,
            precision="fp32",
            source="a page",
            fitted=own,
        )
    table: dict[str, Any] = {"key": name, "file": f"{name}.onnx", "precision": "fp32", "size_mb": 1.0, **more}
    return Variant(name=name, estimate=estimate, **table)


def judged(rules: list[RuleFor], *variants: Variant, elsewhere: str | None = WHY) -> list[Verdict]:
    profile = ProfileResults(
        profile="board", device="a board", runtime="r", rounds=0, variants=list(variants), elsewhere=elsewhere
    )
    document = Results(
        name="r", command="c", headline="accuracy", test_images=100, classes=["a"], profiles=[profile], environment={}
    )
    return judge(document, rules)


def one(metric: str, bound: str, limit: float, *variants: Variant, allowed: bool = True) -> Verdict:
    (verdict,) = judged([RuleFor("board", metric, bound, limit, estimates=allowed)], *variants)
    return verdict


def test_without_a_word_in_the_rules_an_estimate_decides_nothing() -> None:
    beyond = variant("student", 5.0, fitted(9.0, 8.0, 10.0))
    for metric, bound in (("latency.p50", "max"), ("latency.p99", "max"), ("latency.p50", "speedup")):
        verdict = one(metric, bound, 1.0, variant("teacher", 50.0), beyond, allowed=False)
        assert (verdict.verdict, verdict.found, verdict.low) == ("inconclusive", None, None)
        assert verdict.shown == f"not known: {WHY}"
        assert "edgekd bench RUN --profile board" in str(verdict.hint)


@pytest.mark.parametrize("metric", ["latency.p50", "latency.p90", "latency.p95", "latency.p99"])
def test_a_lower_bound_beyond_the_limit_fails_and_one_below_it_says_nothing(metric: str) -> None:
    verdict = one(metric, "max", 1.99, variant("student", 2.0))
    assert (verdict.verdict, verdict.origin, verdict.found, verdict.high) == ("fail", "estimated", 2.0, None)
    assert verdict.shown == "≥ 2.000 ms (estimated: a lower bound)"
    assert "no run there can be faster" in str(verdict.hint)
    for limit in (2.0, 2.01, 1e9):
        verdict = one(metric, "max", limit, variant("student", 2.0))
        assert (verdict.verdict, verdict.origin) == ("inconclusive", "estimated")
        assert "estimated: a lower bound" in verdict.shown
        assert "measure it there" in str(verdict.hint)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(4.01, "pass"), (4.0, "pass"), (3.99, "inconclusive"), (3.0, "inconclusive"), (2.0, "inconclusive"),
     (1.99, "fail")],
)  # fmt: skip
def test_a_fitted_interval_decides_of_the_median(limit: float, expected: str) -> None:
    verdict = one("latency.p50", "max", limit, variant("student", 0.5, fitted(3.0, 2.0, 4.0)))
    assert (verdict.verdict, verdict.origin) == (expected, "estimated")
    assert (verdict.low, verdict.found, verdict.high) == (2.0, 3.0, 4.0)
    assert "estimated: from networks measured there" in verdict.shown
    # Nothing was fitted to tails.
    tail = one("latency.p99", "max", limit, variant("student", 0.5, fitted(3.0, 2.0, 4.0)))
    assert (tail.verdict, tail.found) == ("inconclusive", 0.5)


@pytest.mark.parametrize(("networks", "high"), [(1, None), (2, 4.0)])
def test_too_few_networks_leave_the_lower_bound(networks: int, high: float | None) -> None:
    own = variant("student", 0.5, fitted(3.0, 0.5 if high is None else 2.0, high, networks))
    assert one("latency.p50", "max", 100.0, own).verdict == "inconclusive"
    assert one("latency.p50", "max", 1.0, own).verdict == "inconclusive"  # the fit alone would fail it
    assert one("latency.p50", "max", 0.4, own).verdict == "fail"


def test_a_speedup_is_judged_where_both_sides_are_fitted() -> None:
    teacher, own = variant("teacher", 1.0, fitted(12.0, 8.0, 16.0)), variant("student", 0.5, fitted(3.0, 2.0, 4.0))
    for limit, expected in ((2.0, "pass"), (2.01, "inconclusive"), (8.0, "inconclusive"), (8.01, "fail")):
        verdict = one("latency.p50", "speedup", limit, teacher, own)
        assert (verdict.verdict, verdict.low, verdict.found, verdict.high) == (expected, 2.0, 4.0, 8.0)
    # Two lower bounds have no ratio.
    bare = one("latency.p50", "speedup", 2.0, variant("teacher", 8.0), variant("student", 1.0))
    assert (bare.verdict, bare.found, bare.shown) == ("inconclusive", None, f"not known: {WHY}")


def test_only_latencies_are_judged_by_estimates() -> None:
    rules, problems = parse_rules(
        {"estimates": True, "latency": {"p50": {"max": 1.0}}, "accuracy": {"min": 0.9}, "size_mb": {"max": 2.0},
         "load_ms": {"max": 1.0}, "energy_mj": {"max": 1.0}},
        ["board"],
    )  # fmt: skip
    assert problems == []
    assert {r.metric: r.estimates for r in rules} == {
        "latency.p50": True, "accuracy": False, "size_mb": False, "load_ms": False, "energy_mj": False,
    }  # fmt: skip
    verdicts = {v.rule: v for v in judged(rules, variant("student", 9.0))}
    assert verdicts["latency.p50 max"].verdict == "fail"
    assert verdicts["size_mb max"].verdict == "pass"  # a file is as large there
    assert {verdicts[f"{m}"].verdict for m in ("accuracy min", "load_ms max", "energy_mj max")} == {"inconclusive"}
    assert {v.origin for v in verdicts.values() if v.rule != "latency.p50 max"} == {"measured"}


def test_a_regression_is_never_estimated() -> None:
    verdict = one("latency.p50", "regress", 0.05, variant("student", 9.0, fitted(20.0, 10.0, 30.0)))
    assert (verdict.verdict, verdict.found) == ("inconclusive", None)


def test_what_was_measured_is_judged_as_ever() -> None:
    rule = RuleFor("board", "latency.p50", "max", 1.0, estimates=True)
    (verdict,) = judged([rule], variant("student", None, latency=latency(0.5)), elsewhere=None)
    assert (verdict.verdict, verdict.origin, verdict.shown) == ("pass", "measured", "0.500 ms [0.495, 0.505]")


def test_an_estimate_is_no_latency_and_stands_beside_none() -> None:
    for wrong in ({"floor": 1.0}, {"floor": None, "origin": "estimated"}, {"floor": None, "origin": "compiled"}):
        floor = wrong.pop("floor")
        with pytest.raises(ValidationError, match="a latency is measured"):
            variant("student", floor, latency=latency(0.5), **wrong)  # type: ignore[arg-type]
    assert not set(Estimate.model_fields) & (set(Latency.model_fields) - {"batch"})


def test_a_profile_of_its_own_may_allow_or_forbid() -> None:
    table = {"latency": {"p50": {"max": 1.0}}, "board": {"estimates": True}, "other": {"size_mb": {"max": 1.0}}}
    rules, problems = parse_rules(table, ["board", "other"])
    assert problems == []
    assert {r.profile: r.estimates for r in rules if r.metric == "latency.p50"} == {"board": True, "other": False}
    rules, _ = parse_rules({**table, "estimates": True, "board": {"estimates": False}}, ["board", "other"])
    assert {r.profile: r.estimates for r in rules if r.metric == "latency.p50"} == {"board": False, "other": True}


def test_a_wrong_word_is_told() -> None:
    for table, where in (
        ({"estimates": "yes"}, "gate.estimates"),
        ({"board": {"estimates": 1}}, "gate.board.estimates"),
    ):
        _, problems = parse_rules(table, ["board"])
        assert [(p.where, p.what.partition(",")[0]) for p in problems] == [(where, "must be true or false")]
    _, (problem,) = parse_rules({"estimate": {"min": 1}}, ["board"])
    assert "estimates" in str(problem.hint)


def test_the_terminals_lines_and_exit_code_name_it() -> None:
    rules = [RuleFor("board", "latency.p50", "max", limit, estimates=True) for limit in (1.0, 3.0)]
    failed, open_ = judged(rules, variant("student", 2.0))
    assert exit_code([failed]) == 1
    assert exit_code([open_]) == 4
    text = lines([failed, open_])
    assert text[0].startswith("FAIL")
    assert text[1].startswith("????")
    assert all("(estimated: a lower bound)" in line for line in text[:2])


def test_the_page_shows_rules_that_are_understood() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "estimates.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (rule,), problems = parse_rules(tomllib.loads(block)["gate"], ["board"])
    assert problems == []
    assert (rule.name, rule.limit, rule.estimates) == ("latency.p50 max", 2.0, True)
    for other in ("recipes.md", "ci.md"):
        assert "(estimates.md)" in (docs / other).read_text(encoding="utf-8")
