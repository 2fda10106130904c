"""`edgekd gate --baseline`, `baseline update` and `compare`, on real measurements."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Call = Callable[..., Any]
PROFILE = 'extends = "cpu-x86"\n[protocol]\nrounds = 6\nblock_s = 0.02\nwarmup_s = 0.02\ncap_s = 3\nbatches = [1]\n'


def network(path: Path, layers: int, seed: int = 0) -> Path:
    """x [1, 256] through so many matrix products: time grows with their number."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], [], "x"
    for i in range(layers):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.06, (256, 256)).astype(np.float32), f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]),
            helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]),
        ]
        last = f"t{i}"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 256]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {n: network(directory / f"of{n}.onnx", n) for n in (20, 40)}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "gate.toml").write_text('latency = { p50 = { regress = "25%" } }\n')
    (tmp_path / "p.toml").write_text(PROFILE)
    return ["--rules", str(tmp_path / "gate.toml"), "--profile", str(tmp_path / "p.toml")]


def test_a_model_beside_itself_passes_and_a_slower_one_fails(
    models: dict[int, Path], files: list[str], tmp_path: Path, edgekd: Call
) -> None:
    junit = tmp_path / "junit.xml"
    same = edgekd("gate", str(models[20]), "--baseline", str(models[20]), *files)
    assert same.code == 0, same.out + same.err
    assert "same rounds" in same.out
    slower = edgekd("gate", str(models[40]), "--baseline", str(models[20]), *files, "--junit", str(junit))
    assert slower.code == 1, slower.out
    assert ElementTree.parse(junit).getroot().get("failures") == "1"
    faster = json.loads(edgekd("gate", str(models[20]), "--baseline", str(models[40]), *files, "--json").out)
    assert faster["exit_code"] == 0
    assert -0.7 < faster["verdicts"][0]["found"] < -0.3  # half the layers


def test_inconclusive_is_4_or_what_the_user_says(models: dict[int, Path], files: list[str], edgekd: Call) -> None:
    """Three short rounds are too few calls to know a 99th percentile."""
    Path(files[1]).write_text('latency = { p99 = { regress = "5%" } }\n')
    Path(files[3]).write_text(PROFILE.replace("cap_s = 3", "cap_s = 0.001"))
    command = ["gate", str(models[40]), "--baseline", str(models[20]), *files]
    found = edgekd(*command)
    assert found.code == 4, found.out
    assert "too few for p99" in found.out
    for choice, code in (("pass", 0), ("fail", 1), ("inconclusive", 4)):
        assert edgekd(*command, "--on-inconclusive", choice).code == code
    assert edgekd(*command, "--on-inconclusive", "maybe").code == 2


def test_a_run_against_another_run_and_against_a_file(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    run, base = finished.copy(tmp_path / "run"), finished.copy(tmp_path / "base")
    rules = tmp_path / "gate.toml"
    rules.write_text('[gate]\naccuracy = { regress = "0%" }\nlatency = { p50 = { regress = "90%" } }\n'
                     'size_mb = { regress = "1%" }\n')  # fmt: skip
    for baseline in (str(base), str(next(base.glob("04-export-*"))), str(next(base.glob("04-export-*/model.onnx")))):
        done = edgekd("gate", str(run), "--baseline", baseline, "--rules", str(rules))
        assert done.code == 0, done.out + done.err
        assert "same images, McNemar p = 1" in done.out
    assert [v["rule"] for v in json.loads((run / "gate.json").read_text())["verdicts"]] == [
        "accuracy regress", "latency.p50 regress", "size_mb regress"
    ]  # fmt: skip
    assert "accuracy regress" in (run / "report.html").read_text()
    alone = edgekd("gate", str(run), "--rules", str(rules))
    assert alone.code == 4
    assert "no baseline to compare with" in alone.out


def test_an_artifact_is_gated_on_its_recipes_profile(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    artifact, rules = str(next(finished.directory.glob("04-export-*"))), tmp_path / "gate.toml"
    rules.write_text('latency = { p50 = { regress = "99%" } }\n')
    done = edgekd("gate", artifact, "--baseline", artifact, "--rules", str(rules), "--json")
    assert done.code == 0, done.out + done.err
    assert [v["profile"] for v in json.loads(done.out)["verdicts"]] == ["profile"]
    rules.write_text('latency = { p50 = { regres = "99%" } }\n')
    wrong = edgekd("gate", artifact, "--baseline", artifact, "--rules", str(rules))
    assert wrong.code == 2
    assert "did you mean 'regress'?" in wrong.err
    assert "accuracy of" not in wrong.err  # told before anything is measured


def test_a_run_leaves_out_what_needs_a_baseline_and_says_so(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    run = finished.copy(tmp_path / "run")
    done = edgekd("run", "recipe.toml", "-o", str(run), "--set", "gate.size_mb.regress=0.05")
    assert done.code == 0, done.err
    assert "not judged: size_mb regress" in done.err
    assert "size_mb regress" not in done.out


def test_baseline_update_shows_what_changes_and_is_what_gates_compare_with(
    finished: Any, tmp_path: Path, edgekd: Call
) -> None:
    run, file = finished.copy(tmp_path / "run"), tmp_path / "baseline.json"
    first = edgekd("baseline", "update", str(run), "-o", str(file))
    assert first.code == 0, first.err
    assert "first baseline: teacher on profile" in first.out
    assert file.stat().st_size < (run / "results.json").stat().st_size
    rules = tmp_path / "gate.toml"
    rules.write_text('[gate]\naccuracy = { regress = "0%" }\nlatency = { p50 = { regress = "90%" } }\n')
    done = edgekd("gate", str(run), "--baseline", str(file), "--rules", str(rules))
    assert done.code == 0, done.out + done.err
    assert "relative to teacher" in done.out
    results = json.loads((run / "results.json").read_text())
    results["profiles"][0]["variants"][-1]["size_mb"] *= 2
    (run / "results.json").write_text(json.dumps(results))
    again = edgekd("baseline", "update", str(run), "-o", str(file))
    assert again.code == 0
    line = next(x for x in again.out.splitlines() if "quantize" in x and "size_mb" in x)
    assert line.startswith("-")
    assert "+100.0 %" in line
    assert json.loads(file.read_text())["profiles"][0]["variants"][-1]["size_mb"] == pytest.approx(
        results["profiles"][0]["variants"][-1]["size_mb"]
    )


def test_compare_marks_what_is_better_and_worse(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    run = finished.copy(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    final = results["profiles"][0]["variants"][-1]
    final["size_mb"] /= 2
    final["latency"]["round_p50"] = [2 * x for x in final["latency"]["round_p50"]]
    (run / "results.json").write_text(json.dumps(results))
    document = json.loads(edgekd("compare", str(finished.directory), str(run), "--json").out)
    marks = {(d["variant"], d["metric"]): d["mark"] for d in document["differences"]}
    assert marks["quantize", "size_mb"] == "better"
    assert marks["quantize", "latency.p50"] == "worse"
    assert marks["teacher", "size_mb"] == "same"
    assert marks["quantize", "accuracy"] == "unknown"  # no image differs, which proves little
    text = edgekd("compare", str(finished.directory), str(run)).out
    assert "+ better, - worse" in text
    markdown = edgekd("compare", str(finished.directory), str(run), "--format", "md").out
    assert markdown.splitlines()[0].count("|") == markdown.splitlines()[3].count("|") == 8


@pytest.mark.parametrize("wrong", ["none.onnx", "none", "none.json", "here"])
def test_baselines_that_are_none(finished: Any, tmp_path: Path, edgekd: Call, wrong: str) -> None:
    rules = tmp_path / "gate.toml"
    rules.write_text('latency = { p50 = { regress = "5%" } }\n')
    (tmp_path / "here").mkdir()
    done = edgekd("gate", str(finished.directory), "--baseline", str(tmp_path / wrong), "--rules", str(rules))
    assert (done.code, done.out) == (2, ""), done.err
    assert str(tmp_path / wrong) in done.err
    assert "Traceback" not in done.err


def test_documents_of_another_schema_or_machine(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    rules = tmp_path / "gate.toml"
    rules.write_text('latency = { p50 = { regress = "90%" } }\n')
    results = json.loads((finished.directory / "results.json").read_text())
    old, other = tmp_path / "old.json", tmp_path / "other.json"
    old.write_text(json.dumps({**results, "schema_version": 1}))
    done = edgekd("gate", str(finished.directory), "--baseline", str(old), "--rules", str(rules))
    assert done.code == 3
    assert "results schema 1, expected 2" in done.err
    other.write_text(json.dumps({**results, "environment": {**results["environment"], "cpu": "Abacus"}}))
    command = ["gate", str(finished.directory), "--baseline", str(other), "--rules", str(rules)]
    refused = edgekd(*command)
    assert refused.code == 2
    assert "cpu 'Abacus'" in refused.err
    assert "--allow-other-machine" in refused.err
    allowed = edgekd(*command, "--allow-other-machine")
    assert allowed.code == 0, allowed.out + allowed.err
    assert "another machine" in allowed.out
    broken = json.loads(old.read_text()) | {"schema_version": 2}
    broken["profiles"][0]["variants"][-1]["latency"] = "fast"
    old.write_text(json.dumps(broken))
    damaged = edgekd("compare", str(finished.directory), str(old))
    assert damaged.code == 3
    assert "damaged" in damaged.err


def test_a_report_directory_that_is_not_writable(finished: Any, tmp_path: Path, edgekd: Call) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/edgekd")  # root may write everywhere else
    else:
        place = tmp_path / "closed"
        place.mkdir(mode=0o500)
    done = edgekd("report", str(finished.directory), "--format", "junit", "-o", str(place / "junit.xml"))
    assert done.code == 3
    assert str(place) in done.err
    assert "hint" in done.err
