"""Every shipped recipe, and the one that `edgekd init` writes, runs to its end on a few digits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

import edgekd
from edgekd.artifact import Artifact
from edgekd.data.digits import digits
from edgekd.data.source import Source, Split
from edgekd.recipe import Recipe, load_recipe
from edgekd.registry import register, unregister
from edgekd.scaffold import scaffold
from edgekd.shipped import shipped

RECIPES = sorted(shipped("recipes").glob("*.toml"))
OF_TRAINING = ("teacher", "distill")
QUICK = "[protocol]\nrounds = 3\nprecision = 10.0\nblock_s = 0.01\nwarmup_s = 0.01\nbatches = [1]\n"


def few_digits() -> Source:
    """Every sixth digit."""
    every = digits()

    def some(split: Split) -> Split:
        return split.take(torch.arange(0, len(split), 6))

    return Source(some(every.train), some(every.test), every.classes)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    register("data", "few-digits")(few_digits)
    yield
    unregister("data", "few-digits")


def quick(recipe: Recipe) -> dict[str, Any]:
    """The same recipe with its teacher trained, one epoch of everything, few digits and short measurements."""
    table = recipe.model_dump(mode="json", exclude_none=True)
    kept = {key: value for key, value in table["data"].items() if key in ("augment", "normalize", "validation")}
    table["data"] = {"use": "few-digits", "batch": 64, **kept}
    table["teacher"] = [
        {k: v for k, v in teacher.items() if k not in ("weights", "prefix")} | {"epochs": 1}
        for teacher in table["teacher"]
    ]
    for stage in table["stage"]:
        for training in (stage if stage["use"] in OF_TRAINING else {}, stage.get("heal", {})):
            if training.get("epochs"):
                training |= {"epochs": 1, "clip_norm": 1.0}  # logits of a teacher of three steps are huge
        if stage["use"] == "quantize":
            stage["keep_float"] = False  # on a busy machine int8 may well be slower
        for training in (stage, stage.get("heal", {})):
            if isinstance(training.get("source"), dict) and "views" in training["source"]:
                training["source"]["views"] = 1
    table["profiles"] = [quick_profile(name) for name in table["profiles"]]
    return table


def quick_profile(name: str) -> str:
    file = Path("quick") / f"{Path(name).stem}.toml"  # of the same name, as [gate.NAME] may speak of it
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'extends = "{name}"\n{QUICK}')
    return str(file)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipe(file: Path) -> None:
    assert load_recipe(file.stem) == load_recipe(file)
    table = quick(load_recipe(file))
    done = edgekd.run(table)
    assert done is not None
    check(table, done.directory, done.results)


def check(table: dict[str, Any], directory: Path, results: Any) -> None:
    stages = [stage["use"] for stage in table["stage"]]
    teachers = ["teacher", *(f"teacher-{i + 1}" for i in range(1, len(table["teacher"])))]
    assert [p.profile for p in results.profiles] == [Path(name).stem for name in table["profiles"]]
    for profile in results.profiles:
        variants = {variant.name: variant for variant in profile.variants}
        assert list(variants) == [*teachers, *(stage for stage in stages if stage != "export")]
        assert all(0 <= v.metrics["accuracy"] <= 1 and v.latency.p50.value > 0 for v in variants.values())
        if "prune" in stages:
            before = [*teachers, *stages][[*teachers, *stages].index("prune") - 1]
            assert variants["prune"].macs < variants[before].macs
        if "quantize" in stages:
            assert variants["quantize"].precision == "int8"
            assert variants["quantize"].layers["float"] == 0
    [export] = directory.glob("*-export-*")
    file = Artifact.open(export).file("model.onnx")
    onnx.checker.check_model(onnx.load(file), full_check=True)
    [image] = onnxruntime.InferenceSession(str(file)).get_inputs()
    assert (image.name, image.shape[1:]) == ("image", [3, 32, 32])
    assert (directory / "gate.json").is_file()
    assert (directory / "report.html").is_file()


def test_recipe_of_init(monkeypatch: pytest.MonkeyPatch) -> None:
    scaffold(Path())
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    recipe = load_recipe("recipe.toml")
    table = quick(recipe)
    table["data"] = recipe.data.model_dump(mode="json")
    try:
        done = edgekd.run(table)
    finally:
        sys.modules.pop("own", None)
    assert done is not None
    check(table, done.directory, done.results)
