"""Plans: what keys depend on, which orders are possible, and that everything wrong is told before anything runs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd import registry
from edgekd.artifact import Artifact, Manifest, ModelSpec, Preprocessing, finish, locked, writing
from edgekd.errors import Problem, RecipeError, StageError, UsageError
from edgekd.pipeline import Plan, plan, run_steps, summarise
from edgekd.recipe import parse_recipe
from edgekd.stages import Distill, Workspace
from edgekd.stages.prune import Prune

NET = {"use": "cifar-resnet", "depth": 8, "width": 8}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in registry.KINDS:
        registry.names(kind)
    before, path = dict(registry._components), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield
    registry._components.clear()
    registry._components.update(before)
    sys.path[:] = path
    for name in [n for n in sys.modules if n.startswith(("edgekd_plugin_", "pipeline_own"))]:
        del sys.modules[name]


def table(**more: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "version": 1,
            "name": "r",
            "data": {"use": "digits", "size": 8, "batch": 64},
            "teacher": {"model": NET, "epochs": 1},
            "stage": [
                {"use": "distill", "model": NET, "epochs": 1},
                {"use": "prune", "target": {"macs": 0.8}, "heal": {"epochs": 1}},
                {"use": "quantize", "keep_float": False, "heal": {"epochs": 0}},
                {"use": "export"},
            ],
            **more,
        }
    )


def planned(*overrides: str, **more: Any) -> Plan:
    return plan(parse_recipe(table(**more), overrides))


def keys(*overrides: str, **more: Any) -> list[str]:
    return [step.key for step in planned(*overrides, **more).steps]


def problems_of(*overrides: str, **more: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        planned(*overrides, **more)
    return list(caught.value.problems)


NAMES = ["teacher", "distill", "prune", "quantize", "export"]


def test_a_plan_names_numbers_and_places_its_steps() -> None:
    p = planned()
    assert [s.name for s in p.steps] == NAMES
    assert [str(s.directory) for s in p.steps] == [
        f"runs/r/{i:02d}-{name}-{s.key[:12]}" for i, (name, s) in enumerate(zip(NAMES, p.steps, strict=True))
    ]
    assert [s.parents for s in p.steps] == [
        {},
        {"teacher": "teacher"},  # a fresh student has no source
        {"source": "distill", "teacher": "teacher"},
        {"source": "prune", "teacher": "teacher"},
        {"source": "quantize"},
    ]
    assert [row["done"] for row in summarise(p)] == [False] * 5
    assert not (Path("runs")).exists()  # planning writes nothing
    with pytest.raises(UsageError, match="no stage 'distil'") as caught:
        p.step("distil")
    assert caught.value.problem.hint == "did you mean 'distill'?"


def test_the_same_stage_twice_is_told_apart_by_number() -> None:
    twice = [table()["stage"][0], *[{"use": "prune", "target": {"macs": m}} for m in (0.8, 0.6)]]
    p = planned(stage=twice)
    assert [s.name for s in p.steps] == ["teacher", "distill", "prune", "prune-2"]
    assert p.steps[3].parents == {"source": "prune", "teacher": "teacher"}
    assert len({s.key for s in p.steps}) == 4


@pytest.fixture(scope="module")
def base() -> list[str]:
    return keys()


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        ([], None),
        (["name=other"], None),
        (["stage.distill.checkpoint_s=1"], None),
        (["stage.prune.heal.checkpoint_s=1"], None),
        (["gate.size_mb.max=1"], None),
        (["teacher.lr=0.2"], "teacher"),
        (["seed=1"], "teacher"),
        (["data.batch=32"], "teacher"),
        (["data.augment=crop-flip"], "teacher"),
        (["data.validation=0.2"], "teacher"),
        (["data.normalize={mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]}"], "teacher"),
        (["stage.distill.lr=0.2"], "distill"),
        (["stage.prune.target.macs=0.7"], "prune"),
        (["stage.quantize.calibration=64"], "quantize"),
        (["stage.export.input=uint8"], "export"),
    ],
)
def test_a_change_gives_new_keys_to_its_stage_and_to_all_after_it(
    base: list[str], overrides: list[str], first: str | None
) -> None:
    changed = keys(*overrides)
    same = NAMES.index(first) if first else len(NAMES)
    assert changed[:same] == base[:same]
    assert not set(changed[same:]) & set(base)


def test_objectives_of_a_distillation_are_in_the_keys_of_what_heals_by_them() -> None:
    stages = table()["stage"]
    del stages[0]["model"]  # a distillation of the teacher itself
    own = {"objectives": ["ce"]}
    changed = [{**stages[0], **own}, {**stages[1], "heal": {"epochs": 1, **own}}]
    p = planned(stage=[stages[0], stages[1]])
    q = planned(stage=changed)
    assert p.steps[1].key != q.steps[1].key
    assert p.steps[2].config["heal"]["objectives"] == p.steps[1].config["objectives"]


def test_what_a_profile_says_is_in_the_keys_of_what_follows_it(base: list[str]) -> None:
    Path("wide.toml").write_text('extends = "cpu-x86"\nchannel_multiple = 4\n')
    Path("slow.toml").write_text('extends = "cpu-x86"\n[protocol]\nrounds = 3\nprecision = 10.0\n')
    changed = keys(profiles=["wide.toml"])
    assert changed[:2] == base[:2]
    assert not set(changed[2:]) & set(base[2:])
    assert keys(profiles=["slow.toml"]) == base  # how it is measured changes no network


def test_where_a_cache_lies_is_in_no_key() -> None:
    """And so not in those of stages that heal by the same source; how many views it has is in all of them."""
    cached = 'stage.distill.source={use="cached", of={use="ensemble"}%s}'
    here = keys(cached % "")
    assert keys(cached % ', directory="elsewhere"') == here
    more = keys(cached % ", views=3")
    assert more[0] == here[0]
    assert not set(more[1:]) & set(here)
    healed = 'stage.prune.heal.source={use="cached"%s}'
    assert keys(healed % "") == keys(healed % ', directory="elsewhere"')


def test_the_source_of_plugins_and_own_functions_is_in_the_keys(base: list[str]) -> None:
    plugin = Path("mine.py")
    plugin.write_text("A = 1\n")
    first = keys(plugins=["mine.py"])
    assert not set(first) & set(base)
    plugin.write_text("A = 2\n")
    assert not set(keys(plugins=["mine.py"])) & set(first)
    network = "from edgekd.artifact import ModelSpec\nfrom edgekd.models import build\n" + (
        "def net(num_classes: int = 10):\n"
        "    return build(ModelSpec(use='cifar-resnet', args={'depth': 8, 'width': 8, 'num_classes': num_classes}))\n"
    )
    Path("pipeline_own.py").write_text(network)
    student = [{"use": "distill", "model": "pipeline_own:net", "epochs": 1}]
    before = keys(stage=student)
    assert before[0] == base[0]
    Path("pipeline_own.py").write_text(network + "# changed\n")
    after = keys(stage=student)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_the_weights_of_a_teacher_are_in_its_key() -> None:
    from edgekd.models import build, specify

    spec = specify("cifar-resnet", {"depth": 8, "width": 8}, classes=10, size=[3, 8, 8], where="")
    torch.manual_seed(0)
    torch.save(build(spec).state_dict(), "teacher.pt")
    teacher = {"model": NET, "weights": "teacher.pt"}
    first = keys(teacher=teacher, stage=[])
    assert keys(teacher=teacher, stage=[]) == first
    torch.save(build(spec).state_dict(), "teacher.pt")
    assert keys(teacher=teacher, stage=[]) != first


@pytest.mark.parametrize(
    ("order", "where", "what"),
    [
        (["export", "quantize"], "stage[1]", "quantize cannot follow export"),
        (["quantize", "prune"], "stage[1]", "prune cannot follow quantize"),
        (["quantize", "quantize"], "stage[1]", "quantize cannot follow quantize"),
        (["quantize", "distill"], "stage[1]", "distill cannot follow quantize"),
        (["export", "export"], "stage[1]", "export cannot follow export"),
        (["distill", "teacher"], "stage[1]", "teacher cannot follow distill"),
    ],
)
def test_impossible_orders(order: list[str], where: str, what: str) -> None:
    known = {s["use"]: s for s in [*table()["stage"], {"use": "teacher", **table()["teacher"]}]}
    found = [p for p in problems_of(stage=[known[use] for use in order]) if p.where == where]
    assert [p.what for p in found] == [what]
    assert "may follow" in str(found[0].hint)


def test_possible_orders() -> None:
    stages = {s["use"]: s for s in table()["stage"]}
    for order in (["export"], ["quantize", "export"], ["prune", "distill", "prune", "export"]):
        assert len(planned(stage=[stages[use] for use in order]).steps) == len(order) + 1


def test_all_problems_of_all_parts_come_at_once() -> None:
    found = problems_of(
        data={"use": "digits", "size": 8, "augment": ["crop-flop"]},
        task="clasification",
        teacher={"model": {"use": "cifar-resnet", "depth": 8}, "epoch": 1},
        stage=[
            {"use": "distil"},
            {"use": "prune", "target": {"macs": 5}},
            {"use": "quantize", "heal": {"lr": -1}},
        ],
        gate={"latency": {"p51": {"max": 1}}},
    )
    assert {(p.where, p.hint) for p in found if p.what.startswith(("unknown", "no "))} >= {
        ("data.augment[0]", "did you mean 'crop-flip'?"),
        ("task", "did you mean 'classification'?"),
        ("teacher.epoch", "did you mean 'epochs'?"),
        ("stage[0]", "did you mean 'distill'?"),
    }
    texts = {p.where: p.what for p in found}
    assert texts["stage[1].target.macs"] == "must be in (0, 1), got 5"
    assert texts["stage[2].heal.lr"] == "input should be greater than 0, got -1"
    assert "gate.latency.p51" in texts


def test_a_teacher_that_fails_is_told_once() -> None:
    (problem,) = problems_of(teacher={"model": {"use": "cifar-resnet", "depth": 9}, "epochs": 1})
    assert problem.where.startswith("teacher.model")
    (problem,) = problems_of(teacher={"model": "nowhere.at_all:net", "epochs": 1})
    assert (problem.where, problem.what.partition(":")[0]) == ("teacher.model", "cannot import 'nowhere.at_all'")


def test_problems_of_stages_are_found_by_putting_networks_together() -> None:
    stages = table()["stage"]
    hint = {"use": "hint", "student": "layer9", "teacher": "layer2"}
    stages[0] |= {"objectives": ["ce", "kll", hint]}
    stages[1]["heal"] = {"epochs": 1, "objectives": [{"use": "kl", "tau": 0}]}
    found = {p.where: p.what for p in problems_of(stage=stages)}
    assert "no objectives called 'kll'" in found["stage[0].objectives[1]"]
    assert "greater than 0" in found["stage[1].heal.objectives[0].tau"]
    stages[0]["objectives"] = ["ce", hint]
    assert any("layer9" in p.what for p in problems_of(stage=stages))


def test_missing_plugins_and_profiles() -> None:
    (problem,) = problems_of(plugins=["none.py"])
    assert (problem.where, problem.what) == ("plugins", "no plugin file none.py")
    (problem,) = problems_of(profiles=["cpu-x68"])
    assert (problem.where, problem.hint) == ("profiles[0]", "did you mean 'cpu-x86'?")


def test_what_a_profile_names_must_exist_before_anything_runs() -> None:
    profile = 'extends = "cpu-x86"\nruntime = "onnxruntme"\nscheme = "x86-u8u8"\n'
    Path("p.toml").write_text(profile + "budgets = { latency = { p5 = { max = 1 } } }\n")
    found = {p.where: p for p in problems_of(profiles=["p.toml"])}
    assert found["profile p: runtime"].hint == "did you mean 'onnxruntime'?"
    assert found["stage[2].scheme"].hint == "did you mean 'x86-u8s8'?"
    assert found["profile p: budgets.latency.p5"].what == "unknown key: expected a quantile"
    assert len(found) == 3
    (problem,) = problems_of(profiles=["cpu-x86", "cpu-x86"])
    assert problem.what == "two profiles are called 'cpu-x86'"


def test_rules_on_metrics_that_the_task_does_not_have() -> None:
    (problem,) = problems_of(gate={"acuracy": {"min": 0.9}, "loss": {"max": 1}, "cpu-x86": {"size_mb": {"max": 1}}})
    assert problem == Problem("gate.acuracy", "no metric of the task 'classification'", "did you mean 'accuracy'?")


def artifact(directory: Path, size: list[int], classes: list[str]) -> Artifact:
    with writing(directory) as temporary:
        spec = ModelSpec(use="cifar-resnet", args={"depth": 8, "width": 8, "num_classes": len(classes)})
        preprocessing = Preprocessing(size=size, mean=[0.5] * 3, std=[0.5] * 3)
        finish(temporary, Manifest(kind="distill", key="k", model=spec, preprocessing=preprocessing, classes=classes))
    return Artifact.open(directory)


def test_an_artifact_from_elsewhere_must_fit_the_data() -> None:
    recipe = parse_recipe(table(stage=[{"use": "export"}]))
    digits = [str(i) for i in range(10)]
    fitting = plan(recipe, source=artifact(Path("03-fits"), [3, 8, 8], digits))
    assert [s.name for s in fitting.steps] == ["export"]
    for size, classes, what in (
        ([3, 32, 32], digits, "made for images of 3x32x32, the data have 3x8x8"),
        ([3, 8, 8], ["cat", "dog"], "made for 2 classes (cat, dog, ...), the data have 10 (0, 1, 2, ...)"),
    ):
        with pytest.raises(RecipeError) as caught:
            plan(recipe, source=artifact(Path(f"03-{size[1]}-{len(classes)}"), size, classes))
        assert what in [p.what for p in caught.value.problems]
        assert all(p.hint for p in caught.value.problems)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that train nothing: they note their name and leave an empty artifact."""
    ran: list[str] = []

    def pretend(stage: Any, workspace: Workspace) -> Artifact:
        ran.append(workspace.name)
        with writing(workspace.destination) as directory:
            finish(directory, workspace.manifest(ModelSpec(use="cifar-resnet", args=NET_ARGS), metrics={}))
        return Artifact.open(workspace.destination)

    from edgekd.stages import Distill, Export, Quantize, Teacher

    for stage in (Teacher, Distill, Prune, Quantize, Export):
        monkeypatch.setattr(stage, "run", pretend)
    return ran


NET_ARGS = {"depth": 8, "width": 8, "num_classes": 10, "in_channels": 3}


def silent(event: dict[str, Any]) -> None: ...


def test_what_is_complete_is_not_run_again(quick: list[str]) -> None:
    p = planned()
    run_steps(p, silent, until="prune")
    assert quick == ["teacher", "distill", "prune"]
    made = run_steps(p, silent)
    assert quick == NAMES
    assert [a.manifest.kind for a in made] == NAMES
    assert made[2].manifest.parents == {"source": p.steps[1].key, "teacher": p.steps[0].key}
    run_steps(p, silent)
    assert quick == NAMES
    assert parse_recipe_file(p) == p.recipe
    quick.clear()
    run_steps(p, silent, start="quantize")
    assert quick == ["quantize", "export"]
    quick.clear()
    run_steps(planned("stage.prune.target.macs=0.7"), silent)
    assert quick == ["prune", "quantize", "export"]
    quick.clear()
    run_steps(p, silent)  # and back again: all of it is still there
    assert quick == []
    run_steps(p, silent, force=True, until="distill")
    assert quick == ["teacher", "distill"]


def parse_recipe_file(p: Plan) -> Any:
    from edgekd.recipe import load_recipe

    return load_recipe(p.directory / "recipe.toml")


def test_events_say_where_each_stage_lies(quick: list[str]) -> None:
    events: list[dict[str, Any]] = []
    p = planned(stage=[])
    run_steps(p, events.append)
    run_steps(p, events.append)
    directory = str(p.steps[0].directory)
    stage = {"event": "stage", "stage": "teacher", "index": 0, "stages": 1, "path": directory}
    assert events == [
        {**stage, "done": False},
        {"event": "made", "stage": "teacher", "path": directory},
        {**stage, "done": True},
    ]


def test_from_after_until_is_refused(quick: list[str]) -> None:
    with pytest.raises(UsageError, match="--from export comes after --until prune"):
        run_steps(planned(), silent, start="export", until="prune")
    for key in ("start", "until"):
        with pytest.raises(UsageError, match="no stage 'prun'"):
            run_steps(planned(), silent, **{key: "prun"})
    assert quick == []


def test_a_run_in_use_is_left_alone(quick: list[str]) -> None:
    p = planned(stage=[])
    with locked(p.directory), pytest.raises(StageError, match="in use by another edgekd"):
        run_steps(p, silent)
    assert quick == []


def test_a_corrupted_artifact_stops_the_run_before_anything_is_built_on_it(quick: list[str]) -> None:
    p = planned(stage=[])
    run_steps(p, silent)
    manifest = p.steps[0].directory / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(StageError, match="the manifest is damaged") as caught:
        run_steps(p, silent)
    assert f"delete {p.steps[0].directory}" in str(caught.value.problem.hint)
    assert quick == ["teacher"]


def test_the_data_of_a_plan_are_the_recipes() -> None:
    p = planned("data.validation=0.25")
    assert p.data.size == [3, 8, 8]
    assert np.isclose(len(p.data.validation) / (len(p.data.train) + len(p.data.validation)), 0.25, atol=0.01)


def test_any_stage_may_follow_one_that_somebody_else_wrote() -> None:
    class Theirs(Distill):
        """A stage from elsewhere."""

        kind = "theirs"

    registry.register("stages", "theirs")(Theirs)
    stages = [
        {"use": "theirs", "model": NET, "epochs": 1},
        {"use": "prune", "target": {"macs": 0.8}},
        {"use": "export"},
    ]
    assert [step.name for step in planned(stage=stages).steps] == ["teacher", "theirs", "prune", "export"]
