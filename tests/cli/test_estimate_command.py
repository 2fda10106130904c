"""`edgekd estimate` of files, artifacts and runs, with and without results from the device, and into a run's gate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Call = Callable[..., Any]

BOARD = """\
description = "a board"
device = "jetson"
architecture = "{architecture}"
[datasheet]
int8_tops = 1e-3
fp32_tflops = 1e-3
bandwidth_gb_s = 1e-3
source = "page 3"
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of a device that this machine is not."""
    import platform

    other = "x86-64" if platform.machine().lower() in ("aarch64", "arm64") else "aarch64"
    file = tmp_path_factory.mktemp("board") / "board.toml"
    file.write_text(BOARD.format(architecture=other))
    return file


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [n, 100] -> y [n, 50]: 5,000 multiply-accumulates, and 4 * (5,000 + 150) bytes."""
    path = tmp_path_factory.mktemp("theirs") / "theirs.onnx"
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "theirs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 100])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 50])],
        [numpy_helper.from_array(np.ones((100, 50), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def measured(path: Path, file: Path, *times: float) -> Path:
    """Results of `board` with one file, which differ by a node's name so that they are several networks."""
    from edgekd.bench.results import Interval, Latency, ProfileResults, Results, Variant

    variants = []
    for i, ms in enumerate(times):
        copy = path.parent / f"network{i}.onnx"
        model = onnx.load(file)
        model.graph.node[0].name = f"product{i}"
        onnx.save(model, copy)
        own = Interval(value=ms, low=ms, high=ms)
        timed = Latency(p50=own, p90=own, p95=own, mean=ms, spread=0, samples=9, round_p50=[ms], batch=1, threads=1)
        size = copy.stat().st_size / 1e6
        variants.append(Variant(name=copy.stem, key="", file=str(copy), precision="fp32", latency=timed, size_mb=size))
    Results(
        name="r", command="c", headline="accuracy", test_images=0, classes=[], environment={},
        profiles=[ProfileResults(profile="board", device="number 7", runtime="r", rounds=1, variants=variants)],
    ).write(path)  # fmt: skip
    return path


def test_a_file_has_a_lower_bound_and_a_roofline(theirs: Path, board: Path, edgekd: Call) -> None:
    done = edgekd("estimate", str(theirs), "--profile", str(board), "--layers")
    assert done.code == 0, done.err
    assert "ESTIMATED: nothing was measured" in done.out
    # 10^4 operations at 10^9 a second, 20,600 bytes at 10^6 a second.
    (row,) = re.findall(r"^theirs\.onnx .*$", done.out, re.MULTILINE)
    assert row.split() == ["theirs.onnx", "1", "fp32", "5.00\u00a0k".replace("\u00a0", " ").split()[0], "k", "0.021",
                           "≥", "0.0100", "20.6", "memory", "–"]  # fmt: skip
    assert "about a tenth of the" in " ".join(done.out.split())
    assert "page 3" in done.out
    (layer,) = re.findall(r"^product .*$", done.out, re.MULTILINE)
    assert layer.split()[-3:] == ["10.0", "20,600", "memory"]
    document = json.loads(edgekd("estimate", str(theirs), "--profile", str(board), "--json").out)
    assert (document["version"], document["origin"], document["schema_version"]) == (1, "estimated", 1)
    (found,) = document["files"]
    assert found["estimate"]["floor_ms"] == pytest.approx(0.01)
    assert found["estimate"]["roofline_ms"] == pytest.approx(20.6)
    assert found["roofline"]["macs"] == 5000
    assert document["fit"] is None


def test_results_from_the_device_make_an_interval(theirs: Path, board: Path, tmp_path: Path, edgekd: Call) -> None:
    results = measured(tmp_path / "results.json", theirs, 41.2, 82.4, 164.8)
    done = edgekd("estimate", str(theirs), "--profile", str(board), "--results", str(results))
    assert done.code == 0, done.err
    assert "82.4 [41.2, 165]" in done.out
    text = " ".join(done.out.split())
    assert (
        "fp32: 25.0\u00a0% [12.5\u00a0%, 50.0\u00a0%] of the roofline, from 3 networks"
        in done.out.replace("\n" + " " * 13, " ")
        or "from 3 networks" in text
    )
    assert "off by up to 2.83" in text
    assert "41.2 ms measured, 117 ms estimated from the others" in text
    one = edgekd("estimate", str(theirs), "--profile", str(board), "--results", str(results), "--json")
    assert json.loads(one.out)["fit"]["efficiencies"]["fp32"]["networks"] == 3


def test_one_result_has_no_range(theirs: Path, board: Path, tmp_path: Path, edgekd: Call) -> None:
    results = measured(tmp_path / "results.json", theirs, 41.2)
    done = edgekd("estimate", str(theirs), "--profile", str(board), "--results", str(results))
    assert "41.2 [range unknown]" in done.out
    assert "its range is not known" in " ".join(done.out.split())


def test_a_run_and_an_artifact(finished: Any, board: Path, edgekd: Call) -> None:
    for path, names in (
        (finished.directory, ["teacher", "distill", "prune", "quantize"]),
        (next(finished.directory.glob("04-export-*")), ["model.onnx"]),
    ):
        done = edgekd("estimate", str(path), "--profile", str(board), "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)["files"]
        assert [f["name"] for f in found] == names
        assert found[-1]["estimate"]["precision"] == "int8"


def test_a_run_measured_elsewhere_is_judged_by_estimates_where_the_rules_say_so(
    finished: Any, board: Path, theirs: Path, tmp_path: Path, edgekd: Call
) -> None:
    run = finished.copy(tmp_path / "run")
    done = edgekd("bench", str(run), "--profile", str(board))
    assert done.code == 0, done.err
    assert "estimated" in done.out
    (profile,) = json.loads((run / "results.json").read_text())["profiles"]
    assert profile["elsewhere"] is not None
    assert all(v["latency"] is None and v["estimate"]["floor_ms"] > 0 for v in profile["variants"])
    floor = profile["variants"][-1]["estimate"]["floor_ms"]

    def gate(limit: float, allowed: bool) -> Any:
        rules = tmp_path / "gate.toml"
        rules.write_text(f"[gate]\nestimates = {str(allowed).lower()}\nlatency = {{ p50 = {{ max = {limit} }} }}\n")
        return edgekd("gate", str(run), "--rules", str(rules), "--profile", str(board), "--json")

    for limit, allowed, code in ((floor / 2, False, 4), (floor / 2, True, 1), (floor * 2, True, 4)):
        judged = gate(limit, allowed)
        assert judged.code == code, judged.err
        (verdict,) = json.loads(judged.out)["verdicts"]
        assert verdict["origin"] == ("estimated" if allowed else "measured")
        assert ("estimated" in verdict["shown"]) == allowed
    # With results from the device, written into the run: an interval that passes. The networks there were fp32.
    results = measured(tmp_path / "results.json", theirs, 41.2, 82.4, 164.8)
    done = edgekd("estimate", str(run), "--profile", str(board), "--results", str(results), "--write")
    assert done.code == 0, done.err
    (profile,) = json.loads((run / "results.json").read_text())["profiles"]
    assert [v["estimate"]["fitted"] is not None for v in profile["variants"]] == [True, True, True, False]
    assert gate(1e9, True).code == 4  # the final int8 file: nothing in int8 was measured there


def test_what_cannot_be_estimated_has_one_message(
    finished: Any, theirs: Path, board: Path, tmp_path: Path, edgekd: Call
) -> None:
    bare = tmp_path / "bare.toml"
    bare.write_text('description = "no figures"\n')
    here = str(finished.directory)
    for arguments, said in (
        ([str(theirs), "--profile", str(bare)], "no datasheet to estimate by"),
        ([str(theirs), "--profile", "no-such-board"], "no profile 'no-such-board'"),
        (
            [str(tmp_path / "none.onnx"), "--profile", str(board)],
            f"error: no ONNX file at {tmp_path / 'none.onnx'}: No",
        ),
        ([str(tmp_path / "none.onnx"), "--profile", str(board)], "hint: name an .onnx file, or a run"),
        ([str(theirs), "--profile", str(board), "--results", str(tmp_path / "none.json")], "no results at"),
        ([str(theirs), "--profile", str(board), "--write"], "one run's results.json"),
        ([here, "--profile", str(board), "--write"], "has nothing on board"),
        ([here, "--profile", str(board), "--write", "--precision", "fp16"], "what the profile's runtime does"),
        ([str(theirs), "--profile", str(board), "--precision", "fp16"], "no figure for fp16"),
    ):
        done = edgekd("estimate", *arguments)
        assert done.code == 2, (arguments, done.err)
        assert said in " ".join(done.err.split()), (arguments, done.err)
        assert "Traceback" not in done.err
