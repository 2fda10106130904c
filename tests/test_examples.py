"""What the examples show works, run as their READMEs say."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.spatial.distance import jensenshannon

import edgekd
from edgekd.artifact import Artifact
from edgekd.errors import UsageError
from edgekd.inspect import describe, listing
from edgekd.pipeline import plan, run_steps
from edgekd.recipe import parse_recipe
from edgekd.registry import bind, load_plugin, unregister
from edgekd.runs import RunResult
from edgekd.single import run_single

ROOT = Path(__file__).parent.parent
OWN = ROOT / "examples" / "bring_your_own"
QUICK = "[protocol]\nrounds = 3\nprecision = 10.0\nblock_s = 0.01\nwarmup_s = 0.01\nbatches = [1]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A copy of the example as the working directory, with weights made by the lines in its README."""
    directory = tmp_path_factory.mktemp("own")
    for file in ("own.py", "recipe.toml"):
        shutil.copy(OWN / file, directory)
    (directory / "quick.toml").write_text('extends = "cpu-x86"\n' + QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "path", [str(directory), *sys.path])
        patch.delitem(sys.modules, "own", raising=False)
        torch.manual_seed(0)
        exec(readme_lines().replace("range(10)", "range(3)"), {})
        yield directory
        sys.modules.pop("own", None)


def readme_lines() -> str:
    found = re.search(r"```python\n(.*?)```", (OWN / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def done(place: Path) -> RunResult:
    overrides = ["stage.prune.heal.epochs=1", "stage.quantize.heal.epochs=1", "stage.quantize.keep_float=false"]
    overrides += ['profiles=["quick.toml"]']
    result = edgekd.run("recipe.toml", overrides=overrides)
    assert result is not None
    return result


def own() -> ModuleType:
    return sys.modules["own"]


def exported(done: RunResult) -> Artifact:
    """The run's own export: single steps put theirs beside it."""
    key = next(entry.key for entry in done.results.lineage if entry.stage == "export")
    [directory] = done.directory.glob(f"*-export-{key[:12]}")
    return Artifact.open(directory)


def test_own_network_is_two_functions_and_a_recipe_under_40_lines() -> None:
    lines = [(OWN / name).read_text().splitlines() for name in ("own.py", "recipe.toml")]
    assert sum(map(len, lines)) < 40
    assert "edgekd" not in (OWN / "own.py").read_text()


def test_own_network_is_compressed(done: RunResult) -> None:
    [profile] = done.results.profiles
    teacher, pruned, final = profile.variants
    assert [v.name for v in profile.variants] == ["teacher", "prune", "quantize"]
    assert 0.3 < pruned.macs / teacher.macs <= 0.5
    assert final.precision == "int8"
    assert final.size_mb < 0.4 * teacher.size_mb
    assert done.results.classes[:3] == ["zero", "one", "two"]


def test_own_weights_are_the_teacher(done: RunResult) -> None:
    test = own().data()["test"]
    images, labels = test.tensors
    network = own().network()
    network.load_state_dict(torch.load("net.pt", weights_only=True))
    network.eval()
    with torch.no_grad():
        answers = network((images / 255 - 0.5) / 0.5).argmax(1)
    expected = (answers == labels).double().mean().item()
    assert expected > 0.7
    assert done.results.profiles[0].variants[0].metrics["accuracy"] == pytest.approx(expected, abs=0.003)


def test_preprocessing_and_classes_travel(done: RunResult) -> None:
    artifact = exported(done)
    manifest = artifact.manifest
    classes = own().data()["classes"]
    assert manifest.classes == classes
    assert manifest.inputs[0].dtype == "uint8"
    assert manifest.inputs[0].axes == ["batch", 1, 8, 8]
    assert (manifest.preprocessing.mean, manifest.preprocessing.std) == ([0.5], [0.5])
    assert manifest.preprocessing.size == [1, 8, 8]
    assert manifest.preprocessing.colour == "grey"
    props = {p.key: p.value for p in onnx.load(artifact.file("model.onnx")).metadata_props}
    assert json.loads(props["classes"]) == classes
    assert json.loads(props["preprocessing"]) == manifest.preprocessing.model_dump()
    assert props["input"] == "uint8"


def test_bytes_in_give_the_logits_of_normalised_floats(done: RunResult) -> None:
    (floats,) = run_single("export", f"{done.directory}:quantize", None, None, None, [], None, lambda event: None)
    assert floats.manifest.inputs[0].dtype == "float32"
    images = own().data()["test"].tensors[0].numpy()
    normalised = (images.astype(np.float32) / 255 - 0.5) / 0.5
    expected = logits(floats.file("model.onnx"), normalised)
    found = logits(exported(done).file("model.onnx"), images)
    assert found.shape == (397, 10)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def logits(file: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(file)).run(["logits"], {"image": images})[0]


@pytest.fixture
def plugin(tmp_path: Path):
    """The objective that CONTRIBUTING.md shows, as a file."""
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    file = tmp_path / "my_losses.py"
    file.write_text(source)
    yield file
    unregister("objectives", "js")


def test_the_objective_in_contributing_works(plugin: Path) -> None:
    assert len(plugin.read_text().split("from edgekd")[1].strip().splitlines()) <= 20
    load_plugin(plugin)
    torch.manual_seed(0)
    student, teacher, images = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4), torch.randn(5, 3)
    objectives = ["ce", {"use": "js", "tau": 2.0, "weight": 3.0}]
    learner = edgekd.Learner.of(student, objectives=objectives, teacher=teacher, example=images)
    found = learner({"image": images, "label": torch.zeros(5, dtype=torch.int64)})
    p, q = (np.exp(net(images).detach().numpy() / 2) for net in (student, teacher))
    expected = (jensenshannon(p, q, axis=1) ** 2).mean()  # it normalises rows, and gives the root
    assert found["js"].item() == pytest.approx(expected, rel=1e-5)
    assert found["loss"].item() == pytest.approx(found["ce"].item() + 3 * found["js"].item(), rel=1e-6)


def test_the_objective_in_contributing_is_checked_and_described(plugin: Path) -> None:
    load_plugin(plugin)
    _, _, [problem] = bind("objectives", "js", {"tau": -1}, "stage[0].objectives[1]")
    assert str(problem) == "stage[0].objectives[1].tau: input should be greater than 0, got -1"
    with pytest.raises(UsageError, match="did you mean 'js'"):
        bind("objectives", "jss", {}, "objectives[0]")
    shown = describe("js")
    assert shown["parameters"] == ["tau (float > 0, default 1.0)"]
    assert shown["source"].startswith("Lin 1991")
    assert shown["snippet"] == 'objectives = ["ce", { use = "js" }]'
    line = "Jensen-Shannon divergence of tempered class probabilities: symmetric, and at most log 2."
    assert ("js", line) in listing("objectives")


def test_the_objective_in_contributing_trains_from_a_recipe(plugin: Path, tmp_path: Path) -> None:
    network = {"use": "cifar-resnet", "depth": 8, "width": 8}
    objectives = ["ce", {"use": "js", "tau": 2.0, "weight": {"use": "linear", "start": 1.0, "end": 0.5}}]
    recipe = {
        "version": 1,
        "name": "js",
        "plugins": [str(plugin)],
        "data": {"use": "digits", "size": 16},
        "teacher": {"model": network, "epochs": 2},
        "stage": [{"use": "distill", "model": network, "epochs": 2, "objectives": objectives}],
    }
    run_steps(plan(parse_recipe(recipe), tmp_path / "run"), lambda event: None)
    [file] = (tmp_path / "run").glob("01-distill-*/metrics.jsonl")
    first, last = (json.loads(line)["loss.js"] for line in file.read_text().splitlines())
    assert 0 < last < first < math.log(2)
