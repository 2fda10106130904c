"""Components by name: taken names, misspelt ones, arguments by signature, the user's own modules and plugins."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, ValidationError

from edgekd import registry
from edgekd.errors import Problem, UsageError
from edgekd.registry import (
    bind,
    load_plugin,
    names,
    parameters,
    register,
    resolve,
    source_digest,
    summary,
    unregister,
    validation_problems,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in registry.KINDS:
        names(kind)
    before, modules, path = dict(registry._components), set(sys.modules), list(sys.path)
    yield
    registry._components.clear()
    registry._components.update(before)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("edgekd_plugin_", "mine_")):
            del sys.modules[name]


def sample(size: int, p: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Any:
    """What it does.

    More about it.
    """


def problem(caught: pytest.ExceptionInfo[UsageError]) -> Problem:
    (found,) = caught.value.problems
    return found


def test_a_name_is_taken_once() -> None:
    def other() -> None: ...

    register("models", "sample")(sample)
    register("models", "sample")(sample)  # the same again, as when a module is reloaded
    with pytest.raises(UsageError, match="two models are called 'sample'") as caught:
        register("models", "sample")(other)
    assert "test_registry.sample" in problem(caught).what
    assert problem(caught).hint == "rename one of them"
    register("data", "sample")(other)  # another kind, another name space
    unregister("models", "sample")
    unregister("models", "sample")
    assert "sample" not in names("models")


def test_what_edgekd_ships_is_there_and_sorted() -> None:
    assert names("stages") == ["average", "distill", "export", "fuse", "prune", "quantize", "teacher"]
    assert {"ce", "kl", "hint"} <= set(names("objectives"))
    assert names("models") == sorted(names("models"))


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="no models called 'cifar-resnt'") as caught:
        resolve("models", "cifar-resnt", "teacher.model")
    assert problem(caught).where == "teacher.model"
    assert problem(caught).hint == "did you mean 'cifar-resnet'?"


def test_arguments_follow_from_the_signature() -> None:
    register("models", "sample")(sample)
    component, bound, problems = bind("models", "sample", {"size": 3}, "stage[0].model")
    assert (component, bound, problems) == (sample, {"size": 3, "p": 0.5}, [])
    _, bound, problems = bind("models", "sample", {"sise": 3, "p": 2}, "stage[0].model")
    assert bound == {}
    assert sorted(problems, key=lambda p: p.where) == [
        Problem("stage[0].model.p", "input should be less than or equal to 1, got 2"),
        Problem("stage[0].model.sise", "unknown key", "did you mean 'size'?"),
        Problem("stage[0].model.size", "missing: this key is required"),
    ]
    assert summary(sample) == "What it does."


def test_parameters_that_edgekd_fills_in_are_no_keys() -> None:
    register("models", "sample")(sample)
    assert list(parameters(sample, skip=("size",)).model_fields) == ["p"]
    _, _, problems = bind("models", "sample", {"size": 1}, skip=("size",))
    assert [p.what for p in problems] == ["unknown key"]


def test_keyword_arguments_take_anything() -> None:
    def loose(a: int = 1, *rest: int, **more: Any) -> None: ...

    register("models", "loose")(loose)
    assert bind("models", "loose", {"b": [1]})[1] == {"a": 1, "b": [1]}


def test_a_class_is_bound_by_its_constructor_and_a_pydantic_model_is_itself() -> None:
    class Thing:
        def __init__(self, tau: Annotated[float, Field(gt=0)] = 4.0) -> None:
            self.tau = tau

    class Config(BaseModel):
        epochs: int = 1

    assert list(parameters(Thing).model_fields) == ["tau"]
    with pytest.raises(ValidationError):
        parameters(Thing)(tau=0)
    assert parameters(Config) is Config


@pytest.mark.filterwarnings("error")
def test_parameters_may_be_called_like_methods_of_pydantic() -> None:
    def odd(copy: bool = True, schema: str = "", model_config_file: str = "a") -> None: ...

    register("models", "odd")(odd)
    assert bind("models", "odd", {"copy": False})[1] == {"copy": False, "schema": "", "model_config_file": "a"}


def test_a_signature_that_cannot_be_read_is_a_message() -> None:
    def unknown_type(a: NotThere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def underscored(_a: int = 1) -> None: ...

    for component, what in ((unknown_type, "NameError"), (underscored, "leading underscores")):
        with pytest.raises(UsageError, match=r"the signature of .* cannot be read") as caught:
            parameters(component)
        assert what in problem(caught).what
        assert "annotate" in str(problem(caught).hint)


def test_a_family_carries_the_rest_of_the_name() -> None:
    def family(name: str, width: int = 1) -> None: ...

    register("models", "mine:")(family)
    assert resolve("models", "mine:net.a") == (family, {"name": "net.a"})
    assert bind("models", "mine:net.a", {"width": 2})[1] == {"name": "net.a", "width": 2}


def test_functions_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_networks.py").write_text("def small(width: int = 4): return width\ndef smile(): ...\nX = 1\n")
    (tmp_path / "mine_broken.py").write_text("import not_there\n")
    (tmp_path / "mine_leaving.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    component, args = resolve("models", "mine_networks:small")
    assert (component(), args) == (4, {})
    with pytest.raises(UsageError, match="mine_networks has no function 'smal'") as caught:
        resolve("models", "mine_networks:smal", "teacher.model")
    assert problem(caught).hint == "did you mean 'small'?"
    for use, what in [
        ("mine_networks:X", "no function 'X'"),
        ("mine_networks:", "no function ''"),
        ("mine_nothing:f", "cannot import 'mine_nothing': ModuleNotFoundError"),
        ("mine_broken:f", "No module named 'not_there'"),
        ("mine_leaving:f", "cannot import 'mine_leaving': SystemExit: 1"),
        (":f", "cannot import ''"),
        (".rel:f", "cannot import '.rel'"),
    ]:
        with pytest.raises(UsageError) as caught:
            resolve("models", use, "teacher.model")
        assert what in problem(caught).what
        assert problem(caught).where == "teacher.model"
        assert problem(caught).hint


def test_plugins(tmp_path: Path) -> None:
    good = tmp_path / "losses.py"
    good.write_text("from edgekd.registry import register\n@register('objectives', 'mine')\ndef mine(): 'Mine.'\n")
    load_plugin(good)
    load_plugin(good)  # once is enough
    assert summary(resolve("objectives", "mine")[0]) == "Mine."
    twin = tmp_path / "twin.py"
    twin.write_text(good.read_text())
    with pytest.raises(UsageError, match="two objectives are called 'mine'"):
        load_plugin(twin)
    for text, what in (("1 / 0", "ZeroDivisionError"), ("raise SystemExit(3)", "SystemExit"), ("def", "SyntaxError")):
        bad = tmp_path / "bad.py"
        bad.write_text(text)
        for _ in range(2):  # what failed is tried anew, not taken for loaded
            with pytest.raises(UsageError, match=what) as caught:
                load_plugin(bad)
            assert problem(caught).where == "plugins"
    with pytest.raises(UsageError, match="no plugin file") as caught:
        load_plugin(tmp_path / "none.py")
    assert "working directory" in str(problem(caught).hint)


def test_installed_plugins_are_found_and_broken_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "edgekd.models": [importlib.metadata.EntryPoint("installed", "textwrap:dedent", "edgekd.models")],
        "edgekd.tasks": [importlib.metadata.EntryPoint("broken", "not_there:f", "edgekd.tasks")],
    }
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries.get(group, []))
    load = registry._load_kind.__wrapped__
    load("models")
    assert "installed" in names("models")
    with pytest.raises(UsageError, match="the installed plugin not_there:f failed: ModuleNotFoundError") as caught:
        load("tasks")
    assert problem(caught).where == "edgekd.tasks"
    assert problem(caught).hint == "update or uninstall it"


def test_digests_follow_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "mine_source.py"
    source.write_text("def f(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = source_digest("mine_source:f")
    assert first == hashlib.sha256(source.read_bytes()).hexdigest()
    source.write_text("def f(): return 2\n")
    assert source_digest("mine_source:f") != first
    for use in ("cifar-resnet", "mine_nothing:f", "mine_no.thing:f", ":f", "sys:exit", ".rel:f", "__main__:f"):
        assert source_digest(use) is None or use == "__main__:f"


class Inner(BaseModel):
    model_config = {"extra": "forbid"}
    share: float = Field(0.5, description="what remains")


class Outer(BaseModel):
    model_config = {"extra": "forbid"}
    inner: list[Inner] = []
    either: str | dict[str, str] = ""
    maybe: Inner | None = None


def problems_of(**table: Any) -> list[Problem]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(table)
    return validation_problems(caught.value, "stage[1]", Outer)


def test_paths_and_hints_of_validation() -> None:
    assert problems_of(inner=[{}, {"shar": 1}]) == [
        Problem("stage[1].inner[1].shar", "unknown key", "did you mean 'share'?")
    ]
    (found,) = problems_of(inner=[{"share": "much"}])
    assert (found.where, found.hint) == ("stage[1].inner[0].share", "what remains")
    assert found.what.startswith("input should be a valid number")
    assert found.what.endswith("got 'much'")
    assert problems_of(maybe=3) == [Problem("stage[1].maybe", "must be a table, got 3")]
    assert problems_of(**{"in-ner": 1, "str": 2})[0].where == "stage[1].in-ner"
    assert problems_of(str=2)[0].where == "stage[1].str"


def test_the_members_of_a_union_are_one_problem_without_their_names_in_the_path() -> None:
    (found,) = problems_of(either=3)
    assert found.where == "stage[1].either"
    assert found.what == "input should be a valid string, or must be a table, got 3"


def test_long_values_are_cut() -> None:
    (found,) = problems_of(maybe="x" * 500)
    assert len(found.what) < 120
    assert found.what.endswith("...")
