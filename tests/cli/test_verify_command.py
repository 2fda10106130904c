"""`edgekd verify` of files and artifacts, with the compiler and where it is hidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifact import Manifest, ModelSpec, Preprocessing, finish, writing

Call = Callable[..., Any]
NANO = ["--profile", "jetson-orin-nano-8gb"]
#: What Python runs at its start when it finds it: the wheels of TensorRT-RTX are not there.
HIDE = """\
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
def without(name, path=None, target=None):
    return None if name.startswith("tensorrt_rtx") else found(name, path, target)
importlib.machinery.PathFinder.find_spec = without
"""


def write_product(path: Path, scale: list[float] | float = 0.02) -> Path:
    """x [1, 4, 8, 8] -> Q -> DQ -> Conv with an int8 weight -> y; several scales are one per channel of x."""
    constants = {
        "s": np.array(scale, np.float32),
        "z": np.zeros(np.shape(scale), np.int8),
        "w": np.ones((8, 4, 3, 3), np.int8),
        "ws": np.full(8, 0.01, np.float32),
        "wz": np.zeros(8, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wdq"], "weight", axis=0),
        helper.make_node("Conv", ["dq", "wdq"], ["y"], "stem"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_product(tmp_path_factory.mktemp("good") / "model.int8.onnx")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built, but not int8: activations with a scale per channel."""
    return write_product(tmp_path_factory.mktemp("bad") / "model.onnx", [0.01, 0.02, 0.03, 0.04])


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_a_table_of_layers_and_exit_code_0(edgekd: Call, good: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    done = edgekd("verify", str(good), *NANO)
    assert done.code == 0, done.err
    assert rows(done.out)["stem"] == ["Conv", "int8", "int8", "fp32"]
    assert rows(done.out)["layer"] == ["op", "wants", "is", "writes", "fused", "with"]
    assert "compiled for 8.6, the nearest that the compiler has; the device is 8.7" in done.out
    assert done.out.splitlines()[-1] == "ok: compiles, 1 int8 matrix layers, all 1 int8 that should be"


def test_a_layer_that_is_silently_float_is_exit_code_3(edgekd: Call, good: Path, bad: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    done = edgekd("verify", str(good), str(bad), *NANO, "--compute-capability", "8.9", "--json")
    assert done.code == 3, done.err
    document = json.loads(done.out)
    assert (document["version"], document["ok"]) == (1, False)
    assert [f["ok"] for f in document["files"]] == [True, False]
    assert [f["compiled_for"] for f in document["files"]] == ["8.9", "8.9"]
    (layer,) = document["files"][1]["layers"]
    assert (layer["wanted"], layer["got"]) == ("int8", "fp32")
    text = edgekd("verify", str(bad), *NANO).out
    assert "compiles, but 1 of 1 layers that should be int8 are not: stem" in text
    assert "hint: " in text


def test_a_file_of_no_known_size_gets_the_verdict_of_the_rules(edgekd: Call, good: Path, tmp_path: Path) -> None:
    """TensorRT builds it for sizes that a user gives; those are not known here."""
    for name, scale, code, said in (("good", 0.02, 0, "ok by"), ("bad", [0.01, 0.02, 0.03, 0.04], 3, "device runs")):
        model = onnx.load(write_product(tmp_path / f"{name}.onnx", scale))
        for axis, side in ((2, "height"), (3, "width")):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = side
        onnx.save(model, tmp_path / f"{name}.onnx")
        done = edgekd("verify", str(tmp_path / f"{name}.onnx"), *NANO)
        assert done.code == code, done.err
        text = " ".join(done.out.split())
        assert "judged by rules alone, sizes are not known: input x leaves axes 2, 3 open" in text
        assert "--minShapes, --optShapes and --maxShapes" in text
        assert said in done.out.splitlines()[-1]
    found = edgekd("verify", str(tmp_path / "bad.onnx"), *NANO, "--json")
    rules = [f["rule"] for f in json.loads(found.out)["files"][0]["findings"]]
    assert {"open-axes", "per-channel-activations"} <= set(rules)


def test_a_product_that_cannot_be_int8_is_told_why(edgekd: Call, good: Path, tmp_path: Path) -> None:
    model = onnx.load(good)
    nodes = [
        helper.make_node("Transpose", ["y"], ["across"], "across", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["y", "across"], ["scores"], "queries.by.keys"),
    ]
    model.graph.node.extend(nodes)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "attention.onnx")
    done = edgekd("verify", str(tmp_path / "attention.onnx"), *NANO)
    assert done.code == 0, done.err
    why = "queries.by.keys: both factors are calculated: the scheme quantizes products with a stored weight only"
    assert f"float {why}" in " ".join(done.out.split())
    document = json.loads(edgekd("verify", str(tmp_path / "attention.onnx"), *NANO, "--json").out)
    assert [layer["why"] for layer in document["files"][0]["layers"]] == [None, why.partition(": ")[2]]


def exported(directory: Path, model: Path, names: Sequence[str]) -> Path:
    """An artifact of `export` with these files for TensorRT, which are all the same one."""
    written = {}
    with writing(directory) as temporary:
        (temporary / "model.onnx").write_bytes(model.read_bytes())
        for name in names:
            (temporary / f"model.{name}.onnx").write_bytes(model.read_bytes())
            written[name] = {"file": f"model.{name}.onnx", "opset": 17, "strongly_typed": False}
        plain = Preprocessing(size=[4, 8, 8], mean=[0.0] * 4, std=[1.0] * 4)
        manifest = Manifest(
            kind="export",
            key="0",
            model=ModelSpec(use="cifar-resnet"),
            preprocessing=plain,
            classes=["a"],
            metrics={"tensorrt": written} if written else {},
        )
        finish(temporary, manifest)
    return directory


@pytest.mark.parametrize(("profile", "form"), [("jetson-orin-nano-8gb", "int8"), ("gpu-l4", "int8-fp16")])
def test_an_artifacts_files_are_verified_in_the_form_for_the_profile(
    edgekd: Call, good: Path, tmp_path: Path, profile: str, form: str
) -> None:
    exported(tmp_path / "export", good, ["int8", "int8-fp16", "fp32"])
    done = edgekd("verify", str(tmp_path / "export"), "--profile", profile, "--json")
    assert done.code == 0, done.err
    assert [Path(f["file"]).name for f in json.loads(done.out)["files"]] == [f"model.{form}.onnx", "model.fp32.onnx"]


def test_an_export_without_files_names_the_one_of_its_run_that_has_them(
    edgekd: Call, good: Path, tmp_path: Path
) -> None:
    plain = exported(tmp_path / "04-export-a", good, [])
    done = edgekd("verify", str(plain), *NANO)
    assert (done.code, "holds no files for TensorRT" in done.err, 'targets = ["trt"]' in done.err) == (2, True, True)
    exported(tmp_path / "04-export-b", good, ["int8", "fp32"])
    done = edgekd("verify", str(plain), *NANO)
    assert (done.code, f"hint: edgekd verify {tmp_path / '04-export-b'}" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--profile", "cpu-x86"], "cpu-x86 runs onnxruntime, not TensorRT"),
        ([], "give one of gpu-h100"),
        (["--profile", "jetson-orin-nano"], "did you mean 'jetson-orin-nano-8gb'"),
        ([*NANO, "--compute-capability", "orin"], "expected a compute capability such as 8.6"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(edgekd: Call, good: Path, arguments: list[str], told: str) -> None:
    done = edgekd("verify", str(good), *arguments)
    assert done.code == 2
    assert told in done.err
    assert done.out == ""


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_what_is_no_onnx_file_is_a_usage_error(edgekd: Call, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "other.onnx").write_bytes(content)
    done = edgekd("verify", str(tmp_path / "other.onnx"), *NANO)
    assert done.code == 2
    assert "other.onnx" in done.err
    assert "Traceback" not in done.err


def test_weights_in_a_file_of_their_own_are_found_or_missed(edgekd: Call, good: Path, tmp_path: Path) -> None:
    model = onnx.load(good)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert edgekd("verify", str(tmp_path / "m.onnx"), *NANO).code == 0
    (tmp_path / "weights.bin").unlink()
    done = edgekd("verify", str(tmp_path / "m.onnx"), *NANO)
    assert done.code == 2
    assert "its weights, in a file of their own, cannot be read" in done.err
    assert "weights.bin" in done.err


def test_a_file_is_verified_without_torch() -> None:
    code = "import sys, edgekd.cli, edgekd.verifying, edgekd.report.verification; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_without_the_wheels_the_rules_judge_and_all_else_works(good: Path, bad: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "120", "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, "-m", "edgekd", *arguments], capture_output=True, text=True, env=env, timeout=300
        )

    done = call("verify", str(good), *NANO)
    assert done.returncode == 0, done.stderr
    assert "judged by rules alone" in done.stdout
    assert "pip install 'edgekd[trt-verify]'" in done.stdout
    assert "ok by the rules alone; the file wants 1 int8 matrix layers" in done.stdout
    done = call("verify", str(bad), *NANO, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["files"][0]["origin"] == "static"
    done = call("doctor")
    assert done.returncode == 0
    (line,) = (line for line in done.stdout.splitlines() if line.split()[1:2] == ["tensorrt-rtx"])
    assert line.split()[0] == "missing"
    assert "edgekd[trt-verify]" in line
