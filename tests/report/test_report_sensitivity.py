"""The page and the table of a sensitivity sweep, from a document as `edgekd sensitivity --json` gives it."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise
from typing import Any

import pytest

from edgekd.report.sensitivity import harm_at, sensitivity_html, sensitivity_text


def group(name: str, harms: list[float], reason: str | None = None) -> dict[str, Any]:
    steps = [{"left": 16 - 4 * i, "macs": 1 - 0.05 * i, "harm": harm, "drop": 0.01 * i} for i, harm in enumerate(harms)]
    return {"name": name, "layers": [name], "channels": 32, "units": 16, "steps": steps, "reason": reason}


@pytest.fixture
def document() -> dict[str, Any]:
    groups = [group("layer<2>", [0, 0.1, 1.0, 2.0]), group("layer1", [0, 0.001, 0.01, 0.1]), group("head", [], "stays")]
    blocks = [
        {"name": "block.1", "macs": 0.25, "harm": 0.5, "drop": 0.125, "reason": None},
        {"name": "block.2", "macs": None, "harm": None, "drop": None, "reason": "protected"},
    ]
    layers = [
        {"name": "conv", "macs": 0.4, "harm": 0.02, "drop": -0.01},
        {"name": "fc", "macs": 0.1, "harm": 0.005, "drop": 0.0},
    ]
    told = {"importance": "fpgm", "channel_multiple": 8, "scheme": "x86-u8s8", "accuracy": 0.875, "macs": 1_500_000}
    where = {"source": "runs/<x>/01-distill", "stage": "distill", "profile": "p", "split": "validation", "images": 1200}
    none = {"not_pruned": None, "not_quantized": None}
    return {**where, **told, "groups": groups, "blocks": blocks, "layers": layers, **none}


def test_harm_lies_on_straight_lines_between_the_steps_and_nowhere_beyond(document: dict[str, Any]) -> None:
    first = document["groups"][0]
    assert [harm_at(first, share) for share in (0, 0.25, 0.5, 0.75)] == [0, 0.1, 1.0, 2.0]
    assert harm_at(first, 0.375) == pytest.approx(0.55)
    assert harm_at(first, 0.8) is None
    assert harm_at(document["groups"][2], 0.5) is None


def rows(text: str, title: str) -> list[list[str]]:
    block = text[text.index(title) :].split("\n\n")[0]
    return [re.split(r"  +", line) for line in block.splitlines()[1:]]


def test_the_table_says_harm_drop_and_macs(document: dict[str, Any]) -> None:
    text = sensitivity_text(document)
    assert text.startswith("1,200 validation images, top-1 87.5\u00a0% as it is · 1.50\u00a0M MACs · channels by fpgm")
    head, first, second = rows(text, "groups of channels")
    assert head == ["group", "channels", "1/4", "1/2", "3/4", "most", "drop, points", "left", "saves MACs"]
    assert first == ["layer<2>", "32", "0.10", "1.0", "2.0", "2.0", "3.0", "8", "15.0\u00a0%"]
    assert second[:6] == ["layer1", "32", "0.0010", "0.010", "0.10", "0.10"]
    assert rows(text, "blocks: ") == [
        ["block", "harm", "drop, points", "saves MACs"],
        ["block.1", "0.50", "12.5", "25.0\u00a0%"],
    ]
    assert rows(text, "layers: ")[1] == ["conv", "0.020", "−1.0", "40.0\u00a0%"]
    assert text.endswith("left alone\n  head: stays\n  block.2: protected\n")


def lines(page: str) -> dict[str, list[tuple[float, float]]]:
    """Points of every line of the wide drawing, by its class."""
    wide = page[page.index('class="wide"') : page.index('class="narrow"')]
    return {
        css: [tuple(map(float, point.split(","))) for point in points.split()]
        for points, css in re.findall(r'<polyline points="([^"]+)" class="([^"]+)">', wide)
    }


def test_the_drawing_is_logarithmic_in_harm_and_linear_in_what_is_left(document: dict[str, Any]) -> None:
    drawn = lines(sensitivity_html(document))
    assert set(drawn) == {"series s0", "series s1"}
    harmful, other = drawn["series s0"], drawn["series s1"]
    assert [b[0] - a[0] for a, b in pairwise(harmful)] == pytest.approx([230] * 3, abs=0.2)
    decade = harmful[1][1] - harmful[2][1]
    assert decade > 50
    assert harmful[2][1] - harmful[3][1] == pytest.approx(decade * math.log10(2), abs=0.2)
    assert other[1][1] - harmful[1][1] == pytest.approx(2 * decade, abs=0.2)
    assert harmful[0] == other[0], "with all channels there is no harm: at the foot"


def test_the_page_shows_every_table_and_escapes_names(document: dict[str, Any]) -> None:
    page = sensitivity_html(document)
    assert "<h1>runs/&lt;x&gt;/01-distill</h1>" in page
    assert "layer<2>" not in page
    assert len(re.findall(r"<table>", page)) == 3
    widths = re.findall(r'<rect x="0" y="\d+" width="([\d.]+)%" height="8" class="worse"/>', page)
    assert widths == ["100.0", "100.0", "25.0"]
    assert "<dt>head</dt><dd>stays</dd>" in page
    assert "http" not in page.replace("http-equiv", "")
    assert len(page) < 60_000


def test_groups_beyond_those_with_a_colour_are_grey(document: dict[str, Any]) -> None:
    many = [group(f"g{i}", [0, 0.1 / (i + 1), 1.0 / (i + 1)]) for i in range(9)]
    page = sensitivity_html({**document, "groups": many})
    wide = page[page.index('class="wide"') : page.index('class="narrow"')]
    assert wide.count('class="run"') == 3
    assert page.count('class="swatch') == 6


def test_a_network_of_which_nothing_can_go_or_be_quantized(document: dict[str, Any]) -> None:
    nothing = copy.deepcopy(document)
    nothing |= {"groups": [document["groups"][2]], "blocks": [], "layers": [], "accuracy": None}
    nothing["not_quantized"] = "torch.export cannot follow it"
    text = sensitivity_text(nothing)
    assert "groups of channels" not in text
    assert text.endswith("left alone\n  head: stays\n  not quantized: torch.export cannot follow it\n")
    page = sensitivity_html(nothing)
    assert "<svg" not in page
    assert "not quantized" in page


def test_a_sweep_without_harm_draws_no_lines(document: dict[str, Any]) -> None:
    assert lines(sensitivity_html({**document, "groups": [group("a", [0, 0.1])]}))
    page = sensitivity_html({**document, "groups": [group("a", [0, 0.0, 0.0])]})
    assert "<polyline" not in page
