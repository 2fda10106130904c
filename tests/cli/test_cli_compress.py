"""Single steps: `edgekd distill`, `prune`, `quantize`, `export` from a run, a stage, an artifact or own weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd.artifact import Artifact
from edgekd.models import build, load_state

Call = Callable[..., Any]


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Path:
    return finished.copy(tmp_path / "run")


def made(done: Any) -> Artifact:
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    return Artifact.open(line)


def test_export_of_a_stage_equals_the_runs_own(run: Path, edgekd: Call) -> None:
    mine = made(edgekd("export", f"{run}:quantize"))
    (own,) = run.glob("04-export-*")
    assert mine.path == own  # the same stage of the same source: nothing was made anew
    again = made(edgekd("export", f"{run}:quantize", "--set", "input=uint8"))
    assert again.path.parent == run
    assert again.manifest.inputs[0].dtype == "uint8"
    assert again.manifest.parents == {"source": Artifact.open(next(run.glob("03-*"))).key}
    assert (run / "recipe.toml").read_text().count("uint8") == 0  # the run's recipe says what the run is


def test_quantize_of_an_artifact_into_a_directory_of_its_own(run: Path, tmp_path: Path, edgekd: Call) -> None:
    (pruned,) = run.glob("02-prune-*")
    done = edgekd(
        "quantize",
        str(pruned),
        "--set",
        "heal.epochs=0",
        "--set",
        "calibration=64",
        "--set",
        "keep_float=false",
        "-o",
        str(tmp_path / "q"),
        "--json",
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)  # one document, though there was progress to tell
    assert document["version"] == 1
    artifact = Artifact.open(document["path"])
    assert artifact.path.parent == tmp_path / "q"
    assert document["manifest"]["kind"] == artifact.manifest.kind == "quantize"
    assert artifact.manifest.quantization is not None
    assert artifact.manifest.parents["source"] == Artifact.open(pruned).key
    exported = made(edgekd("export", str(tmp_path / "q")))  # and on from there
    assert exported.manifest.parents == {"source": artifact.key}
    assert exported.manifest.quantization is not None


def test_prune_of_a_run_goes_on_from_its_last_float_network(run: Path, tmp_path: Path, edgekd: Call) -> None:
    overrides = ["--set", "target.macs=0.6", "--set", "channel_multiple=2", "--set", "heal.epochs=0"]
    artifact = made(edgekd("prune", str(run), *overrides, "-o", str(tmp_path / "p")))
    (source,) = (Artifact.open(p) for p in run.glob("02-prune-*"))
    assert artifact.manifest.parents["source"] == source.key
    assert artifact.manifest.metrics["macs"] < source.manifest.metrics["macs"]
    network = build(artifact.manifest.model)
    load_state(network, artifact.file("model.safetensors"))


def test_distill_from_a_teacher(run: Path, tmp_path: Path, edgekd: Call) -> None:
    student = ["--student", "cifar-resnet", "--set", "model.depth=8", "--set", "model.width=4", "--set", "epochs=1"]
    artifact = made(edgekd("distill", "--teacher", f"{run}:distill", *student, "-o", str(tmp_path / "d")))
    assert artifact.manifest.model.args["width"] == 4
    assert artifact.manifest.parents == {"teacher": Artifact.open(next(run.glob("01-distill-*"))).key}


def test_a_network_and_weights_of_ones_own(tmp_path: Path, edgekd: Call) -> None:
    (tmp_path / "cli_compress_own.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(128, 10))\n"
    )
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()),
        torch.nn.Linear(128, 10),
    )
    torch.save(network.state_dict(), tmp_path / "w.pt")
    own = ["--model", "cli_compress_own:network", "--weights", "w.pt", "--data", "digits", "--set", "data.size=16"]
    artifact = made(edgekd("export", *own, cwd=tmp_path))
    assert artifact.path.parent == Path("runs/cli-compress-own-network-export")
    teacher = Artifact.open(next(artifact.path.parent.glob("00-teacher-*")))
    assert artifact.manifest.parents == {"source": teacher.key}
    stored = build(teacher.manifest.model)
    load_state(stored, teacher.file("model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["prune"], "give a SOURCE, or --model with --weights", "edgekd prune --help"),
        (["prune", "a", "--model", "b"], "give a SOURCE, or --model with --weights", "edgekd prune --help"),
        (["export", "--model", "vit"], "--model needs --weights", "untrained"),
        (["export", "--model", "vit", "--weights", "w.pt"], "--model needs --data", "--data digits"),
        (["export", "none"], "no run, RUN:stage or artifact at none", "edgekd run"),
        (["export", "runs/tiny:prun"], "'prun'", "prune"),
        (["prune", "runs/tiny:distill"], "stage[0].target", None),
        (["prune", "runs/tiny:distill", "--set", "traget.macs=0.5"], "stage[0].traget", "did you mean 'target'?"),
        (["prune", "runs/tiny:quantize", "--set", "target.macs=0.5"], "quantize", "teacher, distill, prune"),
        (["export", "runs/tiny:quantize", "--target", "trt"], "stage[0].targets: files for TensorRT need", "trt-s8s8"),
        (["distill", "--student", "vit"], "give a recipe, or --teacher and --student", "distill --help"),
        (["distill", "--teacher", "runs/tiny", "--student", "vitt"], "no models called 'vitt'", "did you mean 'vit'?"),
    ],
)
def test_sources_and_keys_that_are_wrong(
    finished: Any, edgekd: Call, arguments: list[str], what: str, hint: str | None
) -> None:
    before = sorted(finished.directory.iterdir())
    done = edgekd(*arguments)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert hint is None or hint in done.err
    assert sorted(finished.directory.iterdir()) == before


def test_other_data_are_normalised_as_the_network_was_trained(run: Path, tmp_path: Path, edgekd: Call) -> None:
    (source,) = (Artifact.open(p) for p in run.glob("01-distill-*"))
    (tmp_path / "cli_compress_data.py").write_text(
        "import numpy as np\n"
        "def data():\n"
        "    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)\n"
        "    labels = np.arange(40) % 10\n"
        "    return {'train': (images[:30], labels[:30]), 'test': (images[30:], labels[30:]),\n"
        "            'classes': [str(i) for i in range(10)]}\n"
    )
    other = ["--data", "cli_compress_data:data", "--set", 'profiles=["cpu-x86"]']
    artifact = made(edgekd("export", str(source.path), *other, cwd=tmp_path))
    assert artifact.manifest.preprocessing == source.manifest.preprocessing


def test_data_that_do_not_fit_the_artifact(finished: Any, edgekd: Call) -> None:
    done = edgekd("export", "runs/tiny:quantize", "--set", "data.size=32")
    assert done.code == 2
    assert "made for images of 3x16x16, the data have 3x32x32" in done.err
