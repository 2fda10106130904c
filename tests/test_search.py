"""Searching: fields checked by planning, trials that share what they can, kills, several workers, pruning."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from processes import environ
from torch import Tensor, nn

from edgekd.errors import RecipeError, StageError, UsageError
from edgekd.pipeline import plan
from edgekd.recipe import Recipe, load_recipe, parse_recipe, to_toml
from edgekd.registry import register, unregister
from edgekd.search import prepare, search, study
from edgekd.search.study import Numbered

LR = "stage.distill.lr"
TAU = "stage.distill.objectives.kl.tau"


def table(**settings: Any) -> dict[str, Any]:
    """A recipe that trains in a second or two, and what is searched in it."""
    model = {"use": "cifar-resnet", "depth": 8, "width": 4}
    return {
        "version": 1,
        "name": "tiny",
        "data": {"use": "digits", "size": 8, "batch": 64},
        "teacher": {"model": {**model, "width": 8}, "epochs": 1},
        "stage": [{"use": "distill", "model": model, "epochs": 2, "objectives": ["ce", {"use": "kl", "tau": 2.0}]}],
        "search": {"trials": 4, "sampler": "random", "pruner": "none", **settings},
    }


def recipe(**settings: Any) -> Recipe:
    return parse_recipe(table(**settings))


def artifacts(directory: Path, name: str) -> list[Path]:
    """What was trained for a stage, without the links to it."""
    return [m.parent for m in directory.rglob(f"*-{name}-*/manifest.json") if not m.parent.is_symlink()]


@pytest.fixture(scope="session")
def lately(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A finished search of four trials, by a learning rate that is absurd or sane."""
    directory = tmp_path_factory.mktemp("search") / "tiny-search"
    return search(recipe(fields={LR: [1e-7, 0.1], TAU: [1.0, 4.0]}, trials=5), directory=directory), directory


def test_a_search_finds_the_sane_value_and_writes_it_down(lately: tuple[dict[str, Any], Path]) -> None:
    document, directory = lately
    assert len(document["trials"]) == 5
    by_rate = {rate: [t["value"] for t in document["trials"] if t["values"][LR] == rate] for rate in (1e-7, 0.1)}
    assert min(by_rate[0.1]) > max(by_rate[1e-7]) + 0.1
    assert document["best"]["values"][LR] == 0.1
    assert document["best"]["value"] == max(by_rate[0.1])
    best = load_recipe(directory / "best.toml")
    stage = best.stage[0].args
    assert (stage["lr"], stage["objectives"][1]["tau"]) == (0.1, document["best"]["values"][TAU])
    assert best.search is None
    assert json.loads((directory / "trials.json").read_text()) == {"version": 1, **document}


def test_a_trials_value_is_that_of_its_artifact_on_validation(lately: tuple[dict[str, Any], Path]) -> None:
    document, _ = lately
    for trial in document["trials"]:
        done = plan(load_recipe(Path(trial["directory"]) / "recipe.toml"), Path(trial["directory"]))
        assert done.artifact("distill").manifest.metrics["accuracy"] == trial["value"]
        assert done.recipe.stage[0].args["lr"] == trial["values"][LR]
        if trial["epochs"]:
            assert trial["value"] == max(value for _, value in trial["curve"])


def test_what_trials_share_is_made_once(lately: tuple[dict[str, Any], Path]) -> None:
    document, directory = lately
    assert [p.parent for p in artifacts(directory, "teacher")] == [directory]
    combinations = {tuple(t["values"].values()) for t in document["trials"]}
    assert len(combinations) < 5, "the seed gives one twice"
    assert len(artifacts(directory, "distill")) == len(combinations)
    assert sum(t["epochs"] for t in document["trials"]) == 2 * len(combinations)


def test_the_best_trial_can_be_gone_on_from_without_training(
    lately: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    document, directory = lately
    moved = tmp_path / "elsewhere"
    shutil.copytree(directory, moved, symlinks=True)
    best = moved / Path(document["best"]["directory"]).relative_to(directory)
    assert all(step.done for step in plan(load_recipe(moved / "best.toml"), best).steps)


def test_the_same_search_again_does_nothing_and_more_trials_go_on(
    lately: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    document, directory = lately
    copy = tmp_path / "tiny-search"
    shutil.copytree(directory, copy, symlinks=True)
    fields = {LR: [1e-7, 0.1], TAU: [1.0, 4.0]}
    events: list[dict[str, Any]] = []
    again = search(recipe(fields=fields, trials=5), directory=copy, emit=events.append)
    assert events == []
    assert again["best"]["value"] == document["best"]["value"]
    more = search(recipe(fields=fields, trials=6), directory=copy, emit=events.append)
    assert [e["number"] for e in events if e["event"] == "trial"] == [5]
    assert [t["values"] for t in more["trials"][:5]] == [t["values"] for t in document["trials"]]


def test_the_key_of_a_search_is_what_makes_trials_comparable(tmp_path: Path) -> None:
    def key(change: Callable[[dict[str, Any]], None] = lambda t: None) -> str:
        changed = table(fields={LR: {"low": 0.01, "high": 0.5, "log": True}})
        change(changed)
        return prepare(parse_recipe(changed), tmp_path).key

    same = key()
    assert key(lambda t: t["search"].update(trials=99)) == same
    assert key(lambda t: t["stage"][0].update(lr=0.3)) == same, "the field's own value is not used"
    assert key(lambda t: t.update(gate={"size_mb": {"max": 1.0}})) == same
    assert key(lambda t: t["stage"].append({"use": "export"})) == same
    assert key(lambda t: t["stage"][0].update(epochs=3)) != same
    assert key(lambda t: t["teacher"].update(epochs=3)) != same
    assert key(lambda t: t["search"]["fields"][LR].update(high=0.6)) != same


def test_keys_of_stages_and_the_recipes_text_do_not_depend_on_the_search(tmp_path: Path) -> None:
    with_search = recipe(fields={LR: {"low": 0.01, "high": 0.5, "log": True}, TAU: [1.0, [2.0], {"use": "x"}]})
    without = with_search.model_copy(update={"search": None})
    assert [s.key for s in plan(with_search, tmp_path).steps] == [s.key for s in plan(without, tmp_path).steps]
    assert parse_recipe(tomllib.loads(to_toml(with_search))) == with_search
    assert "search" not in to_toml(without)
    bare = tomllib.loads("[search.fields]\nstage.distill.lr = { low = 0.01, high = 0.5 }\n")["search"]["fields"]
    assert list(recipe(fields=bare).search.fields) == [LR], "paths need no quotes"


@pytest.mark.parametrize(
    ("settings", "where", "what", "hint"),
    [
        ({"fields": {}}, "search.fields", "no fields to search", "--field"),
        ({"fields": {LR: {"low": 0.5, "high": 0.1}}}, f"search.fields.{LR}", "low must be below high", "low = 0.01"),
        ({"fields": {LR: {"low": 0.5, "high": 0.5}}}, f"search.fields.{LR}", "low must be below high", "low = 0.01"),
        (
            {"fields": {LR: {"low": 0.0, "high": 0.1, "log": True}}},
            *(f"search.fields.{LR}", "low must be above 0 for log", "low = 0.01"),
        ),
        ({"fields": {LR: []}}, f"search.fields.{LR}.choices", "at least 1 item", "the values to choose from"),
        ({"fields": {LR: [0.1, 0.1]}}, f"search.fields.{LR}", "two choices are the same", "low = 0.01"),
        ({"fields": {LR: 0.1}}, f"search.fields.{LR}", "must be a table", "or a list of choices"),
        ({"fields": {"stage.distill.lrr": [0.1, 0.2]}}, "search.fields.stage.distill.lrr", "unknown key", "'lr'"),
        ({"fields": {"stage.distil.lr": [0.1, 0.2]}}, "search.fields.stage.distil.lr", "no such entry", "distill"),
        ({"fields": {"stage.distill.objectives.3.tau": [1, 2]}}, "search.fields.", "no such entry", "ce, kl"),
        ({"fields": {LR: {"low": -0.1, "high": 0.1}}}, f"search.fields.{LR}", "greater than 0, got -0.1", None),
        ({"fields": {"stage.distill.ema": [0.9, 1.5]}}, "search.fields.stage.distill.ema", "got 1.5", "averaged"),
        ({"fields": {"gate.size_mb.max": [1.0, 2.0]}}, "search.fields.gate", "changes nothing up to", "another field"),
        ({"fields": {LR: [0.1, 0.2]}, "stage": "distil"}, "search.stage", "no stage 'distil'", "'distill'"),
        ({"fields": {LR: [0.1, 0.2]}, "metric": "acuracy"}, "search.metric", "no metric 'acuracy'", "'accuracy'"),
        ({"fields": {LR: [0.1, 0.2]}, "trial": 3}, "search.trial", "unknown key", "'trials'"),
    ],
)
def test_what_is_wrong_is_one_error_with_place_and_hint(
    tmp_path: Path, settings: dict[str, Any], where: str, what: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        search(recipe(**settings), directory=tmp_path / "s")
    (problem,) = caught.value.problems
    assert problem.where.startswith(where)
    assert what in problem.what
    assert hint is None or hint in (problem.hint or "")
    assert not (tmp_path / "s").exists(), "nothing is begun"


def test_problems_come_together_and_taps_are_checked(tmp_path: Path) -> None:
    wrong = table(fields={LR: [0.1, -1.0], "stage.distill.objectives.hint.student": ["layer1", "layer9"]})
    wrong["stage"][0]["objectives"].append({"use": "hint", "student": "layer1", "teacher": "layer1"})
    wrong["data"]["validation"] = 0
    with pytest.raises(RecipeError) as caught:
        prepare(parse_recipe(wrong), tmp_path)
    found = {p.where: p for p in caught.value.problems}
    assert list(found) == ["search", f"search.fields.{LR}", "search.fields.stage.distill.objectives.hint.student"]
    assert "no validation split" in found["search"].what
    assert found["search"].hint == "data.validation = 0.1"
    assert "layer9" in found["search.fields.stage.distill.objectives.hint.student"].what


def test_a_field_of_a_later_stage_names_it(tmp_path: Path) -> None:
    longer = table(fields={"stage.prune.heal.lr": [0.1, 0.2]})
    longer["stage"].append({"use": "prune", "target": {"macs": 0.8}, "heal": {"epochs": 1}})
    with pytest.raises(RecipeError, match="changes nothing up to the stage 'distill'") as caught:
        prepare(parse_recipe(longer), tmp_path)
    assert caught.value.problems[0].hint == "search.stage = 'prune'"
    longer["search"]["stage"] = "prune"
    assert prepare(parse_recipe(longer), tmp_path).shared == "distill"


def test_an_export_is_not_judged(tmp_path: Path) -> None:
    exported = table(fields={LR: [0.1, 0.2]}, stage="export")
    exported["stage"].append({"use": "export"})
    with pytest.raises(RecipeError, match="an export is not judged") as caught:
        prepare(parse_recipe(exported), tmp_path)
    assert caught.value.problems[0].hint == "the stage before it: 'distill'"


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        (f"{LR}=0.01..0.5:log", {"low": 0.01, "high": 0.5, "log": True}),
        ("stage.distill.epochs=1..3", {"low": 1, "high": 3, "log": False}),
        (f"{TAU} = [1.0, 4.0]", {"choices": [1.0, 4.0], "log": False}),
        (f"{LR}={{low = 0.1, high = 0.3, step = 0.1}}", {"low": 0.1, "high": 0.3, "step": 0.1, "log": False}),
    ],
)
def test_fields_on_the_command_line(tmp_path: Path, text: str, axis: dict[str, Any]) -> None:
    space = prepare(recipe(), tmp_path, [text])
    (found,) = space.search.fields.values()
    assert found.model_dump(exclude_none=True) == axis
    assert space.shared == "teacher"


def test_a_field_of_the_teacher_leaves_nothing_shared(tmp_path: Path) -> None:
    space = prepare(recipe(fields={"teacher.lr": [0.1, 0.2]}), tmp_path)
    assert space.shared is None


@pytest.mark.parametrize("text", [LR, f"{LR}=", "=1..2", f"{LR}=0.1..0.2:lin", f"{LR}=x..y"])
def test_fields_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(recipe(), tmp_path, [text])
    assert LR in str(caught.value) or "--field" in str(caught.value)


def test_values_follow_from_the_seed_and_the_trials_number() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    axis = {"x": optuna.distributions.FloatDistribution(0, 1)}

    def drawn(parts: list[int]) -> list[float]:
        study = optuna.create_study(sampler=Numbered("tpe", 0))
        for count in parts:
            study.sampler = Numbered("tpe", 0)  # as another process makes it
            for _ in range(count):
                trial = study.ask(axis)
                study.tell(trial, trial.params["x"])
        return [t.params["x"] for t in study.trials]

    whole = drawn([14])
    assert drawn([3, 8, 3]) == whole
    assert len(set(whole)) == 14


def test_a_trial_worse_than_the_median_is_pruned_and_leaves_nothing_behind(tmp_path: Path) -> None:
    tried = table(fields={LR: {"low": 1e-7, "high": 0.3, "log": True}}, trials=6, pruner="median")
    tried["seed"] = 302  # draws 0.3 mostly, and 6e-7 in the sixth trial
    document = search(parse_recipe(tried), directory=tmp_path / "s")
    *before, pruned = document["trials"]
    assert [t["state"] for t in before] == ["complete"] * 5, "the median needs some trials"
    assert pruned["values"][LR] < 1e-6
    assert (pruned["state"], pruned["value"], pruned["epochs"]) == ("pruned", None, 1)
    assert pruned["curve"][0][1] < sorted(t["curve"][0][1] for t in before)[2]
    run = Path(pruned["directory"])
    there = {re.sub("-[0-9a-f]{12}$", "", p.name) for p in run.iterdir()}
    assert there == {".cache", ".claim", ".lock", "00-teacher", "events.jsonl", "recipe.toml"}
    end = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["exit_code"], end["error"], end["pruned"]) == ("end", 0, None, True)


def test_values_that_cannot_be_trained_with_fail_alone(tmp_path: Path) -> None:
    document = search(recipe(fields={LR: [1e30, 0.1]}, trials=4), directory=tmp_path / "s")
    states = {t["values"][LR]: t["state"] for t in document["trials"]}
    assert states == {1e30: "failed", 0.1: "complete"}
    failed = next(t for t in document["trials"] if t["state"] == "failed")
    assert re.search("NaN|nan|infinite", failed["error"])
    assert not (Path(failed["directory"]) / ".partial").exists()
    with pytest.raises(StageError, match=r"no trial came to its end: .*(NaN|nan|infinite)"):
        search(recipe(fields={LR: [1e30]}, trials=2), directory=tmp_path / "t")


class Picky(nn.Module):
    """An objective that only finds in training that it was given the wrong number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        if self.training and self.number == 13:
            raise UsageError("13 brings bad luck", where="picky.number")
        return student["logits"].square().mean()


def test_values_that_a_stage_refuses_fail_alone(tmp_path: Path) -> None:
    register("objectives", "picky")(Picky)
    try:
        number = "stage.distill.objectives.picky.number"
        tried = table(fields={number: [7, 13]}, trials=3)
        tried["stage"][0].update(epochs=1, objectives=["ce", {"use": "picky", "number": 7}])
        document = search(parse_recipe(tried), directory=tmp_path / "s")
    finally:
        unregister("objectives", "picky")
    assert {t["values"][number]: t["state"] for t in document["trials"]} == {7: "complete", 13: "failed"}
    assert {t["error"] for t in document["trials"]} == {None, "picky.number: 13 brings bad luck"}


def test_trials_weigh_the_teachers_that_they_share_by_accuracy(tmp_path: Path) -> None:
    tried = table(fields={LR: [0.1, 0.2]}, trials=1)
    tried["teacher"] = [tried["teacher"], {**tried["teacher"], "lr": 0.01}]
    tried["stage"][0].update(epochs=1, source={"use": "ensemble", "combine": "accuracy"})
    document = search(parse_recipe(tried), directory=tmp_path / "s")
    [trial] = document["trials"]
    assert (trial["state"], trial["error"]) == ("complete", None)
    assert sum(p.is_symlink() for p in Path(trial["directory"]).glob("*-teacher*")) == 2


def start(directory: Path, *more: str) -> subprocess.Popen[str]:
    """`edgekd search` as a process of its own."""
    command = [sys.executable, "-m", "edgekd", "search", "recipe.toml", "--json", *more]
    return subprocess.Popen(
        command, cwd=directory, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it took too long")


def written(directory: Path, **settings: Any) -> Recipe:
    """A recipe in `directory` whose checkpoints are written often."""
    made = table(fields={LR: {"low": 0.01, "high": 0.3, "log": True}}, **settings)
    made["stage"][0].update(checkpoint_s=0.1)
    directory.mkdir(exist_ok=True)
    (directory / "recipe.toml").write_text(to_toml(parse_recipe(made)))
    return parse_recipe(made)


def test_a_killed_search_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = search(written(tmp_path / "a", trials=2), directory=tmp_path / "a" / "runs" / "tiny-search")
    again = written(tmp_path / "b", trials=2)
    runs = tmp_path / "b" / "runs" / "tiny-search"
    killed = start(tmp_path / "b")
    until(lambda: bool(list(runs.glob("trials-*/0001/.partial/*/checkpoint.pt"))), killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    events: list[dict[str, Any]] = []
    document = search(again, directory=runs, emit=events.append)
    assert [(e["number"], e["resumed"]) for e in events if e["event"] == "trial"] == [(1, True)]
    assert [e["stage"] for e in events if e["event"] == "resume"] == ["distill"]
    for ours, theirs in zip(document["trials"], whole["trials"], strict=True):
        assert (ours["number"], ours["values"], ours["value"]) == (theirs["number"], theirs["values"], theirs["value"])
        assert ours["state"] == "complete"
    assert len(artifacts(runs, "distill")) == 2


def test_two_workers_at_one_search(tmp_path: Path) -> None:
    ours = written(tmp_path, trials=4)
    runs = tmp_path / "runs" / "tiny-search"
    other = start(tmp_path)
    until(lambda: bool(list(runs.glob("trials-*/0000"))), other)
    events: list[dict[str, Any]] = []
    here = search(ours, directory=runs, emit=events.append)
    out, err = other.communicate(timeout=240)
    assert other.returncode == 0, err
    there = json.loads(out)
    assert there["best"]["value"] == here["best"]["value"]
    assert [t["state"] for t in here["trials"]] == [t["state"] for t in there["trials"]] == ["complete"] * 4
    assert len({t["values"][LR] for t in here["trials"]}) == 4, "no two workers draw the same"
    worked = {e["number"] for e in events if e["event"] == "trial"}, set(map(int, re.findall(r"(?m)^trial (\d)", err)))
    assert worked[0] | worked[1] == {0, 1, 2, 3}
    assert not worked[0] & worked[1]
    assert 1 in worked[0]
    assert len(artifacts(runs, "teacher")) == 1


def test_workers_that_share_only_the_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    fields = {LR: {"low": 0.05, "high": 0.3}}
    one = search(recipe(fields=fields, trials=1), directory=tmp_path / "one", storage=url)
    two = search(recipe(fields=fields, trials=2), directory=tmp_path / "two", storage=url)
    assert not (tmp_path / "one" / "study.db").exists()
    assert two["trials"][0]["value"] == one["trials"][0]["value"]
    assert [t["number"] for t in two["trials"]] == [0, 1]
    assert len(artifacts(tmp_path / "two", "distill")) == 1


def test_a_trial_left_by_a_worker_elsewhere_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.search.study.GRACE_S", 2)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    asked = recipe(fields={LR: {"low": 0.05, "high": 0.3}}, trials=1)
    space = prepare(asked, tmp_path / "here")
    with study.quiet():
        there = study.open_study(space, url)
        left = there.ask({LR: optuna.distributions.FloatDistribution(0.05, 0.3)})
        left.set_user_attr(study.OWNER, "a directory elsewhere")
        with study.beating(left):
            time.sleep(0.1)
    events: list[dict[str, Any]] = []
    document = search(asked, directory=tmp_path / "here", storage=url, emit=events.append)
    assert [t["state"] for t in document["trials"]] == ["lost", "complete"]
    assert document["trials"][0]["values"] != document["trials"][1]["values"]
    assert events[0] == {"event": "waiting", "for": "other workers, who are at 1 trial"}


def test_a_storage_that_cannot_be_used(tmp_path: Path) -> None:
    for url in ("nonsense", "postgresql://nobody@localhost:1/none", f"sqlite:///{tmp_path}/no/where.db"):
        with pytest.raises(UsageError, match="--storage: the storage cannot be used"):
            search(recipe(fields={LR: [0.1, 0.2]}), directory=tmp_path / "s", storage=url)
