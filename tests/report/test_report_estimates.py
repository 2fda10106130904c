"""Every rendering says of an estimate that it is one, and none shows it as a latency."""

from __future__ import annotations

import csv
import io
import json
from typing import Any
from xml.etree import ElementTree

import pytest

from edgekd.bench.results import Estimate, Fitted, Results
from edgekd.gate import RuleFor, judge
from edgekd.report import render
from edgekd.report.model import prepare

WHY = "jetson runs on tensorrt, which does not run here: not installed"
SHEET = "the maker's datasheet, page 3"


def elsewhere(results: Results, own: Fitted | None) -> Results:
    """The same run on a device that is not here: no latencies, and estimates of all but the teacher."""
    (profile,) = results.profiles
    variants = []
    for i, v in enumerate(profile.variants):
        floor = 0.0625 / (i + 1)
        facts: dict[str, Any] = {"bound": "memory", "batch": 1, "precision": "fp32", "source": SHEET, "fitted": own}
        estimate = Estimate(floor_ms=floor, roofline_ms=2 * floor, **facts) if i else None
        gone: dict[str, Any] = {"latency": None, "speedup": None, "throughput": {}, "offline": None, "load_ms": None}
        variants.append(v.model_copy(update={**gone, "layer_times": [], "peak_memory_mb": None, "estimate": estimate}))
    changed: dict[str, Any] = {
        "device": "a Jetson",
        "rounds": 0,
        "elsewhere": WHY,
        "variants": variants,
        "warnings": [],
    }
    return results.model_copy(update={"profiles": [profile.model_copy(update=changed)]})


FITTED = Fitted(ms=0.5, low_ms=0.25, high_ms=0.75, networks=4)


@pytest.mark.parametrize("format", ["text", "md", "html"])
def test_a_lower_bound_is_shown_as_one(build: Any, format: Any) -> None:
    page = render(elsewhere(build(), None), [], format).replace("\\", "")
    assert "not measured here" in page
    assert "accuracies are measured on this machine" in page
    assert "estimated" in page
    assert "≥ 0.0156" in page  # the final one's
    assert "lower bound" in page
    assert "estimated for a Jetson, not measured: a lower bound" in page
    assert "p50 ms" not in page


@pytest.mark.parametrize("format", ["text", "md", "html"])
def test_an_interval_is_shown_with_what_it_stands_on(build: Any, format: Any) -> None:
    page = render(elsewhere(build(), FITTED), [], format).replace("\\", "")
    assert "0.500" in page
    assert "[0.250,\u00a00.750]" in page or "[0.250, 0.750]" in page
    assert "fitted to 4 networks measured on that device" in page
    one = render(elsewhere(build(), Fitted(ms=0.5, low_ms=0.1, networks=1)), [], format).replace("\\", "")
    assert "range unknown" in one
    assert "fitted to 1 network measured" in one


def test_nothing_is_drawn_or_tagged_from_estimates(build: Any) -> None:
    results = elsewhere(build(), FITTED)
    (profile,) = prepare(results, []).profiles
    assert "against latency" not in render(results, [], "html")
    assert all(row.cells["p50"].text == row.cells["speedup"].text == "–" for row in profile.rows[1:])
    assert [w.title for w in profile.waterfalls] == ["accuracy", "size", "MACs"]
    assert not any("on the front" in row.tags for row in profile.rows)
    assert not any(tile.label.startswith("latency") for tile in profile.tiles)
    assert [e["name"] for e in json.loads(render(results, [], "github-benchmark")) if "latency" in e["name"]] == []


def test_what_was_measured_is_shown_without_a_word_of_estimates(build: Any) -> None:
    (profile,) = prepare(build(), []).profiles
    assert profile.estimated == ""
    assert profile.measured.startswith("measured on ")
    assert "estimated" not in [name for _, group in profile.groups for _, name, _ in group]
    assert "estimated" not in render(build(), [], "text") + render(build(), [], "md")


def test_the_page_says_what_the_words_mean(build: Any) -> None:
    for results in (build(), elsewhere(build(), None)):
        page = render(results, [], "html")
        for word, meaning in (("Measured", "figures that do not say otherwise"), ("Compiled", "did not run"),
                              ("Estimated", "datasheet")):  # fmt: skip
            assert f"<b>{word}</b>" in page
            assert meaning in page


def test_tables_for_programs_keep_them_apart(build: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(render(elsewhere(build(), FITTED), [], "csv"))))
    assert rows[0]["estimated_floor_ms"] == ""
    assert float(rows[3]["estimated_floor_ms"]) == 0.0625 / 4
    assert [float(rows[3][f"estimated_ms{end}"]) for end in ("", "_low", "_high")] == [0.5, 0.25, 0.75]
    assert "p50_ms" not in rows[3]
    measured = list(csv.DictReader(io.StringIO(render(build(), [], "csv"))))
    assert not any(key.startswith("estimated") for key in measured[0])
    again = Results.model_validate(json.loads(render(elsewhere(build(), FITTED), [], "json"))["results"])
    assert again == elsewhere(build(), FITTED)


def test_verdicts_on_estimates_say_so(build: Any) -> None:
    results = elsewhere(build(), None)
    rules = [RuleFor("cpu-x86", "latency.p50", "max", limit, estimates=True) for limit in (0.01, 1.0)]
    verdicts = judge(results, rules)
    assert [v.verdict for v in verdicts] == ["fail", "inconclusive"]
    failure, open_ = ElementTree.fromstring(render(results, verdicts, "junit").encode())[0]
    assert "found ≥ 0.016 ms (estimated: a lower bound)" in str(failure[0].get("message"))
    assert (failure[0].tag, open_[0].tag) == ("failure", "error")
    assert [v["origin"] for v in json.loads(render(results, verdicts, "json"))["verdicts"]] == ["estimated"] * 2
    for format in ("html", "md"):
        page = render(results, verdicts, format).replace("\\", "")  # type: ignore[arg-type]
        assert "(estimated: a lower bound)" in page
