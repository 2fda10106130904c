"""Latencies of a device with memory of its own: compute and transfers beside the whole call."""

from __future__ import annotations

import json

from edgekd.bench import Interval, Results
from edgekd.report.figures import NONE
from edgekd.report.markdown import COLUMNS as MARKDOWN
from edgekd.report.table import Quality, table_columns, table_rows
from edgekd.report.terminal import COLUMNS as TERMINAL

QUALITY = Quality("accuracy", True, True)
PARTS = {
    "compute": {"value": 0.125, "low": 0.12, "high": 0.13},
    "transfers": {"value": 0.05, "low": 0.049, "high": 0.051},
}


def with_parts(results: Results, name: str) -> Results:
    table = json.loads(results.model_dump_json())
    for variant in table["profiles"][0]["variants"]:
        if variant["name"] == name:
            variant["latency"]["parts"] = PARTS
    return Results.model_validate(table)


def columns(results: Results) -> list[str]:
    rows = table_rows(results.profiles[0], QUALITY)
    return [key for _, group in table_columns(rows, QUALITY) for key, _, _ in group]


def test_parts_are_shown_where_there_are_any(build):
    results = build()
    last = results.profiles[0].variants[-1].name
    assert not {"compute", "transfers"} & set(columns(results))
    shown = with_parts(results, last)
    assert {"compute", "transfers"} <= set(columns(shown))
    rows = {row.name: row.cells for row in table_rows(shown.profiles[0], QUALITY)}
    assert rows[last]["compute"].text == "0.125"
    assert rows[last]["transfers"].under.startswith("±")
    others = [cells for name, cells in rows.items() if name != last]
    assert all(cells["compute"].text == NONE for cells in others)


def test_parts_are_in_the_tables_of_all_formats():
    assert {"compute", "transfers"} <= set(MARKDOWN)
    assert {"compute", "transfers"} <= set(TERMINAL)


def test_parts_survive_the_file(build, tmp_path):
    results = with_parts(build(), build().profiles[0].variants[0].name)
    results.write(tmp_path / "results.json")
    latency = Results.read(tmp_path / "results.json").profiles[0].variants[0].latency
    assert latency.parts["compute"] == Interval(**PARTS["compute"])
