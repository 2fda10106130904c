"""The page and the table of a search, from a record as `trials.json` holds it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edgekd.report.trial_plots import short_names
from edgekd.report.trials import trials_html, trials_text

LR, TAPS = "stage.distill.lr", "stage.distill.objectives.1.student"


def trial(number: int, state: str, value: float | None, curve: list[float], lr: float, taps: str) -> dict[str, Any]:
    points = [[i + 1, v] for i, v in enumerate(curve)]
    common = {"seconds": 1.25, "seed": 0, "directory": f"runs/x/{number}", "epochs": len(curve), "curve": points}
    error = "the loss became nan" if state == "failed" else None
    return {"number": number, "state": state, "value": value, "values": {LR: lr, TAPS: taps}, "error": error, **common}


@pytest.fixture
def document() -> dict[str, Any]:
    trials = [
        trial(0, "complete", 0.81, [0.5, 0.81], 0.01, "layer1"),
        trial(1, "failed", None, [], 100.0, "layer2"),
        trial(2, "complete", 0.92, [0.7, 0.92], 0.1, "layer<2>"),
        trial(3, "pruned", None, [0.31], 0.0001, "layer1"),
    ]
    fields = {LR: {"low": 0.0001, "high": 100.0, "log": True}, TAPS: {"choices": ["layer1", "layer2", "layer<2>"]}}
    best = {k: trials[2][k] for k in ("number", "value", "values", "directory")}
    place = {"name": "a <b>", "study": "x", "directory": "runs/x", "stage": "distill"}
    judged = {"metric": "accuracy", "direction": "max", "best": best, "importance": {LR: 0.75, TAPS: 0.25}}
    return {**place, **judged, "fields": fields, "trials": trials}


def circles(page: str, css: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" class="trial {css}">', page)
    return [(float(x), float(y)) for x, y in found]


def test_every_trial_is_drawn_where_it_belongs(document: dict[str, Any]) -> None:
    page = trials_html(document)
    wide = page[page.index("Trials in their order") : page.index("<h2>Training")]
    wide = wide[: wide.index('class="narrow"')]
    (pruned,), (other,), (best,) = (circles(wide, css) for css in ("pruned", "complete", "best"))
    assert other[0] < best[0] < pruned[0], "by number"
    assert best[1] < other[1] < pruned[1], "better is higher"
    assert (other[1] - best[1]) / (pruned[1] - best[1]) == pytest.approx((0.92 - 0.81) / (0.92 - 0.31), abs=0.01)
    assert wide.count('class="cross"') == 2
    assert "trial 1: failed" in wide


def test_a_logarithmic_field_has_a_logarithmic_axis(document: dict[str, Any]) -> None:
    page = trials_html(document)
    drawing = next(d for d in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if f"accuracy against {LR}" in d)
    (pruned,), (other,), (best,) = (circles(drawing, css) for css in ("pruned", "complete", "best"))
    assert other[0] - pruned[0] == pytest.approx(2 * (best[0] - other[0]), abs=0.3), "two decades, then one"
    assert re.findall(r'class="tick" text-anchor="middle">([^<]+)<', drawing)[0] == "0.0001"


def test_the_page_needs_no_network_and_escapes_what_users_named(document: dict[str, Any]) -> None:
    page = trials_html(document)
    assert not re.search(r"https?://|src=|url\(|@import", page)
    assert "<script" not in page
    assert "<b>" not in page
    assert "layer<2>" not in page
    assert "layer&lt;2&gt;" in page
    assert "75" in page[page.index("Which field matters") :]
    assert trials_html({**document, "trials": [], "best": None, "importance": {}}).count("<figure") == 0


def test_where_less_is_better_the_lowest_is_first(document: dict[str, Any]) -> None:
    text = trials_text({**document, "metric": "loss", "direction": "min"})
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["0", "2", "3", "1"]


def test_the_table_has_the_best_first(document: dict[str, Any]) -> None:
    head, *rows, summary = trials_text(document).splitlines()
    assert head.split() == ["trial", "state", "accuracy", "epochs", "seconds", "lr", "student"]
    assert [row.split()[:2] for row in rows] == [["2", "complete"], ["0", "complete"], ["3", "pruned"], ["1", "failed"]]
    assert summary.replace("\u00a0", " ") == (
        "4 trials: 2 complete, 1 failed, 1 pruned; the best, 2, has accuracy 92.0 % on validation"
    )
    many = {**document, "trials": [{**document["trials"][0], "number": n} for n in range(14)]}
    assert "... and 4 more" in trials_text(many)


def test_short_names_are_told_apart() -> None:
    names = short_names([LR, "stage.prune.heal.lr", TAPS])
    assert list(names.values()) == ["distill.lr", "heal.lr", "student"]
