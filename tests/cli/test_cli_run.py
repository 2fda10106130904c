"""`edgekd run` and `check`: what they print, leave, skip and return."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekd.artifact import Artifact
from edgekd.recipe import load_recipe

Call = Callable[..., Any]
STAGES = ["teacher", "distill", "prune", "quantize", "export"]


def test_a_run_leaves_what_the_design_says(finished: Any, project: Path) -> None:
    there = {re.sub(r"-[0-9a-f]{12}$", "", p.name) for p in finished.directory.iterdir() if p.name[0] != "."}
    assert there == {
        *(f"{i:02d}-{name}" for i, name in enumerate(STAGES)),
        *("recipe.toml", "results.json", "gate.json", "report.html", "samples.json", "events.jsonl"),
    }
    assert load_recipe(finished.directory / "recipe.toml") == load_recipe(project / "recipe.toml")
    results = json.loads((finished.directory / "results.json").read_text())
    variants = results["profiles"][0]["variants"]
    assert [v["name"] for v in variants] == STAGES[:-1]
    assert variants[-1]["precision"] == "int8"
    assert variants[-1]["layers"]["float"] == 0
    assert results["test_images"] == 359
    assert results["command"] == "edgekd run recipe.toml"
    export = Artifact.open(next(finished.directory.glob("04-export-*")))
    assert export.manifest.metrics["argmax_agreement"] >= 0.995


def test_stdout_is_data_and_stderr_is_progress(finished: Any) -> None:
    out, err = finished.outcome.out, finished.outcome.err
    assert [line.split()[0] for line in out.splitlines()[2:6]] == STAGES[:-1]
    assert re.search(r"^pass +size_mb max .* allowed ≤ 1\.00 MB +found 0\.0\d MB$", out, re.MULTILINE)
    assert "epoch" not in out
    assert [line for line in err.splitlines() if line.startswith("[")] == [
        f"[{i + 1}/5] {name}" for i, name in enumerate(STAGES)
    ]
    assert "images/s (loader alone" in err
    assert "report: runs/tiny/report.html" in err
    assert "\x1b" not in out + err  # no terminal, no colours


def test_running_again_does_nothing_again(finished: Any, project: Path, edgekd: Call) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.directory.rglob("model.*")}
    results = (finished.directory / "results.json").read_bytes()
    again = edgekd("run", "recipe.toml")
    assert again.code == 0
    assert again.err.count("complete, skipped") == 5
    assert "nothing changed, not measured again" in again.err
    assert again.out == finished.outcome.out
    assert {p: p.stat().st_mtime_ns for p in finished.directory.rglob("model.*")} == before
    assert (finished.directory / "results.json").read_bytes() == results


def test_json_of_a_run_is_one_event_a_line(finished: Any, edgekd: Call) -> None:
    lines = [json.loads(line) for line in edgekd("run", "recipe.toml", "--json").out.splitlines()]
    assert [e["event"] for e in lines] == ["stage"] * 5 + ["measured", "result"]
    assert {e["version"] for e in lines} == {1}
    assert lines[-1]["results"]["name"] == "tiny"
    assert [v["verdict"] for v in lines[-1]["verdicts"]] == ["pass"]


def test_a_changed_profile_is_measured_again_and_nothing_else(
    finished: Any, tmp_path: Path, project: Path, edgekd: Call
) -> None:
    run = finished.copy(tmp_path / "run")
    (tmp_path / "profile.toml").write_text((project / "profile.toml").read_text().replace("rounds = 3", "rounds = 4"))
    again = edgekd("run", str(run / "recipe.toml"), "-o", str(run), cwd=tmp_path)
    assert again.code == 0
    assert again.err.count("complete, skipped") == 5
    assert "not measured again" not in again.err
    assert json.loads((run / "results.json").read_text())["profiles"][0]["rounds"] == 4


def test_stages_by_name_print_where_the_artifact_lies(finished: Any, edgekd: Call) -> None:
    for command in (["teacher", "recipe.toml"], ["distill", "recipe.toml"], ["run", "recipe.toml", "--until", "prune"]):
        done = edgekd(*command)
        assert done.code == 0
        artifact = Artifact.open(done.out.strip())
        assert artifact.manifest.kind == {"run": "prune"}.get(command[0], command[0])


@pytest.mark.parametrize(
    ("arguments", "where", "hint"),
    [
        (["--until", "exprot"], "no stage 'exprot'", "did you mean 'export'?"),
        (["--from", "distil"], "no stage 'distil'", "did you mean 'distill'?"),
        (["--from", "export", "--until", "prune"], "--from export comes after --until prune", "the order is: teacher"),
        (["--set", "stage.prun.heal.epochs=1"], "no such entry, got 'prun'", "there are: distill, prune"),
        (["--set", "epochs"], "--set wants key=value", "stage.distill.epochs=3"),
    ],
)
def test_arguments_that_name_nothing(finished: Any, edgekd: Call, arguments: list[str], where: str, hint: str) -> None:
    done = edgekd("run", "recipe.toml", *arguments)
    assert (done.code, done.out) == (2, "")
    assert where in done.err
    assert hint in done.err


def test_check_prints_the_plan_and_trains_nothing(finished: Any, edgekd: Call) -> None:
    checked = edgekd("check", "recipe.toml")
    lines = checked.out.splitlines()
    assert checked.code == 0
    assert lines[0] == "tiny: 10 classes, 3x16x16"
    assert lines[1] == "images: 1,294 training, 144 validation, 359 test"
    assert [line.split()[:2] for line in lines[2:]] == [[name, "complete"] for name in STAGES]
    changed = json.loads(edgekd("check", "recipe.toml", "--set", "stage.prune.target.macs=0.7", "--json").out)
    assert changed["version"] == 1
    assert [(s["stage"], s["done"]) for s in changed["stages"]] == [
        *((name, True) for name in STAGES[:2]),
        *((name, False) for name in STAGES[2:]),
    ]
    assert changed["stages"][2]["config"]["target"]["macs"] == 0.7
    assert not Path(changed["stages"][2]["directory"]).exists()
