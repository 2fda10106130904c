"""`edgekd search` from the command line: what it prints and leaves, and what is wrong before it begins."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekd.recipe import load_recipe

Call = Callable[..., Any]
RECIPE = """\
version = 1
name = "tiny"
data = { use = "digits", size = 8, batch = 128 }

[teacher]
model = { use = "cifar-resnet", depth = 8, width = 4 }
epochs = 1

[[stage]]
use = "distill"
model = { use = "cifar-resnet", depth = 8, width = 4 }
epochs = 1
objectives = ["ce", { use = "kl", tau = 2.0 }]

[search]
trials = 2
sampler = "random"
fields = { "stage.distill.objectives.kl.tau" = [1.0, 4.0] }
"""
LR = "stage.distill.lr=0.05..0.3:log"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("searching")
    (directory / "recipe.toml").write_text(RECIPE)
    return directory


def test_a_search_prints_trials_and_says_how_to_go_on(edgekd: Call, place: Path) -> None:
    done = edgekd("search", "recipe.toml", "--field", LR, cwd=place)
    assert done.code == 0, done.err
    head, *rows, summary = done.out.splitlines()
    assert head.split() == ["trial", "state", "accuracy", "epochs", "seconds", "tau", "lr"]
    assert [row.split()[1] for row in rows] == ["complete"] * 2
    figures = [float(row.split()[2]) for row in rows]
    assert figures == sorted(figures, reverse=True)
    assert re.fullmatch(rf"2 trials: 2 complete; the best, \d, has accuracy {figures[0]}\s% on validation", summary)
    assert done.err.count("[1/1] teacher") == 1
    assert re.findall(r"^trial (\d) of 2: tau = [14]\.?0?, lr = 0\.\d+$", done.err, re.MULTILINE) == ["0", "1"]
    assert "plot: runs/tiny-search/search.html" in done.err
    command = done.err.splitlines()[-1].split()
    assert command[:3] == ["edgekd", "run", "runs/tiny-search/best.toml"]
    there = edgekd("check", *command[2:], cwd=place)
    assert re.findall(r"^  (\w+) +complete ", there.out, re.MULTILINE) == ["teacher", "distill"]
    assert load_recipe(place / "runs" / "tiny-search" / "best.toml").search is None


def test_json_is_one_document(edgekd: Call, place: Path) -> None:
    done = edgekd("search", "recipe.toml", "--field", LR, "--json", cwd=place)
    document = json.loads(done.out)
    assert document == json.loads((place / "runs" / "tiny-search" / "trials.json").read_text())
    assert [t["number"] for t in document["trials"]] == [0, 1]
    assert set(document["trials"][0]) >= {"values", "value", "state", "epochs", "seconds", "seed"}


def test_check_validates_a_search_and_tells_of_it(edgekd: Call, place: Path, tmp_path: Path) -> None:
    checked = edgekd("check", "recipe.toml", cwd=place)
    assert checked.out.splitlines()[-1] == "search: 2 trials for accuracy of distill: runs/tiny-search"
    wrong = RECIPE.replace("objectives.kl.tau", "objectives.kl.tao")
    (tmp_path / "wrong.toml").write_text(wrong)
    refused = edgekd("check", "wrong.toml", cwd=tmp_path)
    assert refused.code == 2
    assert "error: search.fields.stage.distill.objectives.kl.tao: unknown" in refused.err
    assert "hint: did you mean 'tau'?" in refused.err
    schema = json.loads(edgekd("schema").out)
    assert {"fields", "trials", "stage", "metric"} <= set(schema["$defs"]["Search"]["properties"])
    validated = tmp_path / "schema.json"
    validated.write_text(json.dumps(schema))
    command = ["check_jsonschema", "--schemafile", str(validated), str(place / "recipe.toml")]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_without_optuna_the_extra_is_named(edgekd: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd import search

    for name in ("study", "results", "trial"):  # as if nothing had imported them yet
        monkeypatch.delitem(sys.modules, f"edgekd.search.{name}", raising=False)
        monkeypatch.delattr(search, name, raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = edgekd("search", "recipe.toml", cwd=place)
    assert done.code == 2
    assert done.err == "error: search: search needs optuna\nhint: pip install 'edgekd[search]'\n"


def test_a_search_is_not_one_of_several_processes(edgekd: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.ranks.launched", lambda: 2)
    done = edgekd("search", "recipe.toml", cwd=place)
    assert done.code == 2
    assert "hint: start `edgekd search` several times instead" in done.err
