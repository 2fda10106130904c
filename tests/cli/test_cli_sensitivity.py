"""`edgekd sensitivity` of a run, a stage and an artifact: table, document, page, and what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd.artifact import Artifact
from edgekd.data.digits import digits
from edgekd.sweep import sensitivity

Call = Callable[..., Any]


@pytest.fixture
def narrow(project: Path) -> str:
    """A profile that likes any even number of channels."""
    (project / "narrow.toml").write_text('extends = "profile.toml"\nchannel_multiple = 2\n')
    return "narrow.toml"


def test_a_stage_as_table_document_and_page(finished: Any, edgekd: Call, narrow: str, tmp_path: Path) -> None:
    arguments = ["sensitivity", "runs/tiny:distill", "--profile", narrow, "--images", "24"]
    before = sorted(finished.directory.rglob("*"))
    done = edgekd(*arguments, "--json", "-o", str(tmp_path / "page.html"))
    assert done.code == 0, done.err
    document = json.loads(done.out)
    (distilled,) = finished.directory.glob("01-distill-*")
    assert document["version"] == 1
    assert (document["source"], document["stage"]) == (f"runs/tiny/{distilled.name}", "distill")
    assert (document["profile"], document["channel_multiple"], document["scheme"]) == ("narrow", 2, "x86-u8s8")
    assert (document["split"], document["images"], document["importance"]) == ("validation", 24, "magnitude")
    assert document["macs"] == Artifact.open(distilled).manifest.metrics["macs"]
    inner = {g["name"]: g for g in document["groups"] if g["steps"]}
    assert set(inner) == {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}
    assert [step["left"] for step in inner["layer1.0.conv1"]["steps"]] == [8, 6, 4, 2]
    assert all(g["steps"][0]["harm"] == 0 and g["steps"][-1]["harm"] > 0 for g in inner.values())
    assert "layer1.0" in [b["name"] for b in document["blocks"]]
    layers = {row["name"]: row for row in document["layers"]}
    assert set(layers) == {"conv1", "linear", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2))}
    assert sum(row["macs"] for row in layers.values()) == pytest.approx(1)
    assert (tmp_path / "page.html").read_text().count("<polyline") == 6
    assert sorted(finished.directory.rglob("*")) == before, "a run is not changed by looking at it"
    table = edgekd(*arguments, "-o", str(tmp_path / "document.json"))
    assert json.loads((tmp_path / "document.json").read_text()) == {k: v for k, v in document.items() if k != "version"}
    assert table.out.startswith("24 validation images, top-1 ")
    assert re.search(r"^layer3\.0\.conv1 +32 +[\d.]+ ", table.out, re.MULTILINE)


def test_a_run_is_its_last_float_network_and_python_gives_the_same(
    finished: Any, edgekd: Call, narrow: str, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    done = edgekd(
        "sensitivity", "runs/tiny", "--profile", narrow, "--images", "20", "--importance", "hessian", "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["stage"] == "prune"
    (pruned,) = finished.directory.glob("02-prune-*")
    widths = {g["name"]: g["channels_after"] for g in json.loads((pruned / "plan.json").read_text())["groups"]}
    assert {g["name"]: g["channels"] for g in document["groups"]} == {
        name: width for name, width in widths.items() if width
    }
    monkeypatch.chdir(project)
    same = sensitivity("runs/tiny", profile=narrow, images=20, importance="hessian")
    assert {"version": 1, **json.loads(json.dumps(same))} == document


def test_more_images_than_there_are_and_none_of_the_test_split(finished: Any, edgekd: Call, narrow: str) -> None:
    document = json.loads(edgekd("sensitivity", "runs/tiny:distill", "--images", "100000", "--json").out)
    data = digits(16)
    assert document["images"] < len(data.train)
    (distilled,) = finished.directory.glob("01-distill-*")
    assert document["accuracy"] == pytest.approx(Artifact.open(distilled).manifest.metrics["accuracy"])
    assert [g["name"] for g in document["groups"] if g["steps"]] == ["layer3.0.conv1"], "multiples of 16"


def test_other_data_are_measured_as_the_network_was_trained(
    finished: Any, edgekd: Call, narrow: str, tmp_path: Path
) -> None:
    (tmp_path / "cli_sensitivity_data.py").write_text(
        "import numpy as np\n"
        "def data():\n"
        "    images = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)\n"
        "    labels = np.arange(80) % 10\n"
        "    return {'train': (images[:60], labels[:60]), 'test': (images[60:], labels[60:]),\n"
        "            'classes': [str(i) for i in range(10)]}\n"
    )
    (artifact,) = finished.directory.glob("01-distill-*")
    done = edgekd(
        *("sensitivity", str(artifact), "--data", "cli_sensitivity_data:data", "--profile", "cpu-x86", "--json"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert 0 < document["images"] <= 10
    assert torch.isfinite(torch.tensor([row["harm"] for row in document["layers"]])).all()


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["none"], "no run, RUN:stage or artifact at none", "edgekd run"),
        (
            ["runs/tiny:quantize"],
            "a quantize artifact holds no float network",
            "teacher, distill, prune, fuse or average",
        ),
        (["runs/tiny:distill", "--profile", "cpu-x68"], "no profile 'cpu-x68'", "cpu-x86"),
        (["runs/tiny:distill", "--importance", "magnitud"], "no importance 'magnitud'", "'magnitude'"),
        (["runs/tiny:distill", "-o", "page.pdf"], "must end in .html or .json, got page.pdf", None),
        (["runs/tiny:distill", "-o", "nowhere/page.json"], "nowhere/page.json cannot be written", "that is there"),
        (["runs/tiny:distill", "--images", "0"], "--images", None),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    finished: Any, edgekd: Call, arguments: list[str], what: str, hint: str | None
) -> None:
    done = edgekd("sensitivity", *arguments)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert hint is None or hint in done.err
