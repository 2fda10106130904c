"""`edgekd students` and `edgekd check` of a recipe that leaves its student to measurement, with a real measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
GRID = ["--family", "cifar-resnet", "--depths", "8", "--widths", "4,8", "--precision", "fp32"]
PROFILE = """\
extends = "cpu-x86"
description = "as little measuring as can be"
channel_multiple = 64
precisions = ["fp32"]
"""
RECIPE = """\
version = 1
name = "tiny"
profiles = ["quick.toml"]
data = { use = "digits", size = 8, batch = 128 }

[teacher]
model = { use = "cifar-resnet", depth = 14, width = 8 }
epochs = 1

[[stage]]
use = "distill"
model = { use = "auto", family = "cifar-resnet", p50_ms = 1000.0, precision = "fp32" }
epochs = 1
"""


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, and a measurement that does not wait for a busy machine."""
    from edgekd.students import families, table

    directory = tmp_path_factory.getbasetemp() / "students-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    monkeypatch.setattr(table, "CAP_S", 1.0)
    monkeypatch.setattr(table, "ROUNDS", 3)
    monkeypatch.setitem(
        families.FAMILIES,
        "cifar-resnet",
        families.FAMILIES["cifar-resnet"]._replace(grid=lambda multiple: [(8, 4), (8, 8)]),
    )
    return directory / "edgekd"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("choosing")
    (directory / "recipe.toml").write_text(RECIPE)
    (directory / "quick.toml").write_text(PROFILE)
    return directory


def test_a_family_is_measured_shown_and_kept(edgekd: Call, place: Path, kept: Path) -> None:
    done = edgekd("students", *GRID, "--recipe", "recipe.toml", "-o", "front.html", cwd=place)
    assert done.code == 0, done.err
    how, head, *rows, against, legend = done.out.splitlines()
    assert how.startswith("quick · ")
    assert head.split()[:5] == ["student", "depth", "width", "params", "MACs"]
    assert {re.search(r"cifar-resnet-\S+", row).group() for row in rows} == {"cifar-resnet-8x4", "cifar-resnet-8x8"}
    assert against.startswith("speed-ups are against the teacher in fp32: ")
    assert "not its accuracy" in legend
    (file,) = kept.glob("students-cifar-resnet-*.json")
    assert f"kept in {file}" in done.err
    assert "<svg" in (place / "front.html").read_text()
    before = file.read_bytes()
    again = edgekd("students", *GRID, "--recipe", "recipe.toml", "--json", "-o", "front.json", cwd=place)
    document = json.loads(again.out)
    assert document == json.loads((place / "front.json").read_text())
    assert [front["profile"] for front in document["fronts"]] == ["quick"]
    assert document["fronts"][0]["size"] == [3, 8, 8]
    assert file.read_bytes() == before  # nothing was measured again


def test_check_prints_the_student_that_a_run_will_have(edgekd: Call, place: Path) -> None:
    done = edgekd("check", "recipe.toml", cwd=place)
    assert done.code == 0, done.err
    told = re.search(
        r"^student of distill: (\S+): p50 .* ms \[.*\], .*, fp32, measured on quick, ", done.out, re.MULTILINE
    )
    assert told, done.out
    assert told.group(1) == "cifar-resnet-8x8"
    rows = json.loads(edgekd("check", "recipe.toml", "--json", cwd=place).out)["stages"]
    assert rows[0]["student"] is None
    assert rows[1]["student"]["model"] == {"use": "cifar-resnet", "depth": 8, "width": 8}
    assert rows[1]["config"]["model"] == rows[1]["student"]["model"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--family", "resnet"], "--family: no family 'resnet'"),
        (["--family", "vit", "--size", "32,32"], "--size: expected channels, height and width"),
        (["--family", "vit", "--size", "3,x,32"], "--size: expected numbers above 0"),
        (["--family", "vit", "--depths", "2.5"], "--depths: expected whole numbers"),
        (["--family", "vit", "-o", "front.pdf"], "--out: must end in .html or .json"),
        (["--family", "vit", "-o", "nowhere/front.html"], "--out: nowhere/front.html cannot be written"),
        (["--family", "vit", "--precision", "int8", "--profile", "quick.toml"], "--precision: 'int8' is not measured"),
    ],
)
def test_wrong_options_are_refused(edgekd: Call, place: Path, arguments: list[str], told: str) -> None:
    done = edgekd("students", *arguments, cwd=place)
    assert done.code == 2
    assert told in done.err
