"""The recipe: what TOML may say, all errors at once, overrides, and the way back to TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import Problem, RecipeError, UsageError
from edgekd.recipe import (
    Recipe,
    apply_override,
    find_recipe,
    load_recipe,
    parse_recipe,
    parse_value,
    to_toml,
)
from edgekd.shipped import shipped


def table(**more: Any) -> dict[str, Any]:
    return {"version": 1, "name": "r", "data": "digits", "teacher": {"model": "cifar-resnet", "epochs": 1}, **more} | (
        {} if isinstance(more.get("data"), dict) else {"data": {"use": "digits"}}
    )


def problems_of(**more: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table(**more))
    return list(caught.value.problems)


def test_defaults_and_bare_names() -> None:
    recipe = parse_recipe(table(stage=["distill", {"use": "export", "opset": 18}], task="classification"))
    assert (recipe.seed, recipe.profiles, recipe.gate) == (0, ["cpu-x86"], {})
    assert [(s.use, s.args) for s in recipe.stage] == [("distill", {}), ("export", {"opset": 18})]
    assert (recipe.data.batch, recipe.data.validation, recipe.data.augment) == (128, 0.1, [])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("crop-flip", [("crop-flip", {})]),
        ("none", []),
        ({"use": "crop-flip", "pad": 2}, [("crop-flip", {"pad": 2})]),
        (["flip", {"use": "mixup", "alpha": 0.2}], [("flip", {}), ("mixup", {"alpha": 0.2})]),
    ],
)
def test_augment_is_one_or_many(written: Any, read: Any) -> None:
    recipe = parse_recipe(table(data={"use": "digits", "augment": written}))
    assert [(a.use, a.args) for a in recipe.data.augment] == read


def test_every_problem_is_told_at_once_with_its_place() -> None:
    found = problems_of(
        nmae="x",
        version=2,
        name="a b",
        seed=-1,
        data={"use": "digits", "batch": 0, "normalize": {"mean": [0.5], "std": [0], "median": 1}},
        stage=[{"use": "distill"}, {"epochs": 3}, 5],
    )
    assert {p.where for p in found} == {
        *("nmae", "version", "name", "seed", "data.batch", "stage[1].use", "stage[2]"),
        *("data.normalize.std[0]", "data.normalize.median"),
    }
    by_place = {p.where: p for p in found}
    assert by_place["nmae"] == Problem("nmae", "unknown key", "did you mean 'name'?")
    assert by_place["data.normalize.median"].hint == "did you mean 'mean'?"
    assert by_place["data.batch"].what == "input should be greater than 0, got 0"
    assert by_place["data.batch"].hint == "training batch size"
    assert by_place["stage[1].use"].what == "missing: this key is required"
    assert by_place["stage[2]"].what == "must be a table, got 5"
    assert by_place["version"].what == "input should be 1, got 2"


def test_missing_keys_say_what_they_are_for() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({})
    assert {p.where for p in caught.value.problems} == {"version", "name", "data", "teacher"}
    assert all(p.what == "missing: this key is required" and p.hint for p in caught.value.problems)


def test_the_given_table_stays_as_it_was() -> None:
    given = table(stage=[{"use": "distill", "epochs": 1}])
    parse_recipe(given, ["stage.distill.epochs=3", "seed=4"])
    assert given["stage"][0]["epochs"] == 1
    assert "seed" not in given


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("stage.distill.epochs=30", ("stage", 0, "epochs"), 30),
        ("stage.1.target.macs=0.5", ("stage", 1, "target", "macs"), 0.5),
        ("stage.prune.heal.lr=3e-4", ("stage", 1, "heal", "lr"), 3e-4),
        ("stage.prune-2.target.macs=0.4", ("stage", 2, "target", "macs"), 0.4),
        ("stage.distill.objectives.kl.tau=2", ("stage", 0, "objectives", 1), {"use": "kl", "tau": 2}),
        ("stage.export.opset=19", ("stage", 3), {"use": "export", "opset": 19}),
        ("data.root=data dir", ("data", "root"), "data dir"),
        ('data.root="a=b"', ("data", "root"), "a=b"),
        ("teacher.model.depth=56", ("teacher", "model"), {"use": "cifar-resnet", "depth": 56}),
        ("gate.latency.p50.speedup=4", ("gate", "latency", "p50", "speedup"), 4),
        ('profiles=["a.toml", "b.toml"]', ("profiles",), ["a.toml", "b.toml"]),
        ("data.augment=none", ("data", "augment"), "none"),
        (" seed = 5 ", ("seed",), 5),
        ("name=", ("name",), ""),
    ],
)
def test_overrides_by_name_and_by_index(override: str, path: tuple[Any, ...], value: Any) -> None:
    changed = table(
        stage=[
            {"use": "distill", "objectives": ["ce", "kl"]},
            {"use": "prune", "target": {"macs": 0.8}},
            {"use": "prune"},
            "export",
        ]
    )
    apply_override(changed, override)
    found: Any = changed
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("seed", "--set wants key=value, got 'seed'", "stage.distill.epochs=3"),
        ("=3", "--set wants key=value", "for example"),
        ("a..b=3", "--set wants key=value", "for example"),
        ("stage.prun.epochs=3", "no such entry, got 'prun'", "there are: distill, export"),
        ("stage.7.epochs=3", "no such entry, got '7'", "there are: distill, export"),
        ("stage.0=3", "names an entry of a list", "stage.0.KEY=VALUE"),
        ("seed.x=3", "is not a table, got 0", "set the key itself"),
        ("profiles.0.x.y=1", "is not a table, got 3", "set the whole list"),
    ],
)
def test_overrides_that_lead_nowhere(override: str, what: str, hint: str) -> None:
    changed = table(seed=0, stage=["distill", "export"], profiles=[3])
    with pytest.raises(UsageError) as caught:
        apply_override(changed, override)
    (problem,) = caught.value.problems
    assert what in problem.what
    assert hint in (problem.hint or "")


def test_an_override_of_an_unknown_key_is_an_unknown_key() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table(), ["sede=3"])
    assert caught.value.problems == [Problem("sede", "unknown key", "did you mean 'seed'?")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("3e-4", 3e-4), ("true", True), ("off", "off"), ("'3'", "3"), ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1})),
        *(("cifar10", "cifar10"), ("", ""), ("a b # c", "a b # c"), ("1_000", 1000)),
    ],
)
def test_values_are_toml_where_they_can_be(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = shipped("recipes") / "demo.toml"
    for name in ("demo", "demo.toml", "recipes/demo.toml"):
        assert find_recipe(name) == demo
    (tmp_path / "demo.toml").write_text("version = 1\n")
    assert find_recipe("demo.toml") == Path("demo.toml")  # the user's own comes first
    (tmp_path / "run").mkdir()
    for name, what, hint in (
        ("run", "run is a directory", "run/recipe.toml"),
        ("dmeo", "no recipe dmeo", "demo"),
        ("elsewhere/demo.toml", "no recipe elsewhere/demo.toml", "edgekd init"),
    ):
        with pytest.raises(UsageError, match=what) as caught:
            find_recipe(name)
        assert hint in str(caught.value.problem.hint)
        assert caught.value.problem.where == "recipe"


@pytest.mark.parametrize("content", [b"version = ", b"name = 'a\nversion = 1", b"\xff\xfe\x00", b"a = 1\na = 2\n"])
def test_toml_errors_name_the_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert caught.value.problem.where == str(file)
    assert caught.value.problem.what.startswith("not valid TOML: ")
    assert caught.value.problem.hint


@pytest.mark.parametrize("file", sorted(shipped("recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_survive_the_way_to_toml_and_back(file: Path) -> None:
    recipe = load_recipe(file)
    again = parse_recipe(tomllib.loads(to_toml(recipe)))
    assert again == recipe
    assert to_toml(again) == to_toml(recipe)


def test_odd_values_survive_the_way_to_toml_and_back(tmp_path: Path) -> None:
    recipe = parse_recipe(
        table(
            name="odd.name-1",
            data={
                "use": "own:data",
                "root": 'a "quoted"\\path\nline\t\u00e9',
                "normalize": {"mean": [0.1], "std": [1e-7]},
            },
            teacher={"model": {"use": "own:net"}, "prefix": {"old.": "new.", "": "x"}, "lr": 1e16, "ok": False},
            stage=[{"use": "prune", "target": {"macs": 0.1 + 0.2}, "protected": []}],
            gate={"cpu-x86": {"latency": {"p50": {"max": 1e3}}}, "my profile": {}},
        )
    )
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert isinstance(recipe, Recipe)


def test_dates_are_texts_whichever_way_they_come(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('version = 1\nname = "d"\ndata = { use = "own:data", day = 2024-05-01 }\nteacher = {}\n')
    recipe = load_recipe(file, ["data.hour=07:30:00"])
    assert recipe.data.args == {"day": "2024-05-01", "hour": "07:30:00"}
    assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe
