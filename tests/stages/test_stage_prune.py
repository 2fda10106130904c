"""The stage `prune`: latency measured for real, rounds, what a killed run finds again, and what is refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import TAUGHT, Chain, made_recipe
from torch import Tensor

from edgekd.artifact import Artifact
from edgekd.data import Dataset
from edgekd.errors import StageError
from edgekd.models import build
from edgekd.onnx_file import optimised_layers
from edgekd.profile import Profile
from edgekd.pruning import PruningPlan
from edgekd.recipe import Component
from edgekd.stages import Export, Prune, Quantize, Workspace, prune, timing
from edgekd.stages.distill import DEFAULT_OBJECTIVES
from edgekd.stages.teaching import Context, Teaching, load_network
from edgekd.stages.workspace import load_prepared

Make = Callable[..., Workspace]
TEACHING = Teaching(DEFAULT_OBJECTIVES, Component(use="frozen"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    # One for all tests of this file: a table is measured once.
    directory = tmp_path_factory.getbasetemp() / "latency-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


def staged(cpu: Profile, teaching: Teaching = TEACHING, **config: Any) -> Prune:
    return Prune.model_validate({"channel_multiple": 2, **config}).resolved([cpu], teaching)


def plan_of(artifact: Artifact) -> PruningPlan:
    return PruningPlan.model_validate_json(artifact.file("plan.json").read_text())


def test_a_network_is_pruned_to_a_latency_that_is_measured_here(
    chain: Chain, workspace: Make, cpu: Profile, images: Tensor, tmp_path: Path, cache: Path
) -> None:
    stage = staged(cpu, target={"latency": {"speedup": 1.25}}, heal={"epochs": 0})
    source = chain.artifacts["distill"]
    events: list[dict[str, Any]] = []
    made = workspace(stage, tmp_path / "prune", {"source": source}, emit=events.append)
    pruned = stage.run(made)
    plan = plan_of(pruned)
    shown = {event["profile"].split(": ")[1]: (event["done"], event["total"]) for event in events}
    assert {"layers timed", "networks timed"} < set(shown)
    assert any(what.startswith("harm, part 1 of ") for what in shown)
    assert all(done == total > 0 for done, total in shown.values()), "each ends"
    assert plan.latency is not None
    assert (plan.latency.profile, plan.latency.precision) == ("cpu-x86", "fp32")
    assert plan.latency.speedup.value >= 1.25
    assert 2 <= len(plan.latency.measurements) <= 25
    assert plan.latency.rounds >= 5
    assert plan.latency.runtime.startswith("onnxruntime 1.")
    assert (plan.latency.threads, bool(plan.latency.device)) == (cpu.threads, True)
    assert plan.macs_after < plan.macs_before
    loaded, network = load_network(pruned), made.saved["prune"].eval()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network(images))
    assert list((cache / "edgekd" / "latency").glob("onnxruntime-fp32-*.json"))


def test_the_int8_file_is_what_is_measured_for_a_shape_that_will_be_int8(
    chain: Chain, cpu: Profile, dataset: Dataset, images: Tensor, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, int]] = []
    real = timing.side_by_side

    def looking(files: dict[str, Path], *args: Any, **options: Any) -> Any:
        seen.extend(optimised_layers(file) for file in files.values())
        return real(files, *args, **options)

    monkeypatch.setattr(timing, "side_by_side", looking)
    network = load_network(chain.artifacts["distill"]).eval()
    with timing.timing(cpu, "int8", dataset, images, 2) as clock:
        layers = clock.layers(network, images[:1], [])
    assert seen == [{"int8": 8, "float": 0}]
    assert {layer.tensor for layer in layers} >= {"conv1.weight", "layer3.0.conv2.weight", "linear.weight"}
    assert sum(layer.cost({}) for layer in layers) > 0
    assert list((cache / "edgekd" / "latency").glob("onnxruntime-int8-*.json"))


def test_without_a_block_it_is_quantized_exported_and_pruned_again(
    chain: Chain, workspace: Make, cpu: Profile, images: Tensor, dataset: Dataset, tmp_path: Path
) -> None:
    first = staged(cpu, target={"macs": 0.75}, protected=["*.bn1"], heal={"epochs": 1})
    teachers = {"teacher": chain.artifacts["teacher"]}
    one = first.run(workspace(first, tmp_path / "one", {"source": chain.artifacts["distill"], **teachers}))
    assert one.manifest.model.removed == []  # what is protected within a block protects the block
    second = staged(cpu, target={"macs": 0.75}, protected=["layer2", "layer3"], heal={"epochs": 1})
    two = second.run(workspace(second, tmp_path / "two", {"source": one, **teachers}))
    assert two.manifest.model.removed == ["layer1.0"]
    assert isinstance(build(two.manifest.model).get_submodule("layer1.0"), torch.nn.Identity)
    assert not any(path.startswith("layer1.0") for path in two.manifest.model.attributes)
    third = staged(cpu, target={"parameters": 0.8}, heal={"epochs": 0})
    three = third.run(workspace(third, tmp_path / "three", {"source": two}))
    assert three.manifest.model.removed == ["layer1.0"]
    assert three.manifest.metrics["parameters"] <= 0.8 * two.manifest.metrics["parameters"]
    heal = {"epochs": 0}
    quantize = Quantize.model_validate({"calibration": 100, "heal": heal}).resolved([cpu], TEACHING)
    four = quantize.run(workspace(quantize, tmp_path / "four", {"source": three}))
    export = Export.model_validate({}).resolved([cpu], TEACHING)
    five = export.run(workspace(export, tmp_path / "five", {"source": four}))
    assert five.manifest.metrics["argmax_agreement"] >= 0.98
    with torch.no_grad():
        answers = [load_network(three).eval()(images), load_prepared(four).eval()(images)["logits"]]
    assert (answers[0].argmax(1) == answers[1].argmax(1)).float().mean() >= 0.8


class Killed(Exception):
    pass


def test_a_killed_healing_goes_on_with_what_was_chosen_by_measuring(
    chain: Chain, workspace: Make, cpu: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teaching = Teaching(TAUGHT, Component(use="frozen"))
    heal = {"epochs": 2, "lr": 0.05, "checkpoint_s": 0.0}
    stage = staged(cpu, teaching, target={"macs": 0.6}, rounds=2, heal=heal)
    parents = {"source": chain.artifacts["distill"], "teacher": chain.artifacts["teacher"]}
    whole = stage.run(workspace(stage, tmp_path / "whole", parents))
    decided: list[float] = []
    real = prune.prune

    def counted(*args: Any, **options: Any) -> Any:
        decided.append(options["part"])
        return real(*args, **options)

    monkeypatch.setattr(prune, "prune", counted)

    def dies_after(steps: int) -> Callable[[dict[str, Any]], None]:
        seen = 0

        def emit(event: dict[str, Any]) -> None:
            nonlocal seen
            seen += event["event"] == "epoch"
            if seen == steps:
                raise Killed

        return emit

    for epoch in (1, 1):  # at the end of each round's only epoch
        with pytest.raises(Killed):
            stage.run(workspace(stage, tmp_path / "killed", parents, emit=dies_after(epoch)))
    resumed = stage.run(workspace(stage, tmp_path / "killed", parents))
    assert decided == [0.5, 1.0]  # each round once
    assert plan_of(resumed) == plan_of(whole)
    a, b = (load_network(artifact).state_dict() for artifact in (whole, resumed))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    history = [json.loads(line) for line in resumed.file("metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [0, 1]
    assert not (tmp_path / ".partial" / "killed").exists()
    # A plan of another key is not taken.
    partial = tmp_path / ".partial" / "other"
    partial.mkdir(parents=True)
    (partial / "plan-1.json").write_text(json.dumps({"key": "old", "plan": plan_of(whole).model_dump(mode="json")}))
    once = staged(cpu, target={"macs": 0.6}, heal={"epochs": 0})
    once.run(workspace(once, tmp_path / "other", {"source": chain.artifacts["distill"]}))
    assert decided == [0.5, 1.0, 1.0]


def checked(cpu: Profile, dataset: Dataset, **config: Any) -> list[str]:
    stage = staged(cpu, **config)
    context = Context(made_recipe(), dataset, [cpu], [], None, "stage[1]", {})
    return [str(problem) for problem in stage.check(context)[1]]


def test_what_cannot_be_measured_here_is_told_before_anything_runs(
    cpu: Profile, dataset: Dataset, tmp_path: Path
) -> None:
    def latency(**more: Any) -> list[str]:
        return checked(cpu, dataset, target={"latency": {"speedup": 2.0, **more}})

    assert latency() == latency(precision="int8") == []
    (unknown,) = latency(profile="cpu-x68")
    assert unknown.startswith("stage[1].target.latency.profile: no profile 'cpu-x68'")
    assert "did you mean 'cpu-x86'" in unknown

    def profile(name: str, text: str) -> str:
        (tmp_path / f"{name}.toml").write_text(f'extends = "cpu-x86"\ndescription = "mine"\n{text}\n')
        return str(tmp_path / f"{name}.toml")

    assert latency(profile=profile("mine", "threads = 2")) == []
    (runtime,) = latency(profile=profile("odd", 'runtime = "onnxruntim"'))
    assert runtime.startswith("stage[1].target.latency.profile: ")
    assert "onnxruntim" in runtime
    (floats,) = latency(profile=profile("floats", 'precisions = ["fp32"]'), precision="int8")
    assert floats.startswith("stage[1].target.latency.precision: floats has fp32")
    (core,) = latency(profile=profile("cores", "affinity = [4096]"))
    assert "no core 4096 here" in core


def test_rounds_need_an_epoch_each(cpu: Profile, dataset: Dataset) -> None:
    (problem,) = checked(cpu, dataset, target={"macs": 0.5}, rounds=4, heal={"epochs": 3})
    assert problem.startswith("stage[1].rounds: 4 rounds share 3 epochs of healing")
    assert checked(cpu, dataset, target={"macs": 0.5}, rounds=4, heal={"epochs": 0}) == []


def test_the_profile_that_latency_is_measured_on_is_a_part_of_the_key(cpu: Profile, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    target = {"latency": {"speedup": 2.0, "profile": str(file)}}
    keys = []
    for threads in (1, 2):
        file.write_text(f'extends = "cpu-x86"\ndescription = "mine"\nthreads = {threads}\nchannel_multiple = 8\n')
        stage = Prune.model_validate({"target": target}).resolved([cpu], TEACHING)
        assert stage.channel_multiple == 8
        keys.append(stage.inputs())
    assert keys[0] != keys[1]
    assert staged(cpu, target={"macs": 0.5}).inputs() == {}
    assert set(staged(cpu, target={"latency": {"speedup": 2.0}}).inputs()) == {"profile"}


def test_a_plan_of_another_network_is_refused(chain: Chain, dataset: Dataset) -> None:
    plan = plan_of(chain.artifacts["prune"])
    other = build(
        chain.artifacts["teacher"].manifest.model.model_copy(update={"use": "vit", "args": {"in_channels": 1}})
    )
    with pytest.raises(StageError, match=r"the plan prunes '.*', which the network does not have"):
        prune.carry_out(other, plan, torch.zeros(1, 1, 32, 32))
