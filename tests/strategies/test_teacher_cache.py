"""The teacher cache through the recipe: what is replayed, how large it is, whose it is, and two runs that build it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import environ
from tiny_strategies import KL, SMALL, answers, distill, lessons, recipe, run, wait_for_the_other, watched

from edgekd.errors import RecipeError
from edgekd.pipeline import plan
from edgekd.recipe import parse_recipe, to_toml
from edgekd.teachers import Cached

Tables = dict[str, dict[str, Any]]
VIEWS = {"augment": [{"use": "crop-flip", "pad": 2}, "random-erasing"]}


def cached(teacher: Any, views: int = 2, epochs: int = 1, **source: Any) -> dict[str, Any]:
    stage = distill(objectives=KL, source={"use": "cached", "views": views, **source}, epochs=epochs)
    return recipe(teacher, stage, data=VIEWS)


def test_replayed_answers_are_those_to_the_crop_that_the_student_sees(teachers: Tables) -> None:
    batches: list[dict[str, Any]] = []
    with watched(lambda _, batch: batches.append(batch)), lessons() as found:
        made = run(cached(teachers["resnet"], epochs=4))
    assert [b["view"] for b in batches[::6]] == [0, 1, 0, 1]
    for lesson in found:
        live = answers(made["teacher"], lesson.batch["image"])
        torch.testing.assert_close(lesson.teacher[0]["logits"], live, rtol=2e-3, atol=2e-2)
    first, second = (found[i].teacher[0]["logits"] for i in (0, 6))
    assert not torch.allclose(first[found[0].batch["index"].argsort()], second[found[6].batch["index"].argsort()])
    assert [e["done"] for e in made.events if e["event"] == "cache"][-1] == 2 * 216


def test_the_most_likely_classes_and_the_mass_of_the_rest(teachers: Tables) -> None:
    with lessons() as found:
        made = run(cached(teachers["resnet"], top=3))
    for lesson in found:
        p = lesson.teacher[0]["logits"].double().exp()
        live = answers(made["teacher"], lesson.batch["image"]).double().softmax(dim=1)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(32, dtype=torch.float64), rtol=0, atol=5e-3)
        kept = live.topk(3, dim=1)
        torch.testing.assert_close(p.gather(1, kept.indices), kept.values, rtol=2e-2, atol=1e-3)
        rest = p.scatter(1, kept.indices, -1.0)
        rest = rest[rest >= 0].reshape(32, 7)
        torch.testing.assert_close(rest, rest[:, :1].expand(-1, 7))
        torch.testing.assert_close(rest.sum(dim=1), 1 - kept.values.sum(dim=1), rtol=3e-2, atol=2e-3)


def test_an_ensemble_is_cached_as_one_teacher(teachers: Tables) -> None:
    of = {"use": "ensemble", "combine": "confidence"}
    both = [teachers["resnet"], teachers["mobile"]]
    with lessons() as replayed:
        run(cached(both, of=of), "cached")
    with lessons() as live:
        run(recipe(both, distill(objectives=KL, source=of), data=VIEWS), "live")
    for a, b in zip(replayed, live, strict=True):
        assert torch.equal(a.batch["image"], b.batch["image"])
        torch.testing.assert_close(a.teacher[0]["logits"], b.teacher[0]["logits"], rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("top", [None, 1, 3, 10, 12])
def test_check_tells_the_size_on_disk_before_it_is_built(
    teachers: Tables, edgekd: Callable[..., Any], tmp_path: Path, top: int | None
) -> None:
    keep = {} if top is None else {"top": top}
    table = cached(teachers["resnet"], views=3, **keep)
    Path("recipe.toml").write_text(to_toml(parse_recipe(table)))

    def checked() -> dict[str, Any]:
        [told] = json.loads(edgekd("check", "recipe.toml", "--json", "-o", "run", cwd=tmp_path).out)["teacher_caches"]
        return told  # type: ignore[no-any-return]

    told = checked()
    assert told["missing_bytes"] == told["bytes"] > 0
    assert told["stages"] == ["distill"]
    assert not Path("run").exists()
    text = edgekd("check", "recipe.toml", "-o", "run", cwd=tmp_path).out
    assert f"teacher cache: {told['bytes'] / 1e6:.3f} MB on disk, to build: {told['directory']}" in text
    run(table)
    files = sorted(Path(told["directory"]).glob("*.npy"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) == told["bytes"]
    Path(files[1]).unlink()
    again = json.loads(
        edgekd("check", "recipe.toml", "--json", "-o", "run", "--set", "stage.distill.lr=0.2", cwd=tmp_path).out
    )
    [told] = again["teacher_caches"]
    assert told["missing_bytes"] == told["bytes"] // 3
    assert not json.loads(edgekd("check", "recipe.toml", "--json", "-o", "run", cwd=tmp_path).out)["teacher_caches"]


def test_stages_that_share_a_cache_count_once(teachers: Tables, edgekd: Callable[..., Any], tmp_path: Path) -> None:
    few, more = {"use": "cached", "views": 1}, {"use": "cached", "views": 4}
    stages = [
        distill(objectives=KL, source=few),
        distill(objectives=KL, source=more),
        distill(objectives=["ce"]),
    ]
    stages.append({"use": "fuse", "epochs": 1, "objectives": KL, "source": few, "precision": "fp32"})
    stages.append({"use": "prune", "target": {"macs": 0.8}, "heal": {"epochs": 0}})
    Path("recipe.toml").write_text(to_toml(parse_recipe(recipe(teachers["resnet"], *stages))))
    done = edgekd("check", "recipe.toml", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)["teacher_caches"]
    assert [(c["stages"], c["bytes"]) for c in found] == [(["distill", "distill-2", "fuse"], 4 * (128 + 216 * 10 * 2))]


TRAINED_ELSEWISE: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": {**VIEWS, "every": 5}}, "data"),
    "augmentation": ({"data": {"augment": "crop-flip"}}, "augmentation"),
    "seed": ({"seed": 1}, "seed"),
    "teacher": ({"teacher": "mobile"}, "teacher"),
    "combination": ({"of": {"use": "ensemble"}}, "combination"),
    "top": ({"top": 3}, "top"),
}


@pytest.mark.parametrize("name", TRAINED_ELSEWISE)
def test_a_cache_of_something_else_is_refused_before_any_training(teachers: Tables, name: str) -> None:
    changes, part = TRAINED_ELSEWISE[name]
    run(cached(teachers["resnet"], directory="mine"))
    source = {key: changes.pop(key) for key in ("of", "top") if key in (changes := dict(changes))}
    table = {**cached(teachers[changes.pop("teacher", "resnet")], directory="mine", **source), **changes}
    table["data"] = {"use": "tiny-digits", "batch": 32, **changes.get("data", VIEWS)}
    with pytest.raises(RecipeError) as raised:
        plan(parse_recipe(table), Path("other"))
    [problem] = raised.value.problems
    assert problem.where == "stage[0].source.directory"
    assert part in problem.what
    assert problem.hint == "name another directory, or leave it out"
    plan(
        parse_recipe(cached(teachers["resnet"], views=5, directory="mine")), Path("other")
    )  # more views are no other cache


def test_a_damaged_cache_is_told_by_check(teachers: Tables) -> None:
    run(cached(teachers["resnet"], directory="mine"))
    Path("mine/cache.json").write_text("{")
    with pytest.raises(RecipeError) as raised:
        plan(parse_recipe(cached(teachers["resnet"], directory="mine")), Path("other"))
    [problem] = raised.value.problems
    assert "damaged" in problem.what
    assert "mine" in problem.where
    assert problem.hint == "delete mine"


def test_where_a_cache_lies_changes_no_key(teachers: Tables) -> None:
    def keys(**source: Any) -> list[str]:
        return [step.key for step in plan(parse_recipe(cached(teachers["resnet"], **source)), Path("run")).steps]

    assert keys() == keys(directory="mine")
    assert keys() != keys(top=3)


ANOTHER = """\
import json, sys
from pathlib import Path
import edgekd
from edgekd.registry import register
sys.path.insert(0, sys.argv[1])
from tiny_strategies import tiny_digits, wait_for_the_other
register("data", "tiny-digits")(tiny_digits)
wait_for_the_other("other", "one")
table, events = json.loads(Path("recipe.json").read_text()), []
edgekd.run(table, directory="other", until="distill", emit=events.append)
print(sum(event["event"] == "cache" for event in events))
"""


def test_two_processes_that_build_one_cache_at_once_end_with_one_correct_cache(
    teachers: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cached, "fill", Cached.fill)  # put back afterwards
    table = cached(teachers["resnet"], views=12, directory="shared")
    Path("another.py").write_text(ANOTHER)
    Path("recipe.json").write_text(json.dumps(table))
    command = [sys.executable, "another.py", str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ()) as process:
        wait_for_the_other("one", "other")
        one = run(table, "one")
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    told = sorted([int(out), sum(event["event"] == "cache" for event in one.events)])
    assert told == [12, 12 * (7 + 1)]  # one found all views there, the other computed each in seven batches
    names = [f"view-{i:03d}.npy" for i in range(12)]
    assert sorted(f.name for f in Path("shared").iterdir()) == [".lock", "cache.json", *names]
    run(cached(teachers["resnet"], views=12, directory="alone"), "third")
    assert all(np.array_equal(np.load(Path("shared") / name), np.load(Path("alone") / name)) for name in names)
    [other] = Path("other").glob("*-distill-*/model.safetensors")
    assert other.read_bytes() == one["distill"].file("model.safetensors").read_bytes()


def test_one_cache_serves_a_whole_fleet(teachers: Tables) -> None:
    students = [{"model": SMALL}, {"model": {**SMALL, "width": 6}}]
    stage = distill(students=students, objectives=KL, source={"use": "cached", "views": 1})
    with lessons() as found:
        made = run(recipe(teachers["resnet"], stage))
    assert found[0].teacher[0] is found[0].teacher[1]
    assert len(list(Path("run/.cache").iterdir())) == 1
    assert {"distill.1", "distill.2"} <= made.artifacts.keys()


class Where(torch.nn.Module):
    """A source that tells on which device it and its images are, and answers from the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.found = torch.nn.Parameter(torch.ones(1)), []

    def forward(self, batch: dict[str, Any], students: list[Any]) -> list[dict[str, torch.Tensor]]:
        self.found.append([self.weight.device.type, *(batch[name].device.type for name in ("image", "label"))])
        return [{"logits": torch.ones(len(batch["image"]), 2)}]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cache_is_computed_on_the_device_that_is_named(device: str) -> None:
    source = Cached([torch.nn.Identity()], views=1)
    source.inner = where = Where()
    batch = {"image": torch.zeros(3, 1, 2, 2), "label": torch.zeros(3), "index": torch.tensor([2, 0, 1]), "view": 0}
    source.fill(Path("cache"), lambda _: [batch], 3, lambda *_: None, {}, device)
    assert where.found == [[device] * 3]
    assert np.load("cache/view-000.npy").tolist() == [[1, 1]] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cache_is_computed_on_the_gpu_where_there_is_one(teachers: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    compute = Cached._compute

    def listening(self: Cached, *given: Any) -> None:
        self.inner.register_forward_pre_hook(lambda _, asked: found.append(asked[0]["image"].device.type))
        compute(self, *given)

    monkeypatch.setattr(Cached, "_compute", listening)
    run(cached(teachers["resnet"]))
    assert set(found) == {"cuda"}
