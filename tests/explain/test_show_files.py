"""`edgekd show FILE.onnx`: our own files, the table, the document, and files that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from quantized_graphs import chain_of_convolutions, convolution
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd.artifact import Preprocessing
from edgekd.errors import UsageError
from edgekd.explain import explain_file, explanation_text
from edgekd.explain.document import Explanation, LayerRow
from edgekd.models import build, specify
from edgekd.onnx_file import export_onnx
from edgekd.profile import load_profile
from edgekd.quant import SCHEMES, calibrate, convert, enable_fake_quant, prepare

Call = Callable[..., Any]
PROFILE = load_profile("cpu-x86")
PATHS = ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)), "linear"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    digits = torch.from_numpy(load_digits().images[:128]).float().unsqueeze(1) / 16
    return (F.interpolate(digits, size=16, mode="bilinear") - 0.3) / 0.35


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    spec = specify("cifar-resnet", {"depth": 8, "width": 8}, classes=10, size=[1, 16, 16], where="model")
    return build(spec).eval()


def written(network: nn.Module, path: Path) -> Path:
    preprocessing = Preprocessing(size=[1, 16, 16], mean=[0.3], std=[0.35], colour="grey")
    classes = [str(i) for i in range(10)]
    export_onnx(network, path, size=[1, 16, 16], opset=18, classes=classes, preprocessing=preprocessing)
    return path


@pytest.fixture(scope="module")
def files(network: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("files")
    prepared = prepare(network, images[:8], SCHEMES["x86-u8s8"], qat=False)
    calibrate(prepared, images.split(64))
    enable_fake_quant(prepared)
    int8 = written(convert(prepared), directory / "int8.onnx")
    return {"float": written(network, directory / "float.onnx"), "x86-u8s8": int8}


def test_our_own_file_is_integer_in_every_layer_and_has_module_paths(files: dict[str, Path]) -> None:
    found = explain_file(files["x86-u8s8"], PROFILE, files["float"])
    assert [row.name for row in found.layers] == PATHS
    assert [row.runs for row in found.layers] == ["int8"] * 8
    assert (found.summary.int8_layers, found.summary.float_layers) == (8, 0)
    assert found.layers[0].output == [1, 8, 16, 16]
    assert found.layers[-1].macs == 32 * 10
    plain = explain_file(files["float"], PROFILE)
    assert [row.name for row in plain.layers] == PATHS
    assert [row.macs for row in plain.layers] == [row.macs for row in found.layers]


def test_errors_of_weights_are_those_of_the_stored_integers(files: dict[str, Path]) -> None:
    """From the two files' tensors alone: integers times scales against the float export's folded weights."""
    found = explain_file(files["x86-u8s8"], PROFILE, files["float"])
    model = onnx.load(files["x86-u8s8"])
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(files["float"]).graph.initializer}
    producers = {o: n for n in model.graph.node for o in n.output}
    for row in found.layers:
        node = next(n for n in model.graph.node if n.name == row.node)
        dequantize = producers[node.input[1]]
        while dequantize.op_type != "DequantizeLinear":
            dequantize = producers[dequantize.input[0]]
        integers, scales = (constants[name].astype(np.float64) for name in dequantize.input[:2])
        restored = integers * scales.reshape(-1, *[1] * (integers.ndim - 1))
        reference = floats[f"network.{row.name}.weight"]
        expected = 10 * np.log10((reference**2).sum() / ((reference - restored) ** 2).sum())
        assert row.weight_sqnr_db == pytest.approx(expected, abs=0.02)
        assert 35 < expected < 60


def test_show_prints_a_table_of_100_columns_and_one_document(edgekd: Call, files: dict[str, Path]) -> None:
    done = edgekd("show", str(files["x86-u8s8"]), "--against", str(files["float"]))
    assert done.code == 0, done.err
    lines = done.out[done.out.index("layer ") :].splitlines()
    assert max(map(len, lines)) <= 100
    header = lines[0].split()
    assert header == ["layer", "op", "weight", "MACs", "stored", "runs", "range", "SQNR", "was", "ms", "ms", "%"]
    assert lines[1].split()[:2] == ["conv1", "Conv"]
    assert "u8/s8c/u8" in lines[1]
    assert "1 thread, ONNX Runtime" in done.out
    document = json.loads(edgekd("show", str(files["x86-u8s8"]), "--profile", "cpu-x86", "--json").out)
    assert (document["version"], document["layers"]) == (1, {"int8": 8, "float": 0})
    explanation = Explanation.model_validate(document["explanation"])
    assert [row.path for row in explanation.layers] == PATHS
    assert explanation.measured["origin"] == "measured"
    assert explanation.measured["threads"] == 1
    assert explanation.measured["cpu"]


def test_long_names_are_cut_from_the_left(files: dict[str, Path]) -> None:
    found = explain_file(files["x86-u8s8"], PROFILE, files["float"])
    rows = [row.model_copy(update={"name": f"{'encoder.' * 20}{i}"}) for i, row in enumerate(found.layers)]
    long = explanation_text(found.model_copy(update={"layers": rows})).splitlines()
    assert max(map(len, long)) <= 100
    assert long[1].split()[0].startswith("…")
    assert long[1].split()[0].endswith("encoder.0")


def test_a_reason_has_one_letter_for_all_its_layers(tmp_path: Path) -> None:
    found = explain_file(chain_of_convolutions(tmp_path / "a.onnx", quantized=False), PROFILE)
    lines = explanation_text(found).splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["a"] * 4
    assert lines[5] == "  a  not quantized: neither its input nor its weight has Q/DQ"
    more = [f"reason {i}" for i in range(30)]
    row: LayerRow = found.layers[0].model_copy(update={"why_float": more})
    letters = explanation_text(found.model_copy(update={"layers": [row]}))
    assert " aa  reason 26" in letters
    assert "  z  reason 25" in letters


def test_explaining_a_file_does_without_torch(files: dict[str, Path]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['edgekd', 'show', {str(files['x86-u8s8'])!r}]\n"
        "from edgekd.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"
    assert "8 int8 and 0 float" in done.stdout


def test_files_that_cannot_be_read(tmp_path: Path, edgekd: Call) -> None:
    whole = convolution(tmp_path / "a.onnx")
    (tmp_path / "cut.onnx").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "text.onnx").write_text("not a network")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "directory.onnx").mkdir()
    for name, what in (
        ("cut", "not an ONNX file, or a truncated one"),
        ("text", "not an ONNX file, or a truncated one"),
        ("empty", "not an ONNX file, or a truncated one"),
        ("directory", "is a directory"),
        ("missing", "no ONNX file there"),
    ):
        done = edgekd("show", str(tmp_path / f"{name}.onnx"))
        assert (done.code, done.out) == (2, "")
        assert what in done.err
        assert f"{name}.onnx" in done.err
    done = edgekd("show", str(whole), "--against", str(tmp_path / "missing.onnx"))
    assert done.code == 2
    assert "missing.onnx: no ONNX file there" in done.err


def test_weights_beside_a_file_that_are_missing_or_too_short(tmp_path: Path) -> None:
    model = onnx.load(chain_of_convolutions(tmp_path / "a.onnx", quantized=False))
    file = tmp_path / "b.onnx"
    onnx.save(model, file, save_as_external_data=True, location="b.weights", size_threshold=0)
    assert [row.weight for row in explain_file(file, PROFILE).layers] == [[16, 8, 1, 1], [8, 16, 1, 1]] * 2
    whole = (tmp_path / "b.weights").read_bytes()
    (tmp_path / "b.weights").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"its weights are truncated: b\.weights has") as short:
        explain_file(file, PROFILE)
    assert short.value.problem.where == str(file)
    (tmp_path / "b.weights").unlink()
    with pytest.raises(UsageError, match=r"lies in b\.weights, which is not beside it") as missing:
        explain_file(file, PROFILE)
    assert missing.value.problem.hint == f"copy b.weights into {tmp_path}"


@pytest.mark.parametrize(
    ("op", "domain", "message"),
    [
        ("Deformable", "my.company", "ONNX Runtime has no operator Deformable of domain 'my.company'"),
        ("Convv", "", "ONNX Runtime has no operator Convv of opset 18"),
    ],
)
def test_operators_that_nobody_has(op: str, domain: str, message: str, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "graph", [value], [out])
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(UsageError, match=message) as error:
        explain_file(tmp_path / "a.onnx", PROFILE)
    if not domain:
        assert error.value.problem.hint == "did you mean 'Conv'?"


def test_options_for_what_has_no_layers(edgekd: Call, files: dict[str, Path]) -> None:
    done = edgekd("show", "kl", "--against", str(files["float"]))
    assert done.code == 2
    assert "--against: kl is no file or artifact" in done.err
    done = edgekd("show", str(files["float"]), "--profile", "cpu-x68")
    assert done.code == 2
    assert "did you mean 'cpu-x86'?" in done.err
