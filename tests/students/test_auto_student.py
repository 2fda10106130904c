"""`model = { use = "auto", ... }`: what it is resolved to, that it stays, and what is said where it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgekd import screen
from edgekd.artifact import Artifact
from edgekd.errors import RecipeError
from edgekd.pipeline import Plan, plan, run_steps
from edgekd.recipe import load_recipe, parse_recipe
from edgekd.runs import open_run
from edgekd.students import choice

AUTO = {"use": "auto", "family": "cifar-resnet", "p50_ms": 0.13}
#: The formula says in int8: 8x16 0.064 ms, 14x16 0.112, 8x32 0.128, 20x16 0.16, 8x64 0.256. By the sessions' drift and
#: the rounds' noise the upper ends of the intervals lie 1.3 times as high.


def recipe(**distill: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "tiny",
        "data": {"use": "digits", "size": 8, "batch": 256},
        "teacher": {"model": {"use": "cifar-resnet", "depth": 20, "width": 16}, "epochs": 1},
        "stage": [{"use": "distill", "epochs": 1, "model": AUTO, **distill}],
    }


def planned(directory: Path, **distill: Any) -> Plan:
    return plan(parse_recipe(recipe(**distill)), directory)


def model_of(found: Plan, step: str = "distill") -> dict[str, Any]:
    spec = found.step(step).spec
    assert spec is not None
    return {"use": spec.use, **{key: spec.args[key] for key in ("depth", "width")}}


def problems(directory: Path, **distill: Any) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as found:
        planned(directory, **distill)
    return [(p.where, p.what) for p in found.value.problems]


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({"p50_ms": 0.1}, (8, 16)),
        ({"p50_ms": 0.15}, (14, 16)),
        ({"p50_ms": 0.2}, (8, 32)),  # 14x16 is as fast, with fewer MACs
        ({"p50_ms": 0.4}, (8, 64)),
        ({"p50_ms": None, "speedup": 4.9}, (8, 16)),  # 20 * 16 against 8 * 16 / 2: exactly 5 times
        ({"p50_ms": None, "speedup": 2.4}, (8, 32)),
        ({"p50_ms": 0.18, "precision": "fp32"}, (8, 16)),
    ],
)
def test_the_largest_member_that_is_fast_enough_is_chosen(
    clock: Any, tmp_path: Path, asked: dict[str, Any], shape: tuple[int, int]
) -> None:
    model = {key: value for key, value in {**AUTO, **asked}.items() if value is not None}
    found = planned(tmp_path / "run", model=model)
    assert model_of(found) == {"use": "cifar-resnet", "depth": shape[0], "width": shape[1]}
    step = found.step("distill")
    assert step.choice is not None
    assert step.choice.model == model_of(found)
    assert step.config["model"] == model_of(found)  # what the key stands on


def test_a_run_with_auto_is_the_run_with_what_was_chosen(clock: Any, tmp_path: Path) -> None:
    found = planned(tmp_path / "run")
    named = planned(tmp_path / "run", model=model_of(found))
    assert [s.key for s in named.steps] == [s.key for s in found.steps]


def test_a_choice_stays_when_measurements_move(clock: Any, tmp_path: Path) -> None:
    first = planned(tmp_path / "run")
    (kept,) = (tmp_path / "run").glob("student-*.json")
    shutil.rmtree(tmp_path / "cache")
    clock.formula = lambda args, precision: args["depth"] * args["width"] / 10000
    again = planned(tmp_path / "run")
    assert [s.key for s in again.steps] == [s.key for s in first.steps]
    assert len(clock.sessions) == len(set(map(tuple, clock.sessions)))  # nothing was measured again
    other = planned(tmp_path / "other")
    assert model_of(other) != model_of(first)
    assert json.loads(kept.read_text())["model"] == model_of(first)
    # Another question is another choice, beside the first.
    faster = planned(tmp_path / "run", model={**AUTO, "p50_ms": 0.1})
    assert faster.steps[1].key != first.steps[1].key
    assert model_of(planned(tmp_path / "run")) == model_of(first)


def test_of_two_processes_that_choose_at_once_the_first_one_holds(clock: Any, tmp_path: Path) -> None:
    mine = planned(tmp_path / "one").step("distill").choice
    assert mine is not None
    theirs = mine.model_copy(update={"name": "other", "model": {**mine.model, "depth": 44}})
    assert choice._kept(theirs, tmp_path / "two") == theirs
    assert choice._kept(mine, tmp_path / "two") == theirs
    assert [p.name for p in (tmp_path / "two").iterdir()] == [next((tmp_path / "one").glob("student-*")).name]


def test_the_trials_of_a_search_share_its_students(clock: Any, tmp_path: Path) -> None:
    first = planned(tmp_path / "search")
    shutil.rmtree(tmp_path / "cache")
    clock.formula = lambda args, precision: args["depth"] * args["width"] / 10000
    trial = planned(tmp_path / "search" / "trials-1" / "3")
    assert model_of(trial) == model_of(first)
    (own,) = (tmp_path / "search" / "trials-1" / "3").glob("student-*.json")
    assert json.loads(own.read_text())["model"] == model_of(first)  # so that it goes on by itself, too


def test_a_search_may_vary_how_fast_the_student_must_be(clock: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from edgekd.search.space import planned_with, prepare

    asked = recipe()
    asked["search"] = {"fields": {"stage.distill.model.p50_ms": [0.1, 0.4]}, "trials": 2}
    space = prepare(parse_recipe(asked), tmp_path / "search")
    shapes = [
        model_of(planned_with(space, {"stage.distill.model.p50_ms": ms}, space.trials / str(i)))
        for i, ms in enumerate([0.1, 0.4])
    ]
    assert [(shape["depth"], shape["width"]) for shape in shapes] == [(8, 16), (8, 64)]


def test_a_damaged_choice_is_not_chosen_anew(clock: Any, tmp_path: Path) -> None:
    planned(tmp_path / "run")
    (kept,) = (tmp_path / "run").glob("student-*.json")
    kept.write_text("{")
    assert problems(tmp_path / "run") == [(str(kept), "the choice of a student is damaged")]


def test_students_of_a_fleet_may_be_auto(clock: Any, tmp_path: Path) -> None:
    students = [
        {"name": "small", "model": {**AUTO, "p50_ms": 0.1}},
        {"name": "fixed", "model": {"use": "cifar-resnet", "depth": 8, "width": 4}},
        {"name": "large", "model": {**AUTO, "p50_ms": 0.4}},
    ]
    found = planned(tmp_path / "run", students=students, model=None)
    shapes = {s.name: (model_of(found, s.name)["depth"], model_of(found, s.name)["width"]) for s in found.steps[1:]}
    assert shapes == {"distill.small": (8, 16), "distill.fixed": (8, 4), "distill.large": (8, 64)}
    assert [s.choice is not None for s in found.steps] == [False, True, False, True]
    assert len(clock.sessions) == 2  # 13 shapes once: the second one asks of the same figures


@pytest.mark.parametrize(
    ("model", "where", "what"),
    [
        ({"family": "cifar-resnets"}, "stage[0].model.family", "input should be 'cifar-resnet', 'mobilenet' or 'vit'"),
        ({"speedup": 2.0}, "stage[0].model", "p50_ms and speedup exclude each other"),
        ({"p50_ms": None}, "stage[0].model", "needs p50_ms or speedup"),
        ({"p50_ms": -1.0}, "stage[0].model.p50_ms", "should be greater than 0"),
        ({"profile": "cpu-x68"}, "stage[0].model.profile", "no profile 'cpu-x68'"),
        ({"precision": "fp16"}, "stage[0].model.precision", "'fp32' or 'int8'"),
        ({"depth": 8}, "stage[0].model.depth", "unknown key"),
        ({"p50_ms": 0.01}, "stage[0].model.p50_ms", "the nearest, cifar-resnet-8x8, has 0.0"),
        ({"p50_ms": None, "speedup": 50.0}, "stage[0].model.speedup", "the nearest, cifar-resnet-8x8, has 5x"),
        ({"profile": "float.toml"}, "stage[0].model.precision", "the profile float does not have int8, only fp32"),
        ({"profile": "far.toml"}, "stage[0].model", "far has sme9, this machine has not"),
    ],
)
def test_what_cannot_be_chosen_is_said_at_its_place(
    clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], where: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("float.toml").write_text('extends = "cpu-x86"\ndescription = "no int8"\nprecisions = ["fp32"]\n')
    Path("far.toml").write_text('extends = "cpu-x86"\ndescription = "far"\nrequires = ["sme9"]\n')
    asked = {key: value for key, value in {**AUTO, **model}.items() if value is not None}
    ((place, told),) = problems(tmp_path / "run", model=asked)
    assert place == where
    assert what in told
    assert not (tmp_path / "run").exists()


def test_nothing_is_measured_for_a_recipe_that_is_wrong_elsewhere(clock: Any, tmp_path: Path) -> None:
    table = recipe()
    table["stage"].append({"use": "prune", "target": {"macs": 2.0}})
    with pytest.raises(RecipeError) as found:
        plan(parse_recipe(table), tmp_path / "run")
    assert all(p.where.startswith("stage[1]") for p in found.value.problems)
    assert clock.sessions == []


def test_a_teacher_cannot_be_auto(clock: Any, tmp_path: Path) -> None:
    table = recipe(model={"use": "cifar-resnet", "depth": 8})
    table["teacher"]["model"] = AUTO
    with pytest.raises(RecipeError) as found:
        plan(parse_recipe(table), tmp_path / "run")
    assert any("auto stands for a student" in p.what for p in found.value.problems)


def test_a_run_trains_what_was_chosen_and_its_recipe_says_what_was_asked(
    clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = recipe(model={**AUTO, "p50_ms": 0.1})
    asked["teacher"]["model"] = {"use": "cifar-resnet", "depth": 8, "width": 4}
    events: list[dict[str, Any]] = []
    run_steps(plan(parse_recipe(asked), Path("run")), events.append)
    assert (events[0]["event"], events[0]["stage"]) == ("student", "distill")
    told = screen.line(events[0])
    assert told is not None
    assert told.startswith("student of distill: cifar-resnet-8x16: p50 0.0")
    assert load_recipe("run/recipe.toml").stage[0].args["model"] == {**AUTO, "p50_ms": 0.1}
    shutil.rmtree("cache")
    clock.formula = lambda args, precision: args["depth"] * args["width"] / 1e6
    clock.sessions.clear()
    again = open_run("run")
    assert all(step.done for step in again.steps)
    made = Artifact.open(again.step("distill").directory).manifest
    assert (made.model.args["depth"], made.model.args["width"]) == (8, 16)
    assert made.config["model"] == {"use": "cifar-resnet", "depth": 8, "width": 16}
    assert clock.sessions == []
