"""Pages of runs with several quantization schemes: whose file is whose, and what was made for other profiles."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from edgekd.bench.results import ProfileResults, Results
from edgekd.gate import RuleFor, judge, parse_rules
from edgekd.report import render
from edgekd.report.model import prepare

SLOW = 0.301  # ms of the file that was made for another profile


@pytest.fixture
def forked(build: Any) -> Results:
    """The usual chain, with the file of another profile before the last one."""
    results: Results = build()
    (profile,) = results.profiles
    *floats, own = profile.variants
    own = own.model_copy(update={"name": "quantize.x86-u8s8", "scheme": "x86-u8s8", "file": "runs/x/x86/model.onnx"})
    assert own.latency is not None
    p50 = own.latency.p50.model_copy(update={"value": SLOW})
    changes = {
        "name": "quantize.arm-s8s8",
        "scheme": "arm-s8s8",
        "latency": own.latency.model_copy(update={"p50": p50}),
    }
    other = own.model_copy(update={**changes, "metrics": {"accuracy": 0.5}})
    update = {"variants": [*floats, other, own], "settings": {"scheme": "x86-u8s8"}}
    return results.model_copy(update={"profiles": [profile.model_copy(update=update)]})


def of(results: Results, **changes: Any) -> Results:
    (profile,) = results.profiles
    return results.model_copy(update={"profiles": [profile.model_copy(update=changes)]})


def test_what_was_made_for_another_profile_is_in_the_table_and_no_stage(forked: Results) -> None:
    (view,) = prepare(forked, []).profiles
    assert [(r.name, r.foreign, r.final) for r in view.rows[-2:]] == [
        ("quantize.arm-s8s8", True, False),
        ("quantize.x86-u8s8", False, True),
    ]
    under = [(r.cells["scheme"].text, r.cells["scheme"].under) for r in view.rows[2:]]
    assert under == [("–", ""), ("arm-s8s8", "another profile's"), ("x86-u8s8", "")]
    for waterfall in view.waterfalls:
        assert [bar.name for bar in waterfall.bars] == ["teacher", "distill", "prune", "quantize.x86-u8s8"]
    assert view.file == "quantize.x86-u8s8: runs/x/x86/model.onnx"
    assert view.sentence.endswith("accuracy 94.4\xa0%\xa0→\xa091.5\xa0%")


def test_the_plot_joins_only_the_stages(forked: Results) -> None:
    page = render(forked, [], "html")
    wide = page.split("</svg>")[0]
    assert wide.count('class="path"') == 3  # four marks in a row; the fifth stands aside
    assert wide.count('class="mark other"') == 1
    assert wide.count('class="mark final"') == 1
    assert "hollow ones were made for another profile" in page
    alone = render(of(forked, variants=[v for v in forked.profiles[0].variants if v.scheme != "arm-s8s8"]), [], "html")
    assert "hollow ones" not in alone
    assert 'class="mark other"' not in alone


def test_several_profiles_in_one_picture_join_their_own_stages(forked: Results) -> None:
    (one,) = forked.profiles
    *floats, arm, x86 = one.variants
    second = one.model_copy(
        update={"profile": "signed", "variants": [*floats, x86, arm], "settings": {"scheme": "arm-s8s8"}}
    )
    page = render(forked.model_copy(update={"profiles": [one, second]}), [], "html")
    lines = [part.split('"')[0] for part in page.split("</section>")[0].split('<polyline points="')[1:3]]
    assert [len(line.split()) for line in lines] == [4, 4]
    assert lines[0].split()[:3] == lines[1].split()[:3]
    assert lines[0].split()[3] != lines[1].split()[3]


def test_a_file_that_was_made_for_another_scheme_and_is_the_only_one(forked: Results) -> None:
    *others, last = forked.profiles[0].variants[:-1]
    lonely = of(forked, variants=[*others, last])
    (view,) = prepare(lonely, []).profiles
    assert view.file == "quantize.arm-s8s8, made for arm-s8s8 and not for x86-u8s8: runs/x/x86/model.onnx"
    assert [bar.name for bar in view.waterfalls[0].bars][-1] == "quantize.arm-s8s8"
    assert 'class="mark final"' in render(lonely, [], "html")


def test_sheets_and_json_say_it_too(forked: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(render(forked, [], "csv"))))
    assert [(r["scheme"], r["final"]) for r in rows] == [
        ("", "False"), ("", "False"), ("", "False"), ("arm-s8s8", "False"), ("x86-u8s8", "True")
    ]  # fmt: skip
    document = json.loads(render(forked, [], "json"))
    assert document["files"] == {"cpu-x86": "runs/x/x86/model.onnx"}
    assert [v["scheme"] for v in document["results"]["profiles"][0]["variants"]][3:] == ["arm-s8s8", "x86-u8s8"]
    assert Results.model_validate(document["results"]) == forked


def test_a_device_that_is_elsewhere(forked: Results) -> None:
    why = "cpu-arm64 is aarch64, this machine is x86-64"
    timeless = {"latency": None, "speedup": None, "peak_memory_mb": None, "load_ms": None, "throughput": {}}
    variants = [v.model_copy(update={**timeless, "offline": None}) for v in forked.profiles[0].variants]
    there = of(forked, variants=variants, elsewhere=why)
    rules, problems = parse_rules(
        {"latency": {"p99": {"max": 1.0}}, "accuracy": {"drop": 0.9}, "macs": {"max": 1}, "load_ms": {"max": 1.0}},
        ["cpu-x86"],
    )
    assert not problems
    verdicts = judge(there, rules)
    assert [(v.rule, v.verdict, v.allowed) for v in verdicts] == [
        ("latency.p99 max", "inconclusive", "≤ 1.000 ms"),
        ("accuracy drop", "inconclusive", "≤ 90.00 points"),
        ("macs max", "fail", "≤ 1"),  # in the file: the same everywhere
        ("load_ms max", "inconclusive", "≤ 1.000 ms"),
    ]
    assert verdicts[0].shown == f"not known: {why}"
    for format in ("text", "md", "html"):
        page = render(there, verdicts, format)  # type: ignore[arg-type]
        assert f"not measured here: {why}" in page.replace("\\", "")
        assert "rounds interleaved" not in page


def test_the_largest_loss_is_looked_for_among_the_profiles_own_stages(forked: Results) -> None:
    (verdict,) = judge(forked, [RuleFor("cpu-x86", "accuracy", "min", 0.99)])
    assert verdict.variant == "quantize.x86-u8s8"
    assert verdict.hint == "the largest loss is at distill: 2.37 points"  # and not at the other profile's 0.5


def test_a_profile_without_settings_has_nothing_foreign(forked: Results) -> None:
    bare: ProfileResults = forked.profiles[0].model_copy(update={"settings": {}})
    assert [bare.foreign(v) for v in bare.variants] == [False] * 5
