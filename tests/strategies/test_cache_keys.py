"""Whose a teacher cache is: by the code that made it and the precision, and when two stages name one directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_strategies import KL, RESNET, distill, recipe, run

from edgekd.errors import RecipeError
from edgekd.pipeline import plan
from edgekd.precision import precision_of
from edgekd.recipe import Training, parse_recipe

Table = dict[str, Any]
TEACHER = {"model": RESNET, "epochs": 1}


def cached(**source: Any) -> Table:
    return distill(objectives=KL, source={"use": "cached", "views": 1, **source})


def key(table: Table) -> Mapping[str, Any]:
    """That of the cache of the first distillation."""
    cache = plan(parse_recipe(table), Path("run")).step("distill").cache
    assert cache is not None
    return cache.key


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    return {part for part in {**one, **other} if one.get(part) != other.get(part)}


OWN = "from edgekd.data.augment import RandomErasing as Views\nfrom edgekd.teachers import Frozen as Answers\n"


def test_a_cache_belongs_to_the_code_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else tells: the combination is in no teacher's key, views are not in that of one elsewhere."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("own_cache_code.py").write_text(OWN)
    Path("cache_plugin.py").write_text("A = 1\n")
    elsewhere = run(recipe(TEACHER, distill(objectives=["ce"])), "elsewhere")["teacher"]
    taught = {"teacher": str(elsewhere.path)}
    tables = {
        "of": recipe(TEACHER, {**cached(of="own_cache_code:Answers"), **taught}),
        "augment": recipe(TEACHER, {**cached(), **taught}, data={"augment": "own_cache_code:Views"}),
        "plugin": recipe(TEACHER, {**cached(), **taught}, plugins=["cache_plugin.py"]),
        "none": recipe(TEACHER, {**cached(), **taught}),
    }
    before = {name: key(table) for name, table in tables.items()}
    Path("own_cache_code.py").write_text(OWN + "# changed\n")
    Path("cache_plugin.py").write_text("A = 2\n")
    changed = {name: differing(before[name], key(table)) for name, table in tables.items()}
    assert changed == {"of": {"code"}, "augment": {"code"}, "plugin": {"code"}, "none": set()}


def test_a_cache_belongs_to_the_precision_that_auto_comes_to() -> None:
    mine = precision_of(Training())
    keys = {p: key(recipe(TEACHER, {**cached(), "precision": p})) for p in ("auto", "fp32", "bf16")}
    keys = {p: {**k, "teacher": None} for p, k in keys.items()}
    assert keys["auto"]["precision"] == mine
    assert differing(keys["auto"], keys[mine]) == set()
    assert differing(keys["fp32"], keys["bf16"]) == {"precision"}


def test_answers_without_a_word_whose_they_are_are_refused() -> None:
    table = recipe(TEACHER, cached(directory="mine"))
    run(table)
    Path("mine/cache.json").unlink()
    with pytest.raises(RecipeError) as raised:
        plan(parse_recipe(table), Path("other"))
    [problem] = raised.value.problems
    assert "does not say whose answers it holds: its cache.json is missing" in problem.what
    assert problem.hint == "delete mine/view-*.npy: they are computed again"
    Path("mine/view-000.npy").unlink()
    plan(parse_recipe(table), Path("other"))


PRUNE = {"use": "prune", "target": {"macs": 0.8}}
#: what comes after a distillation (fp32) with its cache in `c`; where the second cache is named, and what is other
CLASHES: dict[str, tuple[Table, str, str]] = {
    "the precision of a healing": ({**PRUNE, "heal": {"epochs": 1, "precision": "bf16"}}, "heal.", "precision"),
    "classes kept": (cached(directory="./c", top=3), "", "top"),
    "the combination": (cached(directory="c", of="ensemble"), "", "combination"),
    "another teacher": ({**cached(directory="c"), "teacher": "distill"}, "", "teacher"),
}


@pytest.mark.parametrize("name", CLASHES)
def test_two_stages_that_would_keep_other_answers_in_one_directory(name: str) -> None:
    later, at, part = CLASHES[name]
    with pytest.raises(RecipeError) as raised:
        plan(parse_recipe(recipe(TEACHER, cached(directory="c"), later)))
    [problem] = raised.value.problems
    assert problem.where == f"stage[1].{at}source.directory"
    assert problem.what == f"the stage 'distill' makes the teacher cache there with another {part}"
    assert problem.hint == "a source with a directory of its own, or with none: then it lies in the run"


def test_two_stages_that_want_the_same_answers_share_a_directory() -> None:
    heal = {"epochs": 1, "precision": "fp32"}
    stages = [cached(directory="c"), cached(directory="c", views=3), {**PRUNE, "heal": heal}, cached(top=3)]
    steps = plan(parse_recipe(recipe(TEACHER, *stages))).steps
    assert [str(s.cache.directory) for s in steps if s.cache is not None][:3] == ["c", "c", "c"]
