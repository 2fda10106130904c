"""Renderings that programs read: JUnit XML, CSV, JSON for github-action-benchmark."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any
from xml.etree import ElementTree

import pytest

from edgekd.bench.results import Results
from edgekd.gate import RuleFor, judge
from edgekd.report import render
from edgekd.report.model import prepare

HOSTILE = ["<script>alert(1)</script>", '=HYPERLINK("http://x")', "]]>", "a|b\x00\x1b", "-1+1", "猫 🐈 & co"]


def verdicts(results: Results) -> list[Any]:
    rules = [
        RuleFor(p.profile, metric, bound, limit)
        for p in results.profiles
        for metric, bound, limit in (
            ("size_mb", "max", 0.1),
            ("accuracy", "drop", 0.05),
            ("latency.p50", "speedup", 10.28),
        )
    ]
    return judge(results, rules)


def test_junit_has_a_case_for_each_rule_and_profile(build: Any) -> None:
    results = build(profiles=("cpu-x86", "jetson"))
    root = ElementTree.fromstring(render(results, verdicts(results), "junit").encode())
    assert root.tag == "testsuites"
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("6", "2", "2")
    assert [s.get("name") for s in root] == ["cpu-x86", "jetson"]
    size, drop, speedup = root[1]
    assert (size.get("classname"), size.get("name")) == ("edgekd.jetson", "size_mb max")
    failure = size.find("failure")
    assert failure is not None
    assert "allowed ≤ 0.10 MB, found 0.20 MB" in str(failure.get("message"))
    assert "hint:" in str(failure.text)
    assert [child.tag for child in drop] == ["system-out"]
    error = speedup.find("error")
    assert error is not None
    assert str(error.get("message")).startswith("inconclusive")


def test_csv_holds_every_figure_with_its_interval(build: Any) -> None:
    results = build()
    rows = {r["variant"]: r for r in csv.DictReader(io.StringIO(render(results, [], "csv")))}
    assert list(rows) == ["teacher", "distill", "prune", "quantize"]
    for v in results.profiles[0].variants:
        row = rows[v.name]
        assert v.latency is not None
        assert v.latency.p99 is not None
        for key, interval in (("p50_ms", v.latency.p50), ("p99_ms", v.latency.p99), ("load_ms", v.load_ms)):
            found = [float(row[key + end]) for end in ("", "_low", "_high")]
            assert found == [interval.value, interval.low, interval.high]
        assert float(row["metric.accuracy"]) == v.metrics["accuracy"]
        assert float(row["images_per_s.batch8"]) == v.throughput["8"].value
        assert int(row["macs"]) == v.macs
    assert rows["teacher"]["drop"] == ""


def test_github_benchmark_is_a_list_of_which_less_is_better(build: Any) -> None:
    entries = {e["name"]: e for e in json.loads(render(build(), [], "github-benchmark"))}
    p50 = entries["cpu-x86 / quantize / latency p50"]
    assert (p50["unit"], p50["value"]) == ("ms", 0.118)
    assert float(p50["range"].removeprefix("± ")) == pytest.approx(0.00118, rel=1e-3)
    error = entries["cpu-x86 / quantize / accuracy error"]
    assert (error["unit"], error["value"]) == ("%", pytest.approx(8.49))
    assert all(set(e) <= {"name", "unit", "value", "range", "extra"} for e in entries.values())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text_everywhere(build: Any, name: str) -> None:
    classes = [name, *"bcdefghij"]
    results = build(names={"quantize": name}, classes=classes, profiles=(name,))
    judged = verdicts(results)
    xml = render(results, judged, "junit")
    shown = "".join(c for c in name if c.isprintable())
    root = ElementTree.fromstring(xml.encode())
    assert shown.replace("\x00", "") in str(root[0].get("name")).replace("\ufffd", "")
    (row,) = [
        r for r in csv.DictReader(io.StringIO(render(results, [], "csv"), newline="")) if r["precision"] == "int8"
    ]
    assert row["variant"] == (f"'{name}" if name[0] in "=-+@" else name)
    assert float(row["drop_low"]) < float(row["drop"])
    json.loads(render(results, [], "github-benchmark"))
    for text in (render(results, judged, "html"), render(results, judged, "md")):
        assert "<script>alert" not in text
        assert "<script" not in text.replace("&lt;script", "")
    if name == "a|b\x00\x1b":
        tables = [line for line in render(results, judged, "md").splitlines() if line.startswith("| ")]
        assert not any("a|b" in line for line in tables)


def test_figures_that_are_not_finite_do_not_end_the_report(build: Any) -> None:
    results = build()
    profile = results.profiles[0]
    broken = profile.variants[-1].model_copy(update={"metrics": {"accuracy": math.nan, "ece": math.inf}})
    bare = profile.variants[1].model_copy(
        update={"latency": None, "speedup": None, "metrics": {}, "drop": None, "throughput": {}, "classes": [],
                "confusion": [], "layer_times": [], "load_ms": None, "offline": None}
    )  # fmt: skip
    for variants in ([bare], [profile.variants[0], bare], [*profile.variants[:-1], broken]):
        one = results.model_copy(update={"profiles": [profile.model_copy(update={"variants": variants})]})
        for format in ("html", "md", "text", "csv", "github-benchmark", "junit"):
            assert render(one, [], format)


def test_a_large_report_is_still_small(build: Any) -> None:
    names = [f"class number {i}" for i in range(100)]
    results = build(classes=names, profiles=("a", "b", "c", "d"))
    page = render(results, [], "html")
    assert len(page.encode()) < 1_000_000
    assert "all profiles" in page


def test_classes_are_worst_first_and_confusions_largest_first(build: Any) -> None:
    (profile,) = prepare(build(), []).profiles
    shares = [c.share for c in profile.classes]
    assert shares == sorted(shares)
    variant = profile.variants[-1]
    largest = max(
        (count, variant.classes[i].name, variant.classes[j].name)
        for i, row in enumerate(variant.confusion) for j, count in enumerate(row) if i != j
    )  # fmt: skip
    actual, answer, count = profile.confused[0]
    assert (count, actual, answer) == largest
