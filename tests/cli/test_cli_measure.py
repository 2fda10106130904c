"""`edgekd bench`, `gate` and `report`, on runs, stages, artifacts and ONNX files, ours or not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def run(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run that these tests may change."""
    return finished.copy(tmp_path_factory.mktemp("measured") / "run")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody else's classifier: x [n, 3, 16, 16] -> y [n, 10], other names, no metadata."""
    path = tmp_path_factory.mktemp("foreign") / "theirs.onnx"
    weights = np.random.default_rng(0).standard_normal((768, 10)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])],
        "theirs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def variants(document: dict[str, Any]) -> dict[str, Any]:
    (profile,) = document["profiles"]
    return {v["name"]: v for v in profile["variants"]}


def test_bench_of_a_run_renews_its_documents(run: Path, edgekd: Call) -> None:
    before = json.loads((run / "results.json").read_text())
    done = edgekd("bench", str(run), "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["version"] == 1
    assert list(variants(document)) == ["teacher", "distill", "prune", "quantize"]
    assert {k: v for k, v in document.items() if k != "version"} == json.loads((run / "results.json").read_text())
    for name, found in variants(document).items():
        assert found["metrics"] == variants(before)[name]["metrics"]  # the same files on the same images
    assert document["profiles"] != before["profiles"]  # measured anew
    assert "profile" in done.err or "accuracy of" in done.err


def test_bench_on_another_profile_ignores_rules_of_this_one(run: Path, tmp_path: Path, edgekd: Call) -> None:
    text = (run / "recipe.toml").read_text().replace("[gate]\n", "[gate]\nprofile = { parameters = { max = 1 } }\n")
    (run / "recipe.toml").write_text(text)
    other = tmp_path / "other.toml"
    other.write_text('extends = "profile.toml"\nthreads = 2\n')
    done = edgekd("bench", str(run), "--profile", str(other), "-o", str(tmp_path / "results.json"))
    assert done.code == 0, done.err
    assert "other · measured" in done.out
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["profiles"][0]["settings"]["threads"] == 2
    assert [v["rule"] for v in json.loads((run / "gate.json").read_text())["verdicts"]] == ["size_mb max"]


def test_bench_of_stages_artifacts_and_files_together(
    finished: Any, foreign: Path, tmp_path: Path, edgekd: Call
) -> None:
    run = finished.copy(tmp_path / "run")
    artifact = next(run.glob("04-export-*"))
    out = tmp_path / "results.json"
    paths = [f"{run}:teacher", f"{run}:distill", str(artifact), str(foreign)]
    done = edgekd("bench", *paths, "--json", "-o", str(out))
    assert done.code == 0, done.err
    document = json.loads(done.out)
    found = variants(document)
    assert list(found) == ["teacher", "distill", "export", "theirs"]
    assert document["profiles"][0]["profile"] == "profile"  # the recipe's
    earlier = variants(json.loads((run / "results.json").read_text()))
    assert found["distill"]["metrics"] == earlier["distill"]["metrics"]
    assert found["export"]["metrics"] == earlier["quantize"]["metrics"]
    assert 0 <= found["theirs"]["metrics"]["accuracy"] < 0.5  # random weights
    assert found["theirs"]["key"] == ""
    assert found["theirs"]["speedup"]["value"] > 0
    assert found["teacher"]["speedup"] is None or found["teacher"]["speedup"]["value"] == 1
    assert json.loads(out.read_text())["name"] == document["name"]


def test_bench_of_somebody_elses_file_alone(foreign: Path, edgekd: Call) -> None:
    alone = variants(json.loads(edgekd("bench", str(foreign), "--profile", "profile.toml", "--json").out))
    assert alone["theirs"]["metrics"] == {}
    assert alone["theirs"]["latency"]["p50"]["value"] > 0
    with_data = edgekd("bench", str(foreign), "--recipe", "recipe.toml", "--json")
    assert "accuracy" in variants(json.loads(with_data.out))["theirs"]["metrics"]


def test_offline_a_whole_set_at_once_and_every_call_kept(foreign: Path, tmp_path: Path, edgekd: Call) -> None:
    profile, out = tmp_path / "p.toml", tmp_path / "results.json"
    protocol = (
        'rounds = 3\nprecision = 10.0\nblock_s = 0.01\nwarmup_s = 0.01\nbatches = [64]\nscenarios = ["offline"]\n'
    )
    profile.write_text(f'extends = "cpu-x86"\naffinity = [{min(os.sched_getaffinity(0))}]\n[protocol]\n{protocol}')
    done = edgekd("bench", str(foreign), "--profile", str(profile), "--json", "-o", str(out))
    assert done.code == 0, done.err
    found = variants(json.loads(done.out))["theirs"]
    assert found["throughput"] == {}
    assert found["offline"]["low"] <= found["offline"]["value"] <= found["offline"]["high"]
    assert found["offline"]["value"] > 64 / 1.0
    assert found["load_ms"]["value"] > 0
    assert {"MatMul", "Gemm"} & {row["op"] for row in found["layer_times"]}
    samples = json.loads((tmp_path / "results.samples.json").read_text())
    assert samples["unit"] == "ms"
    assert sum(map(len, samples["profiles"]["p"]["theirs"])) == found["latency"]["samples"]


def test_bench_of_a_file_inside_an_artifact_knows_its_data(finished: Any, edgekd: Call) -> None:
    file = next(finished.directory.glob("04-export-*/model.onnx"))
    found = variants(json.loads(edgekd("bench", str(file), "--json").out))["model"]
    earlier = variants(json.loads((finished.directory / "results.json").read_text()))["quantize"]
    assert found["metrics"] == earlier["metrics"]
    assert found["key"] == earlier["key"]


RULES = {
    "pass": ("accuracy = { min = 0.0 }\nsize_mb = { max = 1.0 }", 0),
    "fail": ("size_mb = { max = 0.001 }\naccuracy = { min = 0.0 }", 1),
    "inconclusive": ("latency = { p99 = { max = 1000.0 } }", 4),
    "fail before inconclusive": ("latency = { p99 = { max = 1000.0 } }\nsize_mb = { max = 0.001 }", 1),
}


@pytest.mark.parametrize("case", RULES)
def test_exit_codes_of_the_gate(finished: Any, tmp_path: Path, edgekd: Call, case: str) -> None:
    run = finished.copy(tmp_path / "run")
    table, code = RULES[case]
    results = json.loads((run / "results.json").read_text())
    for variant in results["profiles"][0]["variants"]:
        variant["latency"]["p99"] = None  # too few samples to know
    (run / "results.json").write_text(json.dumps(results))
    rules = tmp_path / "rules.toml"
    rules.write_text(f"[gate]\n{table}\n")
    done = edgekd("gate", str(run), "--rules", str(rules))
    assert done.code == code, done.err
    marks = {line.split()[0] for line in done.out.splitlines() if not line.startswith("hint")}
    assert ("FAIL" in marks) == (code == 1)
    assert ("????" in marks) == ("p99" in table)
    document = json.loads(edgekd("gate", str(run), "--rules", str(rules), "--json").out)
    assert (document["version"], document["exit_code"]) == (1, code)
    assert json.loads((run / "gate.json").read_text())["verdicts"] == document["verdicts"]


def test_the_gate_of_a_run_uses_its_recipe(finished: Any, edgekd: Call) -> None:
    done = edgekd("gate", str(finished.directory))
    assert done.code == 0
    assert done.out.startswith("pass  size_mb max")
    assert done.out in finished.outcome.out


def test_a_failed_gate_is_the_exit_code_of_run(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    run = finished.copy(tmp_path / "run")
    done = edgekd("run", "recipe.toml", "-o", str(run), "--set", "gate.size_mb.max=0.001")
    assert done.code == 1
    assert "FAIL" in done.out
    assert "not measured again" in done.err


def test_the_gate_measures_files(foreign: Path, tmp_path: Path, edgekd: Call) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(
        "latency = { p50 = { max = 1000.0 } }\nsize_mb = { max = 0.01 }\n"
    )  # without [gate]: the whole file
    done = edgekd("gate", str(foreign), "--rules", str(rules), "--profile", "profile.toml")
    assert done.code == 1
    assert [line.split()[:2] for line in done.out.splitlines()[:2]] == [["pass", "latency.p50"], ["FAIL", "size_mb"]]


@pytest.mark.parametrize(
    ("rules", "where", "hint"),
    [
        ("size_mb = { maximum = 1 }", "gate.size_mb.maximum: unknown key", "max"),
        ("acuracy = { min = 0.9 }", "acuracy", "accuracy"),
        ("x = [", "not valid TOML", "lists need [ ]"),
        ("", "no rules in it", "for example: [gate]"),
    ],
)
def test_rules_that_are_none(finished: Any, tmp_path: Path, edgekd: Call, rules: str, where: str, hint: str) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(rules)
    done = edgekd("gate", str(finished.directory), "--rules", str(file))
    assert (done.code, done.out) == (2, "")
    assert where in done.err
    assert hint in done.err


def test_the_gate_needs_rules_for_files(foreign: Path, edgekd: Call) -> None:
    done = edgekd("gate", str(foreign))
    assert done.code == 2
    assert "--rules FILE" in done.err
    missing = edgekd("gate", str(foreign), "--rules", "none.toml")
    assert missing.code == 2
    assert "no rules at none.toml" in missing.err


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attributes if k in ("src", "href")]


def test_reports_in_every_format(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    run = finished.copy(tmp_path / "run")
    (run / "report.html").unlink()
    html = edgekd("report", str(run))
    assert (html.code, html.out.strip()) == (0, str(run / "report.html"))
    page = Page()
    page.feed((run / "report.html").read_text())
    assert {"svg", "table"} <= set(page.tags)
    assert not [link for link in page.links if not link.startswith(("#", "data:"))]  # one file, no network
    markdown = edgekd("report", str(run), "--format", "md")
    assert "| quantize" in markdown.out
    document = json.loads(edgekd("report", str(run / "results.json"), "--format", "json").out)
    assert document["schema_version"] == 1
    assert document["results"]["name"] == "tiny"
    assert [v["verdict"] for v in document["verdicts"]] == ["pass"]
    text = edgekd("report", str(run), "--format", "text")
    assert finished.outcome.out.startswith(text.out)
    out = tmp_path / "r.md"
    assert edgekd("report", str(run), "--format", "md", "-o", str(out)).out.strip() == str(out)
    assert out.read_text() == markdown.out


def test_reports_that_cannot_be(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    wrong = edgekd("report", str(finished.directory), "--format", "htm")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean 'html'?" in wrong.err
    nothing = edgekd("report", str(tmp_path))
    assert nothing.code == 2
    assert "edgekd bench RUN" in nothing.err
    damaged = tmp_path / "results.json"
    damaged.write_text((finished.directory / "results.json").read_text()[:500])
    assert edgekd("report", str(tmp_path)).code == 3
    unwritable = edgekd("report", str(finished.directory), "--format", "md", "-o", str(damaged / "r.md"))
    assert unwritable.code == 3
    assert str(damaged / "r.md") in unwritable.err


def test_a_bundle_is_said_to_be_one(foreign: Path, tmp_path: Path, edgekd: Call) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    done = edgekd("bench", str(tmp_path / "bundle"))
    assert (done.code, done.out) == (2, "")
    assert "is a bundle, which is measured where it is run" in done.err
    assert "run.py" in done.err
    assert "--host USER@DEVICE" in done.err
