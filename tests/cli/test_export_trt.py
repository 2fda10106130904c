"""`edgekd export --target trt`: files, verdict and bundle from one command, and what it says where it cannot."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from sklearn.datasets import load_digits

from edgekd.artifact import Artifact, finish
from edgekd.bundle.make import MANIFEST
from edgekd.exporting import _ways
from edgekd.models.cifar_resnet import cifar_resnet
from edgekd.profile import load_profile
from edgekd.trt import files_of

Call = Callable[..., Any]
ORIN = ("--profile", "jetson-orin-nano-8gb")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network that knows digits well enough to have few ties."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = (F.interpolate(images, size=16, mode="bilinear").repeat(1, 3, 1, 1) - 0.5) / 0.5
    labels = torch.from_numpy(digits.target)
    network = cifar_resnet(8, 4, num_classes=10).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(60):
        rows = torch.arange(step * 64, (step + 1) * 64) % 1000
        outputs = network(images[rows])
        loss = F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    file = tmp_path_factory.mktemp("weights") / "network.pt"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the run with the quantized network lies, once a test has made it."""
    return {"run": tmp_path_factory.mktemp("kept") / "run"}


@pytest.fixture
def run(kept: dict[str, Path], weights: Path, edgekd: Call) -> Path:
    """A network quantized for TensorRT from weights of one's own, without training."""
    if not kept["run"].exists():
        given = ("--model", "cifar-resnet", "--weights", str(weights), "--data", "digits", "--set", "data.size=16")
        network = ("--set", "teacher.model.depth=8", "--set", "teacher.model.width=4")
        settings = ("--set", 'scheme="trt-s8s8"', "--set", "keep_float=false", "--set", "heal.epochs=0")
        done = edgekd("quantize", *given, *network, *settings, "--set", "calibration=64", "-o", str(kept["run"]))
        assert done.code == 0, done.err
    return kept["run"]


def test_one_command_ends_with_verified_files_a_table_of_layers_and_a_bundle(run: Path, edgekd: Call) -> None:
    done = edgekd("export", f"{run}:quantize", "--target", "trt", *ORIN)
    assert done.code == 0, done.err
    artifact = Artifact.open(done.out.strip())  # the only line on stdout
    assert {f.name: f.opset for f in files_of(artifact)} == {"int8": 17, "fp16": 17, "fp32": 17}
    assert {"model.onnx", "model.int8.onnx", "model.fp16.onnx", "model.fp32.onnx"} == set(artifact.manifest.files)
    recorded = artifact.manifest.metrics["tensorrt"]
    assert recorded["int8"]["max_abs_difference"] == 0
    assert recorded["fp16"]["argmax_agreement"] > 0.9
    bundle = run / "bundle-jetson-orin-nano-8gb"
    networks = json.loads((bundle / MANIFEST).read_text())["networks"]
    assert [n["name"] for n in networks] == ["fp32", "fp16", "int8"]
    told = done.err.splitlines()
    assert sum(line.startswith("layer") and line.split()[1:3] == ["Conv", "int8"] for line in told) == 6
    assert [line.split(":")[0] for line in told[-3:]] == ["on the device", "and back here", "or all of it"]
    assert str(bundle) in told[-3]
    # The same files, whichever way they were asked for.
    again = edgekd("export", f"{run}:quantize", *ORIN, "--no-verify", "--bundle", str(run / "other.tar.gz"))
    assert (again.code, again.out) == (0, done.out)
    assert "layer1.0.conv1" not in again.err
    assert (run / "other.tar.gz").is_file()


def test_a_network_of_ones_own_keeps_the_settings_of_its_data(weights: Path, tmp_path: Path, edgekd: Call) -> None:
    given = ("--model", "cifar-resnet", "--weights", str(weights), "--data", "digits", "--set", "data.size=16")
    network = ("--set", "teacher.model.depth=8", "--set", "teacher.model.width=4")
    done = edgekd("export", *given, *network, "--target", "trt", *ORIN, "--no-verify", "-o", str(tmp_path / "own"))
    assert done.code == 0, done.err
    assert (tmp_path / "own" / "bundle-jetson-orin-nano-8gb" / MANIFEST).is_file()


def test_a_run_is_verified_by_its_name(run: Path, edgekd: Call) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    edgekd("export", f"{run}:quantize", "--target", "trt", *ORIN, "--no-verify")
    done = edgekd("verify", str(run), *ORIN, "--json")
    assert done.code == 0, done.err
    files = {Path(f["file"]).name: f for f in json.loads(done.out)["files"]}
    assert set(files) == {"model.int8.onnx", "model.fp16.onnx", "model.fp32.onnx"}
    assert {f["origin"] for f in files.values()} == {"compiled"}
    assert files["model.int8.onnx"]["got"] == {"int8": 8}
    assert "which TensorRT is meant?" in edgekd("verify", str(run)).err  # its recipe's profile is a CPU


def test_bench_shows_every_form_for_a_device_elsewhere_and_judges_int8(run: Path, edgekd: Call) -> None:
    exported = edgekd("export", f"{run}:quantize", "--target", "trt", *ORIN, "--no-verify").out.strip()
    done = edgekd("bench", exported, *ORIN, "--json")
    assert done.code == 0, done.err
    (profile,) = json.loads(done.out)["profiles"]
    variants = profile["variants"]
    assert [v["name"] for v in variants] == ["export.fp32", "export.fp16", "export.int8"]
    assert [v["precision"] for v in variants] == ["fp32", "fp16", "int8"]
    assert [v["estimate"]["precision"] for v in variants] == ["fp32", "fp16", "int8"]
    assert [v["latency"] for v in variants] == [None] * 3
    assert [v["scheme"] for v in variants] == [None, None, "trt-s8s8"]
    sizes = [v["size_mb"] for v in variants]
    assert sizes[0] > sizes[1] > 0
    # One image of digits' test split may be a tie that rounding decides.
    accuracies = [v["metrics"]["accuracy"] for v in variants]
    assert abs(accuracies[0] - accuracies[1]) < 0.01
    assert variants[2]["agreement"] < 1 or accuracies[2] == accuracies[0]


def test_a_float_network_gets_fp16_and_fp32_and_a_document(run: Path, edgekd: Call) -> None:
    done = edgekd("export", f"{run}:teacher", "--target", "trt", *ORIN, "--no-verify", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert set(document["manifest"]["metrics"]["tensorrt"]) == {"fp16", "fp32"}
    assert (document["version"], document["verified"], document["engines"]) == (1, [], [])
    assert Path(document["bundle"]).is_dir()


def test_a_layer_that_would_silently_be_float_is_an_exit_code(run: Path, edgekd: Call) -> None:
    """One scale per channel of an activation: TensorRT builds it, and runs the layer in float."""
    done = edgekd("export", f"{run}:quantize", "--target", "trt", *ORIN, "--no-verify")
    artifact = Artifact.open(done.out.strip())
    changed = shutil.copytree(artifact.path, run / "kept")
    model = onnx.load(changed / "model.int8.onnx")
    conv = next(n for n in model.graph.node if n.name == "layer1.0.conv1")
    pair = next(n for n in model.graph.node if conv.input[0] in n.output)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in (n for n in model.graph.node if pair.input[0] in n.output or n is pair):
        for position, name in ((1, "scales"), (2, "zeros")):
            values = torch.from_numpy(stored[node.input[position]].reshape(1)).repeat(4).numpy()
            model.graph.initializer.append(numpy_helper.from_array(values, f"{node.name}.{name}"))
            node.input[position] = f"{node.name}.{name}"
        assert next(a.i for a in node.attribute if a.name == "axis") == 1  # which one scale does not need
    onnx.save(model, changed / "model.int8.onnx")
    (changed / "manifest.json").unlink()
    finish(changed, artifact.manifest)
    shutil.rmtree(artifact.path)
    changed.rename(artifact.path)
    wrong = edgekd("export", f"{run}:quantize", "--target", "trt", *ORIN)
    shutil.rmtree(artifact.path)
    assert wrong.code == 3
    assert wrong.out == done.out
    assert "layer1.0.conv1" in wrong.err


def test_engines_are_for_machines_with_tensorrt_and_the_files_stay(run: Path, edgekd: Call) -> None:
    done = edgekd("export", f"{run}:quantize", "--target", "trt", *ORIN, "--no-verify", "--build")
    assert done.code == 3
    assert "TensorRT" in done.err
    assert "kept: model.int8.onnx, model.fp16.onnx, model.fp32.onnx" in done.err
    assert "on the device: scp -r" in done.err  # the bundle that was made, and what to do with it
    assert not list(run.glob("engines-*"))


@pytest.mark.skipif(find_spec("torch_tensorrt") is not None, reason="Torch-TensorRT is here")
def test_torch_tensorrt_is_asked_for_by_name_and_the_files_stay(run: Path, edgekd: Call) -> None:
    asked = ("--no-verify", "--build", "--backend", "torch-tensorrt")
    done = edgekd("export", f"{run}:teacher", "--target", "trt", *ORIN, *asked)
    assert (done.code, done.out) == (3, "")
    assert "Torch-TensorRT does not run here: not installed" in done.err
    assert done.err.rstrip().endswith("kept: model.fp16.onnx, model.fp32.onnx")
    assert not list(run.glob("engines-*"))


def test_torch_tensorrt_takes_float_networks_only(run: Path, edgekd: Call) -> None:
    asked = ("--target", "trt", *ORIN, "--no-verify", "--build", "--backend", "torch-tensorrt")
    quantized = edgekd("export", f"{run}:quantize", *asked)
    bytes_taken = edgekd("export", f"{run}:teacher", *asked, "--set", 'input="uint8"')
    for done, what in ((quantized, "this one is quantized"), (bytes_taken, "this export takes uint8")):
        assert (done.code, done.out) == (2, "")
        assert f"Torch-TensorRT builds from the float network, {what}" in done.err.replace(
            "which takes float32, and ", ""
        )
        assert "--backend tensorrt" in done.err


def test_a_device_without_tensorrt_gets_a_bundle_of_the_plain_file(run: Path, tmp_path: Path, edgekd: Call) -> None:
    bundle = tmp_path / "pi"
    done = edgekd("export", f"{run}:teacher", "--profile", "cpu-arm64", "--bundle", str(bundle))
    assert done.code == 0, done.err
    assert set(Artifact.open(done.out.strip()).manifest.files) == {"model.onnx"}
    assert [n["name"] for n in json.loads((bundle / MANIFEST).read_text())["networks"]] == ["model"]
    assert f"scp -r {bundle} USER@DEVICE:" in done.err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--target", "trt", "--profile", "cpu-x86"], "profile cpu-x86 runs onnxruntime, not TensorRT"),
        (["--target", "trt", "--profile", "jetson-orin"], "no profile 'jetson-orin'"),
        (["--target", "onnx", "--build"], "engines are TensorRT's"),
        (["--target", "trt", "--backend", "torch-tensorrt"], "--backend: says what engines are built with"),
        (["--target", "tensorrt"], "stage[0].targets[0]"),
        (["--target", "trt", "--bundle", "b"], "no profile says which TensorRT is meant"),
    ],
)
def test_what_does_not_fit_is_one_message(run: Path, edgekd: Call, arguments: list[str], what: str) -> None:
    done = edgekd("export", f"{run}:teacher", *arguments)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert "Traceback" not in done.err


def test_printed_commands_can_be_pasted_where_paths_have_spaces(tmp_path: Path) -> None:
    bundle, artifact = tmp_path / "my bundle.tar.gz", SimpleNamespace(path=tmp_path / "my run" / "export")
    copy, fetch, all_of_it = _ways(bundle, artifact, load_profile("jetson-orin-nano-8gb"))
    words = shlex.split(copy.partition(": ")[2])
    assert words[:6] == ["scp", "-r", str(bundle), "USER@DEVICE:", "&&", "ssh"]
    there = shlex.split(words[-1])
    assert there == ["tar", "-xf", "my bundle.tar.gz", "&&", "cd", "my bundle", "&&", "python3", "run.py"]
    assert shlex.split(fetch.partition(": ")[2])[1] == "USER@DEVICE:my bundle/results.json"
    assert shlex.split(all_of_it.partition(": ")[2])[2] == str(artifact.path)
