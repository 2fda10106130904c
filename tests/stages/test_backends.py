"""Other tools' quantization through whole recipes: the files run, hold integers, keep accuracy, and resume."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd.artifact import Artifact
from edgekd.bench import Interval
from edgekd.candidates import candidate_of
from edgekd.data import Split
from edgekd.errors import ArtifactError, RecipeError, StageError, UsageError
from edgekd.explain.constants import Graph
from edgekd.explain.stored import stored_layers
from edgekd.models import build
from edgekd.onnx_file import optimised_layers, read_metadata
from edgekd.pipeline import Plan, plan, run_steps
from edgekd.quant import SCHEMES
from edgekd.quant.backends import neural_compressor, onnxruntime
from edgekd.quant.backends.weights import fold_quantized_weights, store_weights_as_int8
from edgekd.quant.mixed import Measured, PrecisionRecord
from edgekd.recipe import parse_recipe
from edgekd.runtimes import open_session
from edgekd.stages import Export, Quantize, Workspace, backends, mixing
from edgekd.stages.export import write_onnx
from edgekd.stages.teaching import Teaching, load_network
from edgekd.stages.workspace import load_prepared

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {"use": "cifar-resnet", "depth": 8, "width": 8},
    "vit": {"use": "vit", "patch": 4, "dim": 32, "depth": 1, "heads": 2},
}
WAYS = [("onnxruntime", "static"), ("onnxruntime", "dynamic"), ("onnxruntime", "weight-only")]
WAYS += [("neural-compressor", "static")]
Made = Callable[..., Plan]


def recipe(network: str, *stages: dict[str, Any], **quantize: Any) -> dict[str, Any]:
    rate = 0.003 if network == "vit" else 0.1
    optimizer = "adamw" if network == "vit" else "sgd"
    return {
        "version": 1,
        "name": network,
        "data": {"use": "digits", "size": 8, "channels": 1, "batch": 64},
        "teacher": {"model": NETWORKS[network], "epochs": 6, "lr": rate, "optimizer": optimizer},
        "stage": [
            {"use": "quantize", "calibration": 128, "keep_float": False, "heal": {"epochs": 0}, **quantize},
            *stages,
        ],
    }


def planned(directory: Path, network: str = "resnet", *stages: dict[str, Any], **quantize: Any) -> Plan:
    return plan(parse_recipe(recipe(network, *(stages or ({"use": "export"},)), **quantize), []), directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The finished run of a network, backend and mode; runs of one network share its teacher."""
    root = tmp_path_factory.mktemp("backends")

    @cache
    def run(network: str, backend: str, mode: str) -> Plan:
        found = planned(root / network, network, backend=backend, mode=mode)
        run_steps(found, lambda event: None)
        return found

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, made: Made) -> Callable[[str], Path]:
    """The float file of a network."""
    root = tmp_path_factory.mktemp("plain")

    @cache
    def write(network: str) -> Path:
        run = made(network, "onnxruntime", "weight-only")
        write_onnx(run.artifact("teacher"), root / f"{network}.onnx", run.data, opset=18)
        return root / f"{network}.onnx"

    return write


def right(file: Path, run: Plan) -> float:
    data = run.data
    images = (data.test.images.numpy() / 255 - np.reshape(data.mean, (1, -1, 1, 1))) / np.reshape(
        data.std, (1, -1, 1, 1)
    )
    with contextlib.closing(open_session(file)) as session:
        logits = session.run({"image": images.astype(np.float32)})["logits"]
    return float((logits.argmax(1) == data.test.labels.numpy()).mean())


def integers(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load(file)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("backend", "mode"), WAYS)
def test_a_backend_goes_through_a_recipe_to_a_file_of_integers(
    made: Made, plain: Callable[[str], Path], network: str, backend: str, mode: str
) -> None:
    run = made(network, backend, mode)
    teacher, quantized, exported = (run.artifact(step.name) for step in run.steps)
    weights = {
        name: module.weight.detach().numpy()
        for name, module in load_network(teacher).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    record = quantized.manifest.quantization
    assert record is not None
    computed = None if mode == "weight-only" else "x86-u8s8"
    assert (record["backend"], record["mode"], record["scheme"]) == (backend, mode, computed)
    assert record["version"][0].isdigit()
    told = set() if mode == "weight-only" else {"precision.json"}
    assert set(quantized.manifest.files) == {"model.onnx"} | told
    file = exported.file("model.onnx")
    assert file.read_bytes() == quantized.file("model.onnx").read_bytes()
    assert exported.manifest.quantization == record
    metadata = read_metadata(file)
    assert metadata["classes"] == [str(d) for d in range(10)]
    assert metadata["preprocessing"]["size"] == [1, 8, 8]

    stored = [a for a in integers(file).values() if a.size >= 256]
    linear = [w for name, w in weights.items() if w.ndim == 2]
    if mode == "dynamic":
        expected = [w.size for w in linear]
    elif backend == "onnxruntime" and mode == "static" and network == "vit":
        expected = [w.size for w in linear]  # its patch embedding stays float
    else:
        expected = [w.size for w in weights.values()]
    assert sorted(a.size for a in stored) == sorted(n for n in expected if n >= 256)
    assert all(np.abs(a.astype(int)).max() in (127, 128) for a in stored)

    assert right(plain(network), run) > 0.75
    assert right(file, run) >= right(plain(network), run) - 0.02
    metrics = exported.manifest.metrics
    assert metrics["float_agreement"] > 0.95
    assert metrics["opset"] == 18
    assert metrics["layers"] == optimised_layers(file)
    if mode == "weight-only":
        assert metrics["layers"]["int8"] == 0
        assert metrics["max_abs_difference"] > 0
    elif (network, backend, mode) == ("resnet", "onnxruntime", "static"):
        assert metrics["layers"] == {"int8": 8, "float": 0}
    elif backend == "neural-compressor" and network == "resnet":
        assert metrics["layers"]["float"] >= 3  # the convolutions before an addition: no Q behind them
    elif mode == "dynamic" and network == "resnet":
        assert metrics["layers"] == {"int8": 1, "float": 7}


@pytest.mark.parametrize(("backend", "mode"), WAYS)
def test_what_is_there_is_not_made_again_and_is_measured_as_it_is(
    made: Made, backend: str, mode: str, tmp_path: Path
) -> None:
    run = made("resnet", backend, mode)
    before = {step.name: (step.directory / "manifest.json").stat().st_mtime_ns for step in run.steps}
    events: list[dict[str, Any]] = []
    again = planned(run.directory, backend=backend, mode=mode)
    run_steps(again, events.append)
    assert [event["done"] for event in events if event["event"] == "stage"] == [True, True, True]
    assert {s.name: (s.directory / "manifest.json").stat().st_mtime_ns for s in again.steps} == before
    quantized = again.artifact("quantize")
    measured = candidate_of(quantized, "quantize", run.data, 18, tmp_path)
    assert measured.file.read_bytes() == quantized.file("model.onnx").read_bytes()
    for other in set(WAYS) - {(backend, mode)}:
        assert made("resnet", *other).step("quantize").key != quantized.key


def ratio(value: float) -> Measured:
    speedup = Interval(value=value, low=value - 0.02, high=value + 0.02)
    return Measured(profile="cpu-x86", float_ms=1.0, own_ms=1 / value, speedup=speedup)


def test_a_file_that_is_slower_and_less_accurate_is_not_handed_out(
    made: Made, workspace: Callable[..., Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made("resnet", "onnxruntime", "static")
    teacher, data = run.artifact("teacher"), run.data
    profile = run.profiles[0]

    def quantized(name: str, **config: Any) -> Artifact:
        draft = {"backend": "onnxruntime", "calibration": 128, "heal": {"epochs": 0}, "scheme": "x86-u8s8", **config}
        stage = Quantize.model_validate(draft)
        work = replace(workspace(stage, tmp_path / name, {"source": teacher}), data=data, profiles=[profile])
        return stage.run(work)

    seen: list[Path] = []

    def timed(plain: Path, own: Path, profile: Any) -> Measured:
        seen.extend([plain, own])
        assert not integers(plain)
        assert integers(own)
        return ratio(1.5)

    monkeypatch.setattr(backends, "compared", timed)
    faster = quantized("faster")
    assert len(seen) == 2
    record = PrecisionRecord.model_validate_json(faster.file("precision.json").read_text())
    images = (data.validation.images.float() / 255 - torch.tensor(data.mean).view(1, -1, 1, 1)) / torch.tensor(
        data.std
    ).view(1, -1, 1, 1)
    with contextlib.closing(open_session(faster.file("model.onnx"))) as session:
        answers = session.run({"image": images.numpy()})["logits"].argmax(1)
    assert record.measured is not None
    assert record.measured.own_metric == pytest.approx((answers == data.validation.labels.numpy()).mean())
    assert record.kept_float is None

    monkeypatch.setattr(backends, "compared", lambda *files: ratio(0.8))
    accuracies = {True: 0.9, False: 0.89}

    def judged(workspace: Workspace, network: nn.Module) -> tuple[float, int, str]:
        return accuracies[any(True for _ in network.parameters())], 100, "validation"

    monkeypatch.setattr(mixing, "judged", judged)
    kept = quantized("kept")
    assert kept.manifest.quantization is None
    assert torch.equal(load_network(kept).eval()(images[:8]), load_network(teacher).eval()(images[:8]))
    why = kept.manifest.metrics["kept_float"]
    assert "0.80x [0.78, 0.82]" in why
    assert "mixed" not in why  # which backends know nothing of
    assert json.loads(kept.file("precision.json").read_text())["kept_float"] == why
    accuracies[False] = 0.9
    assert quantized("slower").manifest.quantization is not None
    accuracies[False] = 0.5
    assert quantized("unasked", keep_float=False).manifest.quantization is not None
    assert quantized("smaller", mode="weight-only").manifest.quantization is not None


def test_there_is_no_network_to_go_on_from(made: Made) -> None:
    quantized = made("resnet", "onnxruntime", "static").artifact("quantize")
    with pytest.raises(ArtifactError, match="holds no float network"):
        load_network(quantized)
    with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
        load_prepared(quantized)


PRUNE = {"use": "prune", "target": {"macs": 0.8}, "heal": {"epochs": 0}}
QAT = {"use": "quantize", "heal": {"epochs": 1, "objectives": ["ce"]}}


@pytest.mark.parametrize(
    ("config", "stages", "where", "what"),
    [
        (
            {"backend": "onnxruntime", "heal": {"epochs": 2}},
            (),
            "stage[0].heal.epochs",
            "leaves no network that trains",
        ),
        ({"mode": "dynamic"}, (), "stage[0].mode", "backend edgekd quantizes statically"),
        ({"mode": "weight-only", "backend": "neural-compressor"}, (), "stage[0].mode", "quantizes statically"),
        ({"backend": "onnxruntime", "scheme": "trt-s8s8"}, (), "stage[0].scheme", "placed for tensorrt"),
        ({"backend": "neural-compressor", "scheme": "arm-s8s8"}, (), "stage[0].scheme", "not arm-s8s8"),
        ({"backend": "onnxruntime", "tune": {}}, (), "stage[0].tune", "ONNX Runtime has no tuning"),
        ({"tune": {"max_drop": 0.1}}, (), "stage[0].tune", "another backend"),
        ({"backend": "neural-compressor", "tune": {"max_drop": 0}}, (), "stage[0].tune.max_drop", "greater than 0"),
        ({"backend": "onnxruntime", "ranges": "mse"}, (), "stage[0].ranges", "no ranges 'mse'"),
        ({"backend": "neural-compressor", "ranges": "entropy"}, (), "stage[0].ranges", "no ranges 'entropy'"),
        ({"backend": "onnxruntime", "float_layers": ["linear"]}, (), "stage[0].float_layers", "knows nothing"),
        ({"backend": "onnxruntime", "mixed": "latency"}, (), "stage[0].mixed", "knows nothing"),
        ({"backend": "onnxruntime", "corrections": ["round"]}, (), "stage[0].corrections", "knows nothing"),
        (
            {"backend": "onnxruntime", "mode": "dynamic", "scheme": "arm-s8s8"},
            (),
            "stage[0].mode",
            "uint8 activations, scheme arm-s8s8 has int8",
        ),
        (
            {"backend": "onnxruntime", "mode": "dynamic", "scheme": "trt-s8s8"},
            (),
            "stage[0].scheme",
            "placed for tensorrt",
        ),
        ({"backend": "onnxruntime", "calibration": 1}, (), "stage[0].calibration", "images are of class"),
        ({"backend": "onnx"}, (), "stage[0].backend", "'neural-compressor'"),
        ({"backend": "onnxruntime"}, ({"use": "export", "input": "uint8"},), "stage[1].input", "float32"),
        (
            {"backend": "onnxruntime"},
            ({"use": "export", "dynamic_batch": False},),
            "stage[1].dynamic_batch",
            "any size",
        ),
        ({"backend": "onnxruntime"}, ({"use": "export", "opset": 20},), "stage[1].opset", "opset 18, got 20"),
        ({"backend": "onnxruntime"}, (PRUNE,), "stage[1]", "prune cannot follow quantize"),
        ({"backend": "onnxruntime"}, ({**QAT, "after": "quantize"},), "stage[1].after", "holds no float network"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_runs(
    tmp_path: Path, config: dict[str, Any], stages: tuple[dict[str, Any], ...], where: str, what: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        planned(tmp_path, "resnet", *stages, **config)
    [problem] = [p for p in raised.value.problems if p.where == where]
    assert what in problem.what


def test_a_file_for_the_other_schemes_has_their_integers(plain: Callable[[str], Path], tmp_path: Path) -> None:
    batches = [np.random.default_rng(i).normal(size=(16, 1, 8, 8)).astype(np.float32) for i in range(2)]
    onnxruntime.quantize_static(plain("resnet"), tmp_path / "7.onnx", batches, SCHEMES["x86-u8s7"])
    assert all(np.abs(a.astype(int)).max() <= 64 for a in integers(tmp_path / "7.onnx").values())
    for bits, largest in ((7, 64), (8, 127)):
        onnxruntime.quantize_dynamic(plain("resnet"), tmp_path / "dynamic.onnx", SCHEMES[f"x86-u8s{bits}"])
        weights = [np.abs(a.astype(int)).max() for a in integers(tmp_path / "dynamic.onnx").values() if a.size >= 256]
        assert weights == [pytest.approx(largest, abs=1)]
    onnxruntime.quantize_static(plain("resnet"), tmp_path / "arm.onnx", batches, SCHEMES["arm-s8s8"])
    kinds = {t.data_type for t in onnx.load(tmp_path / "arm.onnx").graph.initializer if "zero_point" in t.name}
    assert kinds <= {TensorProto.INT8, TensorProto.INT32}


def input_scale(file: Path) -> float:
    model = onnx.load(file)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    [node] = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "image"]
    return float(tensors[node.input[1]])


def test_ranges_come_from_all_calibration_images_by_the_method_asked_for(
    plain: Callable[[str], Path], tmp_path: Path
) -> None:
    batches = [np.random.default_rng(i).uniform(0, 1, (1200, 1, 8, 8)).astype(np.float32) for i in range(3)]
    batches[1][0, 0, 0, 0] = 4.0
    batches[2][0, 0, 0, 0] = -1.0
    found = {}
    for ranges in onnxruntime.METHODS:
        onnxruntime.quantize_static(plain("resnet"), tmp_path / "q.onnx", batches, SCHEMES["x86-u8s8"], ranges)
        found[ranges] = input_scale(tmp_path / "q.onnx")
    assert found["min-max"] == pytest.approx(5 / 255, rel=1e-5)
    # 230,400 values: two of them are less than what percentiles leave out.
    assert found["percentile"] < 1.1 / 255
    assert found["entropy"] < 4 / 255


def test_tuning_takes_the_first_configuration_that_keeps_accuracy_else_the_best() -> None:
    torch.manual_seed(0)
    network = build(specified()).eval()
    example = torch.randn(8, 1, 8, 8)

    def quantizers(module: nn.Module) -> int:
        names = [
            str(node.target) for graph in module.modules() if hasattr(graph, "graph") for node in graph.graph.nodes
        ]
        return sum("quantize_per_tensor" in name for name in names)

    def tuned(*figures: float, max_drop: float) -> tuple[int, dict[str, Any]]:
        # That of the float network, which Neural Compressor asks for once more, then the trials'.
        left = iter([figures[0], *figures])
        seen: list[int] = []

        def accuracy(module: nn.Module) -> float:
            seen.append(quantizers(module))
            assert module(example)["logits"].shape == (8, 10)
            return next(left)

        result, record = neural_compressor.tune(network, example, [example], accuracy, max_drop)
        assert seen[:2] == [0, 0]
        assert all(seen[2:])
        return quantizers(result), record

    everything, record = tuned(0.9, 0.5, 0.895, max_drop=0.01)
    assert record["taken"] == "mse"
    assert record["reached"] is True
    assert record["trials"] == {"min-max": 0.5, "mse": 0.895}
    fewer, record = tuned(0.9, 0.5, 0.6, 0.8, 0.7, max_drop=0.01)
    assert record["taken"] == "mse, conv1 and linear in float"
    assert record["reached"] is False
    assert list(record["trials"].values()) == [0.5, 0.6, 0.8, 0.7]
    assert 0 < fewer < everything


def specified() -> Any:
    from edgekd.models import specify

    args = {"depth": 8, "width": 8}
    return specify("cifar-resnet", args, classes=10, size=[1, 8, 8], where="model")


def test_tuning_in_a_recipe_is_judged_on_the_validation_images(made: Made) -> None:
    directory = made("resnet", "neural-compressor", "static").directory
    run = planned(directory, backend="neural-compressor", tune={"max_drop": 0.02})
    run_steps(run, lambda event: None, until="quantize")
    record = run.artifact("quantize").manifest.quantization
    assert record is not None
    tune = record["options"]["tune"]
    count = len(run.data.validation)
    assert tune["float"] * count == pytest.approx(round(tune["float"] * count), abs=1e-3)
    assert tune["reached"] is True
    assert tune["float"] - tune["trials"][tune["taken"]] <= 0.02
    json.dumps(record)


def test_tuning_that_misses_its_goal_stops_the_stage(
    made: Made, workspace: Callable[..., Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made("resnet", "onnxruntime", "static")
    trials = {"min-max": 0.8, "mse": 0.8765}
    record = {"float": 0.9, "trials": trials, "taken": "mse", "reached": False}
    monkeypatch.setattr(neural_compressor, "tune", lambda network, *rest: (network, record))
    config = {"backend": "neural-compressor", "tune": {"max_drop": 0.01}, "scheme": "x86-u8s8", "heal": {"epochs": 0}}
    stage = Quantize.model_validate(config)
    parents = {"source": run.artifact("teacher")}
    with pytest.raises(StageError, match=r"at most 0\.01 of the accuracy: the nearest, mse, loses 0\.0235") as caught:
        stage.run(replace(workspace(stage, tmp_path / "q", parents), data=run.data))
    assert caught.value.problem.where == "quantize.tune.max_drop"
    assert "max_drop = 0.0235" in (caught.value.problem.hint or "")


def test_a_file_of_a_newer_opset_is_not_passed_on(
    made: Made, workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    run = made("resnet", "onnxruntime", "static")
    newer = tmp_path / "newer"
    shutil.copytree(run.artifact("quantize").path, newer)
    model = onnx.load(newer / "model.onnx")
    next(entry for entry in model.opset_import if entry.domain == "").version = 20
    onnx.save(model, newer / "model.onnx")
    stage = Export(opset=18)
    work = workspace(stage, tmp_path / "export", {"source": Artifact.open(newer, verify=False)})
    with pytest.raises(StageError, match="holds a file of ONNX opset 20, wanted is 18 at most"):
        stage.run(replace(work, data=run.data))


def test_images_that_are_not_finite_stop_it(made: Made, workspace: Callable[..., Workspace], tmp_path: Path) -> None:
    teacher = made("resnet", "onnxruntime", "static").artifact("teacher")
    stage = Quantize.model_validate({"backend": "onnxruntime", "heal": {"epochs": 0}, "scheme": "x86-u8s8"})
    work = workspace(stage, tmp_path / "quantize", {"source": teacher})
    images = work.data.train.images.float() / 255
    images[0, 0, 0, 0] = float("nan")
    data = replace(work.data, train=Split(images, work.data.train.labels))
    with pytest.raises(UsageError, match="NaN or infinity"):
        stage.run(replace(work, data=data))
    assert not (tmp_path / "quantize").exists()


def graph_of(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray[Any, Any]], channels: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", channels])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def answers(model: onnx.ModelProto, path: Path, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    with contextlib.closing(open_session(path)) as session:
        return session.run({"image": image})["logits"]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weights_quantized_in_the_file_are_calculated_once_and_for_all(tmp_path: Path, axis: int) -> None:
    random = np.random.default_rng(0)
    weight, image = random.normal(size=(24, 16)).astype(np.float32), random.normal(size=(5, 24)).astype(np.float32)
    scale = random.uniform(0.01, 0.03, 24 if axis == 0 else 16).astype(np.float32)
    zero = np.zeros(len(scale), np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["f"], axis=axis),
        helper.make_node("MatMul", ["image", "f"], ["logits"]),
    ]
    model = graph_of(nodes, {"w": weight, "s": scale, "z": zero}, 24)
    before = answers(model, tmp_path / "before.onnx", image)
    assert fold_quantized_weights(model) == 1
    assert [n.op_type for n in model.graph.node] == ["DequantizeLinear", "MatMul"]
    assert "w" not in {t.name for t in model.graph.initializer}
    np.testing.assert_array_equal(answers(model, tmp_path / "after.onnx", image), before)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_weights_alone_are_rounded_by_output_channel_and_shared_ones_once(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    image = random.normal(size=(5, 16)).astype(np.float32)
    weight = random.normal(size=(16, 16)).astype(np.float32) * np.geomspace(0.01, 10, 16, dtype=np.float32)[:, None]
    weight[3] = 0
    turned = weight if kind == "Gemm" else np.ascontiguousarray(weight.T)
    more = {"transB": 1} if kind == "Gemm" else {}
    nodes = [
        helper.make_node(kind, ["image", "layer.weight"], ["h"], **more),
        helper.make_node(kind, ["h", "layer.weight"], ["logits"], **more),
    ]
    model = graph_of(nodes, {"layer.weight": turned}, 16)
    assert store_weights_as_int8(model) == 1
    [stored] = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8]
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    rounded = np.round(weight / np.where(step > 0, step, 1))
    np.testing.assert_array_equal(stored if kind == "Gemm" else stored.T, rounded)
    for layer in stored_layers(model, Graph(model)):
        assert layer.w is not None
        assert (layer.w.dtype, layer.x, layer.path) == ("s8", None, "layer")
        np.testing.assert_allclose(layer.weight, (rounded * step).T, rtol=1e-6)
    expected = image @ (rounded * step).T @ (rounded * step).T
    np.testing.assert_allclose(answers(model, tmp_path / "f.onnx", image), expected, rtol=1e-4, atol=1e-4)


def test_an_export_passes_on_the_metrics_of_the_file_and_its_axes(
    made: Made, workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    run = made("vit", "onnxruntime", "dynamic")
    exported: Artifact = run.artifact("export")
    assert exported.manifest.inputs[0].axes == ["batch", 1, 8, 8]
    assert exported.manifest.metrics["float_agreement"] == run.artifact("quantize").manifest.metrics["float_agreement"]
    resolved = Export().resolved(run.profiles, Teaching([], parse_recipe(recipe("vit"), []).task))
    assert resolved.opset == 18
