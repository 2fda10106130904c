"""What stages store: networks that come back bit for bit, and manifests that say what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import HINT, RESNET, TAUGHT, Chain, made_recipe
from torch import Tensor, nn

from edgekd.artifact import Artifact
from edgekd.data import Dataset
from edgekd.errors import ArtifactError, UsageError
from edgekd.models import build, count, save_state
from edgekd.profile import Profile
from edgekd.quant.fake_quantize import ActivationFakeQuantize
from edgekd.recipe import Component
from edgekd.stages import Distill, Prune, Teacher, Workspace
from edgekd.stages.teaching import Teaching, load_network
from edgekd.stages.workspace import load_prepared
from edgekd.teachers import Cached
from edgekd.train import predict

Make = Callable[..., Workspace]


def logits(network: nn.Module, images: Tensor) -> Tensor:
    # One memory format for both: convolutions of another one add up in another order.
    network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    with torch.no_grad():
        found = network(images)
    return found["logits"] if isinstance(found, dict) else found


@pytest.mark.parametrize("name", ["teacher", "distill", "prune"])
def test_float_networks_come_back_bit_for_bit(chain: Chain, images: Tensor, name: str) -> None:
    loaded = load_network(Artifact.open(chain.artifacts[name].path))
    state = chain.saved[name].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(logits(loaded, images), logits(chain.saved[name], images))
    assert logits(loaded, images).std() > 0.1


@pytest.mark.parametrize("name", ["ptq", "qat"])
def test_quantized_networks_come_back_bit_for_bit(chain: Chain, images: Tensor, name: str) -> None:
    loaded = load_prepared(Artifact.open(chain.artifacts[name].path))
    saved = chain.saved[name]
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(logits(loaded, images), logits(saved, images))
    loaded.train()
    with torch.no_grad():
        before = loaded.state_dict()["frozen"].clone()
        loaded(images * 5)
    ranges = [m for m in loaded.modules() if isinstance(m, ActivationFakeQuantize)]
    assert ranges
    assert before == 1
    expected = saved.state_dict()  # frozen: images of five times the contrast moved no range
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_quantizing_keeps_the_answers_of_the_pruned_network(chain: Chain, images: Tensor) -> None:
    pruned = logits(load_network(chain.artifacts["prune"]), images)
    ptq = logits(load_prepared(chain.artifacts["ptq"]), images)
    assert not torch.equal(pruned, ptq)
    assert (pruned.argmax(1) == ptq.argmax(1)).float().mean() >= 0.9
    assert (pruned - ptq).abs().max() < 0.2 * pruned.abs().max()


def test_manifests_say_what_the_artifacts_are(chain: Chain, dataset: Dataset) -> None:
    for name, artifact in chain.artifacts.items():
        manifest = artifact.manifest
        assert manifest.kind == {"ptq": "quantize", "qat": "quantize"}.get(name, name)
        assert manifest.key == f"key of {name}"
        assert manifest.classes == dataset.classes
        assert (manifest.preprocessing.size, manifest.preprocessing.colour) == ([1, 16, 16], "grey")
        assert (manifest.preprocessing.mean, manifest.preprocessing.std) == ([0.3], [0.35])
        assert manifest.inputs[0].axes == ["batch", 1, 16, 16]
        assert manifest.outputs[0].axes == ["batch", 10]
        parameters, macs = count(build(manifest.model), [1, 16, 16])
        assert (manifest.metrics["parameters"], manifest.metrics["macs"]) == (parameters, macs)
        assert set(manifest.files) >= {"model.safetensors"}
        assert not (artifact.path.parent / ".partial" / name).exists()
    parents = {name: a.manifest.parents for name, a in chain.artifacts.items()}
    assert parents["teacher"] == {}
    assert parents["distill"] == {"teacher": "key of teacher"}
    assert parents["qat"] == {"source": "key of prune", "teacher": "key of teacher"}
    assert chain.artifacts["distill"].manifest.config["objectives"] == TAUGHT
    assert chain.artifacts["prune"].manifest.config["heal"]["objectives"] == TAUGHT


def test_metrics_are_those_of_the_stored_weights_on_validation_images(chain: Chain, dataset: Dataset) -> None:
    labels = dataset.validation.labels.numpy()
    for name in ("teacher", "distill", "prune", "qat"):
        artifact = chain.artifacts[name]
        load = load_prepared if name == "qat" else load_network
        answers = predict(load(artifact), dataset.validation, dataset, 100).argmax(1)
        # Validation ran in mixed precision where the machine has it: two images of a hundred may flip.
        assert artifact.manifest.metrics["accuracy"] == pytest.approx((answers == labels).mean(), abs=0.021)
        history = [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]
        assert max(row["val.accuracy"] for row in history) == artifact.manifest.metrics["accuracy"]
        assert len(history) == {"teacher": 4, "distill": 3, "prune": 2, "qat": 2}[name]
    assert chain.artifacts["teacher"].manifest.metrics["accuracy"] > 0.5


def test_a_pruned_artifact_is_smaller_and_says_which_channels_went(chain: Chain) -> None:
    before, after = chain.artifacts["distill"].manifest, chain.artifacts["prune"].manifest
    share = after.metrics["macs"] / before.metrics["macs"]
    assert share <= 0.7
    assert after.metrics["macs_share"] == pytest.approx(share)
    plan = json.loads(chain.artifacts["prune"].file("plan.json").read_text())
    removed = {g["name"]: len(g["removed"]) for g in plan["groups"] if g["removed"]}
    assert removed
    assert all(n % 2 == 0 for n in removed.values())
    assert after.model.attributes
    assert after.model.args == before.model.args


def test_a_quantized_artifact_knows_its_scheme_taps_and_shapes(chain: Chain) -> None:
    for name, taps in (("ptq", []), ("qat", ["layer2"])):
        found = chain.artifacts[name].manifest.quantization
        assert found is not None
        assert (found["scheme"], found["qat"], found["taps"]) == ("x86-u8s8", name == "qat", taps)
        pruned = load_network(chain.artifacts["prune"]).state_dict()
        assert found["shapes"] == {key: list(value.shape) for key, value in pruned.items()}


def test_artifacts_of_the_wrong_kind_are_refused(chain: Chain) -> None:
    with pytest.raises(ArtifactError, match="a quantize artifact holds no float network"):
        load_network(chain.artifacts["qat"])
    with pytest.raises(ArtifactError, match="not a quantized artifact"):
        load_prepared(chain.artifacts["prune"])


def test_a_teacher_from_weights_is_measured_but_not_trained(
    tmp_path: Path, chain: Chain, workspace: Make, images: Tensor
) -> None:
    source = load_network(chain.artifacts["teacher"])
    save_state(source, tmp_path / "own.safetensors")
    stage = Teacher.model_validate({"model": RESNET, "weights": str(tmp_path / "own.safetensors")})
    artifact = stage.run(workspace(stage, tmp_path / "teacher", {}))
    assert torch.equal(logits(load_network(artifact), images), logits(source, images))
    assert "metrics.jsonl" not in artifact.manifest.files
    trained = chain.artifacts["teacher"].manifest.metrics["accuracy"]
    assert artifact.manifest.metrics["accuracy"] == pytest.approx(trained, abs=0.021)
    assert set(stage.inputs()) == {"weights"}


def test_distilling_without_a_model_goes_on_with_the_source(tmp_path: Path, chain: Chain, workspace: Make) -> None:
    stage = Distill.model_validate({"epochs": 1, "lr": 1e-9, "weight_decay": 0.0, "precision": "fp32"})
    parents = {"source": chain.artifacts["prune"], "teacher": chain.artifacts["teacher"]}
    artifact = stage.run(workspace(stage, tmp_path / "distill", parents))
    assert artifact.manifest.model == chain.artifacts["prune"].manifest.model
    before, after = load_network(parents["source"]), load_network(artifact)
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=name)


class Interrupted(Exception):
    pass


def test_a_pruning_that_was_cut_while_healing_ends_with_the_same_bits(
    tmp_path: Path, chain: Chain, workspace: Make, monkeypatch: pytest.MonkeyPatch, cpu: Profile
) -> None:
    heal = {"epochs": 2, "checkpoint_s": 0.0}
    draft = Prune.model_validate({"target": {"macs": 0.7}, "channel_multiple": 2, "importance": "taylor", "heal": heal})
    stage = draft.resolved([cpu], Teaching(TAUGHT, Component(use="frozen")))
    parents = {"source": chain.artifacts["distill"], "teacher": chain.artifacts["teacher"]}
    whole = stage.run(workspace(stage, tmp_path / "whole", parents))

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            raise Interrupted

    with pytest.raises(Interrupted):
        stage.run(workspace(stage, tmp_path / "cut", parents, emit=emit))
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / ".partial" / "cut" / "checkpoint.pt").exists()
    torch.rand(7)  # another random state than the first process had
    events: list[dict[str, Any]] = []
    cut = stage.run(workspace(stage, tmp_path / "cut", parents, emit=events.append))
    assert {"event": "resume", "stage": "cut", "epoch": 1, "step": 0} in events
    assert cut.manifest.files["model.safetensors"] == whole.manifest.files["model.safetensors"]
    assert cut.manifest.files["plan.json"] == whole.manifest.files["plan.json"]
    assert cut.manifest.model == whole.manifest.model


def test_a_cached_teacher_is_asked_once_for_all_stages_of_a_run(
    tmp_path: Path, chain: Chain, workspace: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    compute = Cached._compute

    def counted(self: Cached, file: Path, *args: Any) -> None:
        asked.append(file)
        compute(self, file, *args)

    monkeypatch.setattr(Cached, "_compute", counted)
    recipe = made_recipe(augment="crop-flip")
    parents = {"teacher": chain.artifacts["teacher"]}
    events: list[dict[str, Any]] = []
    for name, epochs in (("one", 2), ("two", 1)):
        config = {"model": RESNET, "epochs": epochs, "source": {"use": "cached", "views": 2}}
        stage = Distill.model_validate(config)
        artifact = stage.run(workspace(stage, tmp_path / name, parents, recipe=recipe, emit=events.append))
        assert artifact.manifest.config["source"] == {"use": "cached", "views": 2}
    assert [file.name for file in asked] == ["view-000.npy", "view-001.npy"]
    assert len({file.parent for file in asked}) == 1
    assert asked[0].parent.parent == tmp_path / ".cache"
    told = [event for event in events if event["event"] == "cache"]
    assert (told[-1]["done"], told[-1]["total"]) == (500, 500)
    other = made_recipe()  # another augmentation: other views, so another cache
    stage = Distill.model_validate({"model": RESNET, "epochs": 1, "source": {"use": "cached", "views": 1}})
    stage.run(workspace(stage, tmp_path / "three", parents, recipe=other))
    assert len(asked) == 3
    assert asked[2].parent != asked[0].parent


def test_a_cached_teacher_has_no_features_for_a_hint(tmp_path: Path, chain: Chain, workspace: Make) -> None:
    stage = Distill.model_validate({"model": RESNET, "epochs": 1, "objectives": [HINT], "source": "cached"})
    with pytest.raises(UsageError, match="logits only"):
        stage.run(workspace(stage, tmp_path / "x", {"teacher": chain.artifacts["teacher"]}))


def test_calibration_images_are_a_fixed_draw_without_augmentation(
    chain: Chain, workspace: Make, tmp_path: Path
) -> None:
    stage = Distill.model_validate({"model": RESNET})
    made = workspace(stage, tmp_path / "x", {}, recipe=made_recipe(augment="crop-flip"))
    one, two = (torch.cat([b["image"] for b in made.calibration(128)]) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (128, 1, 16, 16)
    index = torch.cat([b["index"] for b in made.calibration(128)])
    assert len(set(index.tolist())) == 128
    torch.testing.assert_close(one, (made.data.train.images[index].float() / 255 - 0.3) / 0.35)
    assert made.example.shape == (2, 1, 16, 16)
