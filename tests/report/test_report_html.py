"""The HTML page: well-formed, self-contained, escaped, and with the figures of results.json."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from edgekd.bench.results import Results
from edgekd.gate import judge, parse_rules
from edgekd.report import render

VOID = {"meta", "br", "hr", "img", "input", "link"}
RULES = {"accuracy": {"drop": 0.03}, "latency": {"p50": {"speedup": 6.5}}, "size_mb": {"max": 0.1}}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text, attributes and table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th") and self.cell is not None:
            self.rows[-1].append(" ".join(" ".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += f" {data}"
        if self.cell is not None:
            self.cell.append(data)


def page(results: Results, rules: dict[str, Any] | None = None) -> tuple[str, Page]:
    parsed, problems = parse_rules(RULES if rules is None else rules, [p.profile for p in results.profiles])
    assert not problems
    text = render(results, judge(results, parsed), "html")
    return text, Page(text)


def test_the_page_is_balanced_self_contained_and_small(build: Any) -> None:
    text, parsed = page(build(profiles=("cpu-x86", "other")))
    assert len(text.encode()) < 1_000_000
    assert not [t for t, _ in parsed.tags if t in ("script", "link", "img", "iframe", "object")]
    assert not [a for _, a in parsed.tags if a.keys() & {"src", "href", "srcset", "data", "action"}]
    assert "url(" not in text
    assert "@import" not in text
    assert "//" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
    assert not [a for _, attributes in parsed.tags for a in attributes if a.startswith("on")]


def test_figures_are_those_of_the_results(build: Any) -> None:
    results = build()
    _, parsed = page(results)
    rows = {row[0].split()[0]: row for row in parsed.rows if row and row[0]}
    head = next(row for row in parsed.rows if row and row[0] == "variant")
    for v in results.profiles[0].variants:
        cells = dict(zip(head, rows[v.name], strict=True))
        number = {
            k: float(re.match(r"[\d.,]+", c).group().replace(",", "")) for k, c in cells.items() if c[:1].isdigit()
        }  # type: ignore[union-attr]
        assert number["accuracy"] == pytest.approx(100 * v.metrics["accuracy"], abs=0.051)
        assert number["p50 ms"] == pytest.approx(v.latency.p50.value, rel=0.005)
        assert number["p95 ms"] == pytest.approx(v.latency.p95.value, rel=0.005)
        assert number["size MB"] == pytest.approx(v.size_mb, rel=0.005)
        assert number["memory MB"] == v.peak_memory_mb
        assert number["MACs ×"] == pytest.approx(results.profiles[0].variants[0].macs / v.macs, rel=0.005)
        assert cells["layers int8 / float"] == f"{v.layers['int8']} / {v.layers['float']}"
        if v.speedup:
            assert number["latency ×"] == pytest.approx(v.speedup.value, rel=0.005)
            assert number["lost points"] == pytest.approx(100 * v.drop.value, abs=0.051)


def test_the_head_says_what_was_gained_where_it_was_measured_and_the_gate(build: Any) -> None:
    _, parsed = page(build())
    text = " ".join(parsed.text.split())
    assert "10.3× faster, 17.2× smaller, accuracy 94.4 % → 91.5 %" in text
    assert "measured on AMD EPYC 9B45 · ONNX Runtime 1.32.0 · 1 thread · batch 1 · 12 rounds interleaved" in text
    assert "✕ gate fails" in text
    assert "edgekd run runs/cifar10-edge/recipe.toml" in text
    assert "latency × 10.3×" in text
    assert "MACs × 6.17×" in text


@pytest.mark.parametrize(
    ("rules", "badge"),
    [
        ({}, "no gate"),
        ({"size_mb": {"max": 1}}, "gate passes"),
        ({"latency": {"p50": {"speedup": 10.28}}}, "inconclusive"),
    ],
)
def test_badges(build: Any, rules: dict[str, Any], badge: str) -> None:
    _, parsed = page(build(), rules)
    assert badge in parsed.text


def test_hostile_names_stay_text(build: Any) -> None:
    evil = "<script>alert('1')</script>&\"'"
    environment = {evil: {evil: [evil, None]}}
    results = build(
        names={"prune": evil, "quantize": evil + "2"}, name=evil, classes=[evil], command=evil, environment=environment
    )
    text, parsed = page(results)
    assert "<script" not in text
    assert parsed.text.count("<script>") >= 8
    assert not [t for t, _ in parsed.tags if t == "script"]


def test_a_file_alone_and_a_file_without_data_are_shown_without_comparisons(build: Any) -> None:
    whole = build()
    profile = whole.profiles[0]
    alone = profile.variants[0].model_copy(update={"metrics": {}, "macs": None, "throughput": {}, "layers": {}})
    results = whole.model_copy(
        update={"profiles": [profile.model_copy(update={"variants": [alone]})], "lineage": [], "classes": []}
    )
    _, parsed = page(results, {})
    assert "What each stage changed" not in parsed.text
    assert "against latency" not in parsed.text
    assert "p50 1.21 ms" in parsed.text


def test_nothing_measured_still_gives_a_page(build: Any) -> None:
    whole = build()
    empty = whole.profiles[0].model_copy(update={"variants": []})
    _, parsed = page(whole.model_copy(update={"profiles": [empty]}), {})
    assert "nothing was measured" in parsed.text


def test_p99_of_too_few_samples_is_said(build: Any) -> None:
    whole = build()
    variants = [
        v.model_copy(update={"latency": v.latency.model_copy(update={"p99": None})})
        for v in whole.profiles[0].variants[1:]
    ]
    profile = whole.profiles[0].model_copy(update={"variants": [whole.profiles[0].variants[0], *variants]})
    _, parsed = page(whole.model_copy(update={"profiles": [profile]}), {})
    assert parsed.text.count("too few") == 3
