"""The Markdown report, and the JSON one."""

from __future__ import annotations

import json
import re
from typing import Any

from edgekd.gate import judge, parse_rules
from edgekd.report import render
from edgekd.report.markdown import code, escape


def cells(line: str) -> list[str]:
    return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def markdown(results: Any, table: dict[str, Any]) -> str:
    rules, problems = parse_rules(table, ["cpu-x86"])
    assert not problems
    return render(results, judge(results, rules), "md")


def test_every_table_has_its_columns_in_every_row(build: Any) -> None:
    evil = "pr|une\n<b>`*x*`"
    text = markdown(build(names={"prune": evil}, classes=["a|b"]), {"size_mb": {"max": 0.1}})
    tables = [t.splitlines() for t in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)]
    assert len(tables) == 4
    for table in tables:
        assert len({len(cells(line)) for line in table}) == 1
        assert all(set(c) <= set("-:") for c in cells(table[1]))
    assert "<b>" not in text


def test_the_table_shows_macs_beside_latency_and_the_final_row_in_bold(build: Any) -> None:
    lines = markdown(build(), {}).splitlines()
    header = next(line for line in lines if line.startswith("| variant"))
    at = cells(header).index("latency ×")
    assert cells(header)[at + 1] == "MACs ×"
    final = cells(next(line for line in lines if line.startswith("| **")))
    assert final[0] == "**quantize (int8)**"
    assert final[at : at + 2] == ["10.3× \\[10.2, 10.3\\]", "6.17×"]


def test_the_gate_is_in_the_title_and_hints_follow(build: Any) -> None:
    text = markdown(build(), {"size_mb": {"max": 0.1}})
    assert text.startswith("<!-- edgekd -->\n\n## cifar10-edge · ❌ gate fails\n")
    assert "| ❌ **fail** | size\\_mb max | ≤ 0.10 MB | 0.20 MB |" in text
    assert "- hint: 2.01x to go" in text
    assert "gate" not in markdown(build(), {}).splitlines()[0]


def test_escaping() -> None:
    assert escape("a|b\n<i>*_`") == r"a\|b &lt;i&gt;\*\_\`"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"


def test_json_is_one_document_with_the_same_figures(build: Any) -> None:
    results = build()
    rules, _ = parse_rules({"size_mb": {"max": 0.1}}, ["cpu-x86"])
    verdicts = judge(results, rules)
    table = json.loads(render(results, verdicts, "json"))
    assert table["schema_version"] == 1
    assert type(results).model_validate(table["results"]) == results
    assert [type(verdicts[0]).model_validate(v) for v in table["verdicts"]] == verdicts
