"""What a quantize stage decides by measuring, with injected times; and one real run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import RESNET, made_recipe
from torch import Tensor

from edgekd.artifact import Artifact
from edgekd.bench import Interval, side_by_side
from edgekd.data import Dataset, Split
from edgekd.errors import StageError
from edgekd.profile import Profile
from edgekd.quant import SCHEMES
from edgekd.quant.fake_quantize import ActivationFakeQuantize, WeightPerChannelFakeQuantize
from edgekd.quant.mixed import Measured, PrecisionRecord
from edgekd.recipe import Component
from edgekd.screen import line
from edgekd.stages import Context, Quantize, Teacher, Workspace, mixing, paying
from edgekd.stages.export import write_onnx
from edgekd.stages.saturating import saturation
from edgekd.stages.teaching import Teaching, load_network
from edgekd.stages.workspace import load_prepared
from edgekd.train import predict

Make = Callable[..., Workspace]
TAUGHT = Teaching(["ce"], Component(use="frozen"))
LAYERS = [
    *("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"),
    *("layer3.0.conv1", "layer3.0.conv2", "linear"),
]


@pytest.fixture(scope="module")
def source(workspace: Make, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    stage = Teacher.model_validate({"model": RESNET, "epochs": 3, "lr": 0.2})
    return stage.run(workspace(stage, tmp_path_factory.mktemp("source") / "teacher", {}))


def quantize(cpu: Profile, **config: Any) -> Any:
    draft = Quantize.model_validate({"calibration": 64, "heal": {"epochs": 0}, **config})
    return draft.resolved([cpu], TAUGHT)


def measured(value: float, low: float, high: float) -> Measured:
    return Measured(
        profile="cpu-x86", float_ms=1.0, own_ms=1 / value, speedup=Interval(value=value, low=low, high=high)
    )


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Nothing is exported to be timed where times are injected."""
    if "really" not in request.node.name:
        monkeypatch.setattr(paying, "_export", lambda pricing, module, path: path)


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paying, "compared", lambda *files: measured(0.8, 0.78, 0.82))


@pytest.fixture
def judgements(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Let the float network and the quantized one have these accuracies."""

    def judge(of_float: float, of_int8: float) -> None:
        def judged(workspace: Workspace, network: Any) -> tuple[float, int, str]:
            quantized = any(isinstance(m, ActivationFakeQuantize) for m in network.modules())
            return of_int8 if quantized else of_float, 100, "validation"

        monkeypatch.setattr(mixing, "judged", judged)

    return judge


def record_of(artifact: Artifact) -> PrecisionRecord:
    return PrecisionRecord.model_validate_json(artifact.file("precision.json").read_text())


@pytest.mark.usefixtures("slower")
def test_what_is_slower_and_less_accurate_is_not_handed_out(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, images: Tensor, dataset: Dataset, judgements: Any
) -> None:
    judgements(0.9, 0.89)
    stage = quantize(cpu)
    events: list[dict[str, Any]] = []
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source}, emit=events.append))
    assert artifact.manifest.kind == "quantize"
    assert artifact.manifest.quantization is None
    before, after = load_network(source).eval(), load_network(artifact).eval()
    with torch.no_grad():
        assert torch.equal(before(images), after(images))
    record = record_of(artifact)
    assert record.kept_float == artifact.manifest.metrics["kept_float"]
    assert "0.80x [0.78, 0.82]" in record.kept_float
    assert "accuracy 0.8900, float 0.9000" in record.kept_float
    assert record.measured is not None
    assert (record.measured.float_metric, record.measured.own_metric, record.measured.images) == (0.9, 0.89, 100)
    assert {(layer.precision, layer.reason) for layer in record.layers} == {("float", "the whole network stays float")}
    [told] = [event for event in events if event["event"] == "float"]
    assert told["why"] == record.kept_float
    found = write_onnx(artifact, tmp_path / "model.onnx", dataset, opset=18)  # what follows goes on as always
    assert found["layers"] == {"int8": 0, "float": 8}
    assert found["argmax_agreement"] == 1


@pytest.mark.usefixtures("slower")
@pytest.mark.parametrize(("of_float", "of_int8"), [(0.9, 0.9), (0.9, 0.91)])
def test_slower_alone_is_recorded_and_handed_out(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, judgements: Any, of_float: float, of_int8: float
) -> None:
    judgements(of_float, of_int8)
    stage = quantize(cpu)
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source}))
    assert artifact.manifest.quantization is not None
    record = record_of(artifact)
    assert record.kept_float is None
    assert record.measured is not None
    assert record.measured.speedup.value == 0.8
    assert [layer.path for layer in record.layers if layer.precision == "int8"][:3] == LAYERS[:3]


def test_less_accurate_alone_is_handed_out_and_nothing_is_measured_where_nobody_asks(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, judgements: Any, monkeypatch: Any
) -> None:
    judgements(0.9, 0.5)
    monkeypatch.setattr(paying, "compared", lambda *files: measured(1.0, 0.98, 1.02))  # the interval holds 1
    stage = quantize(cpu)
    assert stage.run(workspace(stage, tmp_path / "a", {"source": source})).manifest.quantization is not None
    monkeypatch.setattr(paying, "compared", lambda *files: pytest.fail("measured"))
    stage = quantize(cpu, keep_float=False)
    artifact = stage.run(workspace(stage, tmp_path / "b", {"source": source}))
    assert artifact.manifest.quantization is not None
    assert record_of(artifact).not_measured == "keep_float = false"


@pytest.mark.usefixtures("slower")
def test_a_network_that_int8_cannot_make_faster_is_not_healed(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "train", lambda *arguments: pytest.fail("trained"))
    stage = quantize(cpu, heal={"epochs": 2})
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source, "teacher": source}))
    assert artifact.manifest.quantization is None
    kept = record_of(artifact).kept_float
    assert kept is not None
    assert "healing would not change that" in kept
    assert "mixed = 'latency'" in kept
    assert not (tmp_path / ".partial" / "q").exists()


class Interrupted(Exception):
    pass


def test_a_healing_that_was_cut_goes_on_with_the_layers_it_had_chosen(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    shares = dict.fromkeys(LAYERS, 0.5) | {"conv1": 1.5, "linear": 1.5}
    device = Device(shares)
    inject(monkeypatch, device)
    heal = {"epochs": 3, "checkpoint_s": 0.0, "precision": "fp32"}
    stage = quantize(cpu, heal=heal, mixed="latency", learned=True, warmup=0.4, corrections=["equalise"])
    parents = {"source": source, "teacher": source}
    whole = stage.run(workspace(stage, tmp_path / "whole", parents))
    chosen = record_of(whole)
    assert chosen.float_layers == ["conv1", "linear"]

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        stage.run(workspace(stage, tmp_path / "cut", parents, emit=emit))
    device.shares = dict.fromkeys(LAYERS, 2.0)  # another hour, another load: nothing would be int8 now
    torch.rand(7)
    cut = stage.run(workspace(stage, tmp_path / "cut", parents))
    assert cut.manifest.files["model.safetensors"] == whole.manifest.files["model.safetensors"]
    assert cut.manifest.quantization == whole.manifest.quantization
    assert record_of(cut) == chosen.model_copy(update={"measured": record_of(cut).measured})
    assert not (tmp_path / ".partial" / "cut").exists()
    loaded = load_prepared(cut)
    assert set(loaded.state_dict()) == set(load_prepared(whole).state_dict())
    switched = [m for m in loaded.modules() if isinstance(m, ActivationFakeQuantize | WeightPerChannelFakeQuantize)]
    assert all(m.quantizes for m in switched)  # the gradual start is over


class Device:
    """Times of layers in int8 as a share of those in float, which are all 1."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares = shares

    def __call__(self, sets: Mapping[str, frozenset[str]]) -> dict[str, float]:
        takes = {n: sum(self.shares[p] if p in chosen else 1.0 for p in LAYERS) for n, chosen in sets.items()}
        return {name: len(LAYERS) / took for name, took in takes.items()}


def inject(monkeypatch: pytest.MonkeyPatch, device: Device, final: Measured | None = None) -> None:
    monkeypatch.setattr(paying, "_timer", lambda *arguments: device)
    monkeypatch.setattr(paying, "compared", lambda *files: final or measured(1.5, 1.45, 1.55))


def test_layers_whose_int8_loses_time_stay_float_in_the_file_too(
    tmp_path: Path,
    workspace: Make,
    source: Artifact,
    cpu: Profile,
    monkeypatch: pytest.MonkeyPatch,
    images: Tensor,
    dataset: Dataset,
) -> None:
    shares = dict.fromkeys(LAYERS, 0.5) | {"conv1": 1.6, "layer1.0.conv2": 1.4}
    inject(monkeypatch, Device(shares))
    stage = quantize(cpu, mixed="latency", float_layers=["lin*"])
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source}))
    record = record_of(artifact)
    assert record.float_layers == ["conv1", "layer1.0.conv2", "linear"]
    layers = {layer.path: layer for layer in record.layers}
    assert layers["conv1"].reason == "int8 saves no time here"
    assert layers["linear"].reason == "kept in float by choice"
    assert layers["layer3.0.conv1"].precision == "int8"
    assert layers["layer3.0.conv1"].gain == pytest.approx(0.5 / 8)
    assert layers["conv1"].gain == pytest.approx(-0.6 / 8)
    assert layers["layer3.0.conv1"].harm is not None
    assert record.tried[0].int8 == 5
    assert record.tried[0].speedup == max(candidate.speedup for candidate in record.tried)
    found = write_onnx(artifact, tmp_path / "model.onnx", dataset, opset=18)
    assert found["layers"] == {"int8": 5, "float": 3}
    loaded = load_prepared(artifact)
    again = predict(loaded, dataset.test, dataset, 100)
    file = load_prepared(Artifact.open(artifact.path))
    assert (again == predict(file, dataset.test, dataset, 100)).all()


def test_the_most_accurate_that_is_fast_enough_and_the_fastest_that_is_accurate_enough(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch, judgements: Any
) -> None:
    inject(monkeypatch, Device(dict.fromkeys(LAYERS, 0.5)))
    harm = {path: 0.1 * i for i, path in enumerate(LAYERS)}
    monkeypatch.setattr(paying.quant, "harms", lambda prepared, batches: harm)
    stage = quantize(cpu, mixed={"speedup": 1.2})  # of 8 that save a half each, three make 1.23
    record = record_of(stage.run(workspace(stage, tmp_path / "speed", {"source": source})))
    assert record.float_layers == sorted(LAYERS[3:])
    assert {layer.reason for layer in record.layers if layer.precision == "float"} == {
        "int8 costs too much accuracy here"
    }
    # Each layer costs as many points as it harms, so that the last three have to go: 0.6 + 0.7 + 0.5 of 2.8.
    monkeypatch.setattr(paying, "_dropping", lambda *a: lambda chosen: sum(harm[path] for path in chosen) / 100)
    stage = quantize(cpu, mixed={"max_drop": 0.0101})
    record = record_of(stage.run(workspace(stage, tmp_path / "drop", {"source": source})))
    assert record.float_layers == sorted(LAYERS[5:])
    stage = quantize(cpu, mixed={"max_drop": 0.0})
    record = record_of(stage.run(workspace(stage, tmp_path / "none", {"source": source})))
    assert record.float_layers == sorted(LAYERS[1:])  # what harms nothing stays


def test_without_the_device_accuracy_alone_decides(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paying, "measuring_profile", lambda profiles: (None, "it is elsewhere"))
    monkeypatch.setattr(paying, "side_by_side", lambda *files: pytest.fail("measured"))
    judged: list[int] = []

    def judge(work: Workspace, network: Any) -> tuple[float, int, str]:
        quantizers = sum(isinstance(m, WeightPerChannelFakeQuantize) for m in network.modules())
        judged.append(quantizers)
        return 0.9 - 0.002 * quantizers, 100, "validation"

    monkeypatch.setattr(paying, "judged", judge)
    stage = quantize(cpu, mixed={"max_drop": 0.01})
    record = record_of(stage.run(workspace(stage, tmp_path / "q", {"source": source})))
    assert record.not_measured == "it is elsewhere"
    assert record.measured is None
    int8 = [layer for layer in record.layers if layer.precision == "int8"]
    assert len(int8) == 5
    harms = {layer.path: layer.harm or 0.0 for layer in record.layers}
    assert max(layer.harm or 0.0 for layer in int8) <= min(harms[path] for path in record.float_layers)


def test_no_choice_of_layers_is_faster(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, Device(dict.fromkeys(LAYERS, 1.1)))
    monkeypatch.setattr(Workspace, "train", lambda *arguments: pytest.fail("trained"))
    stage = quantize(cpu, mixed="latency", heal={"epochs": 1})
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source, "teacher": source}))
    assert artifact.manifest.quantization is None
    record = record_of(artifact)
    assert record.kept_float == "no choice of layers is faster than float on cpu-x86"
    assert record.tried
    assert all(candidate.speedup < 1 for candidate in record.tried)
    stage = quantize(cpu, mixed={"speedup": 1.5})
    with pytest.raises(StageError, match=r"1\.5x over float cannot be had on cpu-x86: 0\.99x is the most"):
        stage.run(workspace(stage, tmp_path / "r", {"source": source}))
    inject(monkeypatch, Device(dict.fromkeys(LAYERS, 0.8)))
    stage = quantize(cpu, mixed={"speedup": 1.5})
    with pytest.raises(StageError, match=r"1\.25x is the most") as caught:
        stage.run(workspace(stage, tmp_path / "r", {"source": source}))
    assert caught.value.problem.where == "quantize.mixed.speedup"
    assert caught.value.problem.hint == "ask for 1.24"


def test_a_speed_up_that_accuracy_does_not_allow_is_told(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(dict.fromkeys(LAYERS, 0.5))  # twice as fast with all of them
    inject(monkeypatch, device)
    monkeypatch.setattr(paying, "_dropping", lambda *a: lambda chosen: 0.001 * len(chosen))

    def refused(**mixed: float) -> StageError:
        stage = quantize(cpu, mixed=mixed)
        with pytest.raises(StageError) as caught:
            stage.run(workspace(stage, tmp_path / "q", {"source": source}))
        assert caught.value.problem.where == "quantize.mixed.speedup"
        return caught.value

    nothing = refused(speedup=1.4, max_drop=0.0)
    assert "within a loss of 0.00%: 1.00x is what the chosen layers reach" in nothing.problem.what
    assert nothing.problem.hint == "allow a larger max_drop"
    inject(monkeypatch, device, measured(1.33, 1.28, 1.41))  # four layers; the interval's end is no speed-up
    some = refused(speedup=1.4, max_drop=0.004)
    assert "1.4x over float cannot be had on cpu-x86 within a loss of 0.40%: 1.33x is what" in some.problem.what
    assert some.problem.hint == "ask for 1.32, or a larger max_drop"
    alone = refused(speedup=1.4)
    assert "1.4x over float cannot be had on cpu-x86: 1.33x is what the chosen layers reach" in alone.problem.what
    assert alone.problem.hint == "ask for 1.32"


def test_a_mixture_that_proves_slower_as_a_whole_is_not_handed_out(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch, judgements: Any
) -> None:
    judgements(0.9, 0.89)
    inject(monkeypatch, Device(dict.fromkeys(LAYERS, 0.8)), measured(0.97, 0.96, 0.98))
    stage = quantize(cpu, mixed="latency")
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source}))
    assert artifact.manifest.quantization is None
    assert "0.97x [0.96, 0.98]" in (record_of(artifact).kept_float or "")


def test_really_measured(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, dataset: Dataset, monkeypatch: Any
) -> None:
    monkeypatch.setattr(paying, "side_by_side", partial(side_by_side, rounds=3, cap_s=0.1))
    stage = quantize(cpu, mixed="latency", float_layers=["layer[12]*"])
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source}))
    record = record_of(artifact)
    assert len(record.tried) >= 6  # of conv1, two layers of the last block, and the classifier
    assert {layer.path for layer in record.layers} == set(LAYERS)
    free = [layer for layer in record.layers if not layer.path.startswith(("layer1", "layer2"))]
    assert all(layer.gain is not None and layer.harm is not None for layer in free)
    assert len(free) == 4
    if record.kept_float is not None:
        assert artifact.manifest.quantization is None
        return
    assert record.measured is not None
    assert record.measured.speedup.low <= record.measured.float_ms / record.measured.own_ms * 1.2
    assert record.measured.metric == "accuracy"
    found = write_onnx(artifact, tmp_path / "model.onnx", dataset, opset=18)
    assert found["layers"]["int8"] == sum(layer.precision == "int8" for layer in free)


@pytest.mark.parametrize(
    ("config", "place", "what", "hint"),
    [
        ({"float_layers": ["layer2.*", "layr3.0"]}, "float_layers[1]", "'layr3.0' matches no module", "layer3.0"),
        ({"learned": True}, "learned", "heal.epochs is 0", "epochs = 3"),
        ({"warmup": 0.1}, "warmup", "heal.epochs is 0", "epochs = 3"),
        ({"warmup": 0.5, "heal": {"epochs": 1}}, "warmup", "0.5 of 1 epochs leaves none", "epochs = 3"),
        ({"corrections": ["bias", "bias"]}, "corrections[1]", "twice", ""),
        ({"corrections": ["equalise", "round"], "heal": {"epochs": 1}}, "corrections[1]", "not trained", "epochs = 0"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    config: dict[str, Any], place: str, what: str, hint: str, source: Artifact, cpu: Profile, dataset: Dataset
) -> None:
    context = Context(made_recipe(), dataset, [cpu], [], source.manifest.model, "stage[1]", {})
    [problem] = [p for p in quantize(cpu, **config).check(context)[1] if place in p.where]
    assert problem.where == f"stage[1].{place}"
    assert what in problem.what
    assert hint in (problem.hint or "")


def test_wishes_about_time_need_a_device_that_is_here(source: Artifact, cpu: Profile, dataset: Dataset) -> None:
    other = cpu.model_copy(update={"architecture": "aarch64" if cpu.architecture != "aarch64" else "x86-64"})
    context = Context(made_recipe(), dataset, [other], [], source.manifest.model, "stage[1]", {})
    [problem] = quantize(cpu, mixed="latency").check(context)[1]
    assert problem.where == "stage[1].mixed"
    assert "no latency can be measured: cpu-x86 is aarch64" in problem.what
    assert quantize(cpu, mixed={"max_drop": 0.01}).check(context)[1] == []


def test_calibration_images_of_one_class_are_refused_before_anything_runs(
    workspace: Make, source: Artifact, cpu: Profile, dataset: Dataset, tmp_path: Path
) -> None:
    recipe = made_recipe()
    context = Context(recipe, dataset, [cpu], [], source.manifest.model, "stage[1]", {})
    stage = quantize(cpu, calibration=1)
    label = next(workspace(stage, tmp_path / "q", {}, recipe=recipe).calibration(1))["label"].item()
    [problem] = stage.check(context)[1]
    assert problem.where == "stage[1].calibration"
    assert problem.what == f"all 1 calibration images are of class 'digit {label}'"
    assert quantize(cpu).check(context)[1] == []
    elsewhere = {"calibration": 1, "backend": "onnxruntime"}
    assert [p.where for p in quantize(cpu, **elsewhere).check(context)[1]] == ["stage[1].calibration"]
    assert quantize(cpu, **elsewhere, mode="dynamic").check(context)[1] == []  # which draws no images
    # Images whose labels nobody knows say nothing about classes.
    unknown = Split(dataset.train.images, torch.full_like(dataset.train.labels, -1))
    assert stage.check(replace(context, data=replace(dataset, train=unknown)))[1] == []


def test_a_processor_whose_sums_saturate_is_told(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    old = {"machine": "x86_64", "instruction_sets": ["avx2"]}
    assert saturation(SCHEMES["x86-u8s7"], old) is None
    assert saturation(SCHEMES["arm-s8s8"], old) is None
    for newer in ("avx512_vnni", "avx_vnni"):
        assert saturation(SCHEMES["x86-u8s8"], {**old, "instruction_sets": ["avx2", newer]}) is None
    assert saturation(SCHEMES["x86-u8s8"], {"machine": "aarch64", "instruction_sets": []}) is None
    why = saturation(SCHEMES["x86-u8s8"], old)
    assert "no VNNI" in (why or "")
    monkeypatch.setattr("edgekd.stages.quantize.environment", lambda: old)
    monkeypatch.setattr("edgekd.stages.export.environment", lambda: old)
    stage = quantize(cpu, keep_float=False)
    events: list[dict[str, Any]] = []
    artifact = stage.run(workspace(stage, tmp_path / "q", {"source": source}, emit=events.append))
    [told] = [event for event in events if event["event"] == "saturation"]
    assert told["why"] == why
    assert 'profiles = ["cpu-x86-avx2"]' in (line(told) or "")
    different = {"argmax_agreement": 0.5, "max_abs_difference": 9.0, "max_abs_logit": 9.0, "images": 100, "ties": 0}
    monkeypatch.setattr("edgekd.stages.export.compare", lambda *files: different)
    with pytest.raises(StageError) as caught:
        write_onnx(artifact, tmp_path / "model.onnx", dataset, opset=18)
    assert 'profiles = ["cpu-x86-avx2"]' in (caught.value.problem.hint or "")


@pytest.mark.parametrize("corrections", [["bias"], ["equalise", "round"]])
def test_corrections_change_the_network_and_reload(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, dataset: Dataset, corrections: list[str]
) -> None:
    plain = quantize(cpu, keep_float=False)
    stage = quantize(cpu, keep_float=False, corrections=corrections, ranges="mse", float_layers=["layer[12]*"])
    saved: dict[str, Any] = {}
    one, other = (
        each.run(workspace(each, tmp_path / name, {"source": source}, saved=saved))
        for name, each in (("plain", plain), ("corrected", stage))
    )
    before, after = (predict(load_prepared(a), dataset.test, dataset, 100) for a in (one, other))
    assert (before != after).any()
    assert (after == predict(saved["corrected"], dataset.test, dataset, 100)).all()
    floats = predict(load_network(source), dataset.test, dataset, 100)
    assert (after.argmax(1) == floats.argmax(1)).mean() > 0.9


def test_what_is_stored_is_quantized_whatever_training_left(
    tmp_path: Path, workspace: Make, source: Artifact, cpu: Profile, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = type("Fit", (), {"metrics": {}})()
    left: list[Any] = []

    def train(self: Workspace, learner: Any, settings: Any, on_epoch: Any) -> list[Any]:
        on_epoch(0, learner)
        left.append(learner.student)
        assert not any(m.quantizes for m in learner.student.modules() if isinstance(m, ActivationFakeQuantize))
        return [fit]

    monkeypatch.setattr(Workspace, "train", train)
    stage = quantize(cpu, keep_float=False, warmup=0.5, heal={"epochs": 2})
    saved: dict[str, Any] = {}
    stage.run(workspace(stage, tmp_path / "q", {"source": source, "teacher": source}, saved=saved))
    assert saved["q"] is left[0]
    switched = [m for m in saved["q"].modules() if isinstance(m, ActivationFakeQuantize | WeightPerChannelFakeQuantize)]
    assert switched
    assert all(m.quantizes for m in switched)


def test_a_gradual_start_quantizes_weights_first(cpu: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        "edgekd.stages.quantize.quant.enable_fake_quant", lambda student, activations: told.append(("on", activations))
    )
    monkeypatch.setattr(
        "edgekd.stages.quantize.quant.freeze", lambda student, batch_norm: told.append(("frozen", batch_norm))
    )
    learner: Any = type("Learner", (), {"student": None})()

    def walked(**heal: Any) -> list[tuple[str, Any]]:
        told.clear()
        stage = quantize(cpu, heal={"epochs": 10, **heal}, warmup=0.2)
        for epoch in range(10):
            stage._on_epoch(epoch, learner)
        return list(told)

    found = walked()
    assert [on for what, on in found if what == "on"] == [False, False, *[True] * 8]
    # Ranges from epoch 5 of 0 to 9 on; batch norm's statistics when the learning rate is a tenth.
    assert [batch_norm for what, batch_norm in found if what == "frozen"] == [False] * 4 + [True]
    assert not any(batch_norm for what, batch_norm in walked(schedule="constant") if what == "frozen")
