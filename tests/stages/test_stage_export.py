"""Exported files are compared with the network they came from, and a difference fails the stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_stages import Chain
from torch import Tensor, nn

from edgekd.artifact import Artifact
from edgekd.data import Dataset
from edgekd.errors import ArtifactError, StageError
from edgekd.onnx_file import compare
from edgekd.profile import Profile
from edgekd.recipe import Component
from edgekd.runtimes import open_session
from edgekd.stages import Export, Workspace, export
from edgekd.stages.export import exportable
from edgekd.stages.teaching import Teaching, load_network

Make = Callable[..., Workspace]
Exported = Callable[[str], Artifact]


def run(make: Make, directory: Path, source: Artifact, cpu: Profile, **config: Any) -> Artifact:
    stage = Export.model_validate(config).resolved([cpu], Teaching([], Component(use="frozen")))
    return stage.run(make(stage, directory, {"source": source}))


def answers(artifact: Artifact, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = open_session(artifact.file("model.onnx"))
    found = [session.run({"image": images[i : i + 1]})["logits"] for i in range(len(images))]
    session.close()
    return np.concatenate(found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, chain: Chain, workspace: Make, cpu: Profile) -> Exported:
    """The artifact of that name, exported once."""
    root = tmp_path_factory.mktemp("exported")

    @cache
    def make(name: str) -> Artifact:
        return run(workspace, root / name, chain.artifacts[name], cpu)

    return make


def test_a_float_file_computes_what_the_network_computes(
    chain: Chain, exported: Exported, images: Tensor, dataset: Dataset
) -> None:
    made = exported("prune")
    metrics = made.manifest.metrics
    assert metrics["images"] == len(dataset.validation)
    assert metrics["argmax_agreement"] == 1.0
    assert 0 < metrics["max_abs_difference"] < 1e-4
    assert metrics["layers"] == {"int8": 0, "float": 8}
    assert metrics["accuracy"] == chain.artifacts["prune"].manifest.metrics["accuracy"]
    assert made.manifest.parents == {"source": "key of prune"}
    assert made.manifest.quantization is None
    assert made.manifest.inputs[0].axes == ["batch", 1, 16, 16]
    with torch.no_grad():
        expected = load_network(chain.artifacts["prune"]).eval()(images).numpy()
    np.testing.assert_allclose(answers(made, images.numpy()), expected, atol=1e-4)
    with pytest.raises(ArtifactError, match="a export artifact holds no float network"):
        load_network(made)


@pytest.mark.parametrize("name", ["ptq", "qat"])
def test_an_int8_file_computes_what_the_healed_network_computes(
    chain: Chain, exported: Exported, images: Tensor, name: str
) -> None:
    made = exported(name)
    metrics = made.manifest.metrics
    assert metrics["argmax_agreement"] >= 0.995
    assert metrics["layers"] == {"int8": 8, "float": 0}
    assert made.manifest.quantization == chain.artifacts[name].manifest.quantization
    prepared = chain.saved[name].eval()
    with torch.no_grad():
        expected = prepared(images)["logits"]
    found = answers(made, images.numpy())
    same = found.argmax(1) == expected.argmax(1).numpy()
    error = abs(found - expected.numpy()).max()
    assert error <= 0.03
    # Only images between two classes may be told apart otherwise, where rounding decides.
    best = expected.topk(2).values
    clear = (best[:, 0] - best[:, 1]).numpy() > 2 * error
    assert clear.sum() >= 30
    assert same[clear].all()
    assert same.mean() >= 0.95
    size = chain.artifacts["prune"].file("model.safetensors").stat().st_size
    assert made.file("model.onnx").stat().st_size < 2 * size


def test_bytes_a_fixed_batch_and_another_opset(
    tmp_path: Path, chain: Chain, workspace: Make, cpu: Profile, images: Tensor, dataset: Dataset
) -> None:
    config = {"input": "uint8", "dynamic_batch": False, "opset": 20}
    made = run(workspace, tmp_path / "export", chain.artifacts["prune"], cpu, **config)
    assert {o.domain: o.version for o in onnx.load(made.file("model.onnx")).opset_import}[""] == 20
    assert made.manifest.inputs[0].dtype == "uint8"
    assert made.manifest.inputs[0].axes == [1, 1, 16, 16]
    with torch.no_grad():
        expected = load_network(chain.artifacts["prune"]).eval()(images).numpy()
    np.testing.assert_allclose(answers(made, dataset.test.images.numpy()), expected, atol=1e-4)


def test_the_opset_is_the_lowest_of_the_profiles_unless_the_recipe_says_so(cpu: Profile) -> None:
    newer = cpu.model_copy(update={"opset": 20})
    nothing = Teaching([], Component(use="frozen"))
    assert Export().resolved([newer, cpu], nothing).opset == 18
    assert Export().resolved([newer], nothing).opset == 20
    assert Export(opset=19).resolved([newer, cpu], nothing).opset == 19


def changed(network: nn.Module, how: str) -> nn.Module:
    if how == "turned":
        network.register_forward_hook(lambda _, __, out: {"logits": -out["logits"]})
    else:
        with torch.no_grad():
            network.linear.bias[3] += {"shifted": 0.5, "nan": float("nan")}[how]  # type: ignore[index,union-attr,operator]
    return network


@pytest.mark.parametrize(("name", "how"), [("prune", "shifted"), ("prune", "nan"), ("ptq", "turned")])
def test_a_file_of_another_network_fails_the_stage(
    tmp_path: Path,
    chain: Chain,
    workspace: Make,
    cpu: Profile,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: str,
) -> None:
    file = exported(name).file("model.onnx")
    monkeypatch.setattr(export, "export_onnx", lambda module, path, **_: shutil.copy(file, path))
    monkeypatch.setattr(export, "exportable", lambda artifact: changed(exportable(artifact), how))
    with pytest.raises(StageError, match="does not compute what the network computes") as raised:
        run(workspace, tmp_path / "export", chain.artifacts[name], cpu)
    assert raised.value.exit_code == 3
    assert "on 100 images" in raised.value.problem.what
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.glob(".export*"))


def test_a_file_that_answers_nan_fails_the_stage(
    tmp_path: Path,
    chain: Chain,
    workspace: Make,
    cpu: Profile,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = onnx.load(exported("prune").file("model.onnx"))
    [bias] = [tensor for tensor in model.graph.initializer if tensor.name.endswith("linear.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    monkeypatch.setattr(export, "export_onnx", lambda module, path, **_: onnx.save(model, path))
    with pytest.raises(StageError, match="largest difference nan"):
        run(workspace, tmp_path / "export", chain.artifacts["prune"], cpu)


@pytest.mark.parametrize(("raised", "ties"), [(0.01, 8), (0.029, 8), (0.031, 0), (float("nan"), 0)])
def test_another_answer_is_a_tie_only_where_the_logits_are_near(exported: Exported, raised: float, ties: int) -> None:
    """Two classes are level; the file raises the second by a share of the largest logit, 2."""

    class Level(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([2.0, 2.0 - 1e-4, *[0.0] * 8]).repeat(len(images), 1)

    def answer(feed: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        logits = Level()(torch.from_numpy(feed["image"])).numpy()
        logits[:, 1] += 2 * raised
        return {"logits": logits}

    file = exported("prune").file("model.onnx")
    found = compare(file, Level(), torch.zeros(8, 3, 16, 16), answer)
    assert (found["argmax_agreement"], found["images"], found["ties"]) == (0.0, 8, ties)


@pytest.mark.parametrize(
    ("name", "found", "passes"),
    [
        ("prune", {"max_abs_difference": 0.9e-3, "max_abs_logit": 0.5, "argmax_agreement": 0.9}, True),
        ("prune", {"max_abs_difference": 1.1e-3, "max_abs_logit": 0.5, "argmax_agreement": 1.0}, False),
        ("prune", {"max_abs_difference": 0.019, "max_abs_logit": 20.0, "argmax_agreement": 1.0}, True),
        ("prune", {"max_abs_difference": 0.021, "max_abs_logit": 20.0, "argmax_agreement": 1.0}, False),
        ("ptq", {"max_abs_difference": 0.5, "max_abs_logit": 1.0, "argmax_agreement": 0.995}, True),
        ("ptq", {"max_abs_difference": 0.0, "max_abs_logit": 1.0, "argmax_agreement": 0.994}, False),
        ("ptq", {"max_abs_difference": 0.0, "max_abs_logit": 1.0, "argmax_agreement": 0.99, "images": 100}, True),
        ("ptq", {"max_abs_difference": 0.0, "max_abs_logit": 1.0, "argmax_agreement": 0.98, "images": 100}, False),
        ("ptq", {"max_abs_difference": 0.01, "max_abs_logit": 1.0, "argmax_agreement": 0.9, "ties": 95}, True),
        ("ptq", {"max_abs_difference": 0.5, "max_abs_logit": 1.0, "argmax_agreement": 0.9, "ties": 94}, False),
        ("ptq", {"max_abs_difference": float("nan"), "max_abs_logit": 1.0, "argmax_agreement": 1.0}, False),
    ],
)
def test_the_tolerances(
    tmp_path: Path,
    chain: Chain,
    workspace: Make,
    cpu: Profile,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    found: dict[str, float],
    passes: bool,
) -> None:
    class NoSession:
        run = close = staticmethod(lambda *_: None)

    monkeypatch.setattr(export, "exportable", lambda artifact: nn.Identity())
    monkeypatch.setattr(export, "export_onnx", lambda module, path, **_: path.write_bytes(b""))
    monkeypatch.setattr(export, "open_session", lambda path: NoSession())
    monkeypatch.setattr(export, "optimised_layers", lambda path: {"int8": 0, "float": 0})
    monkeypatch.setattr(export, "compare", lambda *_: {"images": 1000, "ties": 0, **found})
    if passes:
        metrics = run(workspace, tmp_path / "export", chain.artifacts[name], cpu).manifest.metrics
        assert {key: metrics[key] for key in found} == found
    else:
        with pytest.raises(StageError, match=f"{found['argmax_agreement']:.1%} equal"):
            run(workspace, tmp_path / "export", chain.artifacts[name], cpu)
