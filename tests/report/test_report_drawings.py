"""Drawings: places follow values, and nothing in them is lost or unescaped."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from edgekd.report import figures as f
from edgekd.report.history import training
from edgekd.report.model import Bar, Budget, Waterfall, prepare
from edgekd.report.svg import Mark, Scale, curve, scatter, ticks, waterfall
from edgekd.report.table import Quality

ACCURACY = Quality("accuracy", fraction=True, higher_is_better=True)


def circles(drawing: str) -> dict[str, tuple[float, float]]:
    root = ElementTree.fromstring(drawing)
    return {c[0].text.split(":")[0]: (float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")}  # type: ignore[index, union-attr, arg-type]


@pytest.mark.parametrize("spread", [1.5, 20.0])  # linear and logarithmic
def test_faster_is_left_and_better_is_up(spread: float) -> None:
    chance = random.Random(0)
    marks = [Mark(f"m{i}", "", chance.uniform(1, spread), chance.uniform(0.8, 0.95)) for i in range(12)]
    at = circles(scatter(marks, [], ACCURACY, (1000, 430)))
    by_x, by_y = sorted(marks, key=lambda m: m.x), sorted(marks, key=lambda m: m.y)
    assert [at[m.name][0] for m in by_x] == sorted(at[m.name][0] for m in marks)
    assert [at[m.name][1] for m in by_y] == sorted((at[m.name][1] for m in marks), reverse=True)
    assert all(0 < x < 1000 and 0 < y < 430 for x, y in at.values())


def test_the_field_that_the_gate_allows_holds_what_meets_it() -> None:
    marks = [Mark("slow", "", 4.0, 0.93), Mark("good", "", 1.0, 0.92), Mark("bad", "", 0.9, 0.89)]
    drawing = scatter(marks, [Budget("latency", 2.0, "p50"), Budget("quality", 0.91, "min")], ACCURACY, (1000, 430))
    field = next(r for r in ElementTree.fromstring(drawing).iter("rect") if r.get("class") == "allowed")
    x, y, width, height = (float(field.get(k, "")) for k in ("x", "y", "width", "height"))
    inside = {name for name, (cx, cy) in circles(drawing).items() if x <= cx <= x + width and y <= cy <= y + height}
    assert inside == {"good"}


def test_a_gate_far_away_does_not_squash_the_plot() -> None:
    marks = [Mark("a", "", 1.0, 0.92), Mark("b", "", 1.2, 0.93)]
    near, far = (scatter(marks, b, ACCURACY, (1000, 430)) for b in ([], [Budget("quality", 0.1, "min")]))
    assert circles(near) == circles(far)


def test_one_variant_twice_does_not_divide_by_zero() -> None:
    assert circles(scatter([Mark("a", "", 1.0, 0.9), Mark("b", "", 1.0, 0.9)], [], ACCURACY, (360, 330)))


def test_waterfall_bars_span_what_changed() -> None:
    bars = [Bar("teacher", None, 8.0, "8", "", None), Bar("distill", 8.0, 2.0, "2", "÷ 4", True)]
    bars += [Bar("quantize", 2.0, 3.0, "3", "× 1.5", False)]
    drawing = waterfall(Waterfall("latency", "", bars, zero=True))
    rects = [(r.get("class"), r.get("x"), r.get("width")) for r in ElementTree.fromstring(drawing).iter("rect")]
    assert ("better", "25.00%", "75.00%") in rects
    assert ("worse", "25.00%", "12.50%") in rects


def test_names_are_escaped_in_drawings() -> None:
    evil = '"><script>&'
    bars = [Bar(evil, None, 1.0, evil, "", None), Bar(evil, 1.0, 0.5, evil, evil, True)]
    for drawing in (
        scatter(
            [Mark(evil, evil, 1, 0.5), Mark(evil, evil, 2, 0.6)], [Budget("latency", 1.5, evil)], ACCURACY, (1000, 430)
        ),
        waterfall(Waterfall(evil, "", bars, zero=True)),
        curve([(1, 2), (2, 3)], "loss", evil),
    ):
        ElementTree.fromstring(drawing)
        assert "<script" not in drawing


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.088, 1.6, 7, log=True) == pytest.approx([0.1, 0.2, 0.5, 1.0])
    assert ticks(0.907, 0.948, 5) == pytest.approx([0.91, 0.92, 0.93, 0.94])


def test_log_scale_keeps_ratios() -> None:
    scale = Scale(1, 16, 0, 400, log=True)
    assert [scale(v) for v in (1, 2, 4, 8, 16)] == pytest.approx([0, 100, 200, 300, 400])


def test_stage_to_stage_changes(build) -> None:  # type: ignore[no-untyped-def]
    (view,) = prepare(build(), []).profiles
    falls = {w.title: [(b.name, b.change, b.better) for b in w.bars] for w in view.waterfalls}
    assert list(falls) == ["accuracy", "latency p50", "size", "MACs"]
    assert falls["latency p50"][1:] == [
        ("distill", "÷ 3.06", True),
        ("prune", "÷ 1.72", True),
        ("quantize", "÷ 1.96", True),
    ]
    assert falls["accuracy"][1] == ("distill", "−2.4 points", False)
    assert falls["MACs"][3] == ("quantize", "unchanged", None)


def test_training_curves_skip_what_is_not_a_number(build) -> None:  # type: ignore[no-untyped-def]
    lineage = build().lineage
    history = [*lineage[1].history, {"epoch": 30, "loss": float("nan"), "val.accuracy": None}]
    found = training([lineage[0], lineage[1].model_copy(update={"history": history})], "accuracy", True)
    assert [t.stage for t in found] == ["distill"]
    assert [c.name for c in found[0].curves] == ["validation accuracy", "training loss"]
    assert [len(c.points) for c in found[0].curves] == [30, 30]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.ms(1.213), "1.21"),
        (f.ms(0.0826), "0.0826"),
        (f.ms(123.4), "123"),
        (f.times(10.28), "10.3×"),
        (f.percent(0.9151), "91.5\u00a0%"),
        (f.points(-0.0004), "0.0"),
        (f.signed(-0.24, 1), "−0.2"),
        (f.signed(0.24, 1), "+0.2"),
        (f.compact(126_562_432), "127\u00a0M"),
        (f.compact(999), "999"),
        (f.mb(0.201), "0.201"),
        (f.mb(0.0123), "0.012"),
    ],
)
def test_figures(text: str, expected: str) -> None:
    assert text == expected


def test_labels_do_not_cover_each_other(build) -> None:  # type: ignore[no-untyped-def]
    marks = [Mark("teacher", "", 4.0, 0.94), Mark("distill", "", 1.00, 0.920), Mark("prune", "", 0.97, 0.919)]
    drawing = scatter(marks, [], ACCURACY, (360, 330))
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="name [a-z]+" text-anchor="(\w+)">(\w+)<', drawing)
    boxes = []
    for x, y, anchor, name in places:
        left = float(x) - {"start": 0, "middle": 3.5, "end": 7}[anchor] * len(name)
        boxes.append((left, float(y) - 12, left + 7 * len(name), float(y)))
    assert len(boxes) == 3
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
