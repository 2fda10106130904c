"""What `edgekd show` says of a component: its types in words, its source, and a snippet that a recipe takes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from edgekd.inspect import describe
from edgekd.objectives.feature import Tap, Taps
from edgekd.pipeline import plan
from edgekd.recipe import Component, ComponentField, parse_recipe
from edgekd.registry import names, parameters, register, resolve, summary, unregister
from edgekd.signature import documented, kind_of, parameter_rows

PARTS = [(kind, name) for kind in ("objectives", "teachers", "rules") for name in names(kind)]
TEACHER = {"model": {"use": "cifar-resnet", "depth": 8}, "epochs": 1}
RECIPE = {
    "version": 1,
    "name": "snippet",
    "data": {"use": "digits", "size": 16},
    "teacher": [TEACHER, TEACHER],
}
STAGE = {"use": "distill", "model": {"use": "cifar-resnet", "depth": 8}, "teacher": "teacher", "epochs": 1}


class Target(BaseModel):
    """Two keys."""

    macs: float
    parameters: float


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (float, "float"),
        (Annotated[float, Field(gt=0)], "float > 0"),
        (Annotated[float, Field(ge=0, lt=1)], "float ≥ 0 and < 1"),
        (Annotated[int | None, Field(gt=0)], "int > 0"),
        (list[Annotated[float, Field(ge=0.5)]] | None, "list of float ≥ 0.5"),
        (Literal["a", "b", 3], '"a", "b" or 3'),
        (float | Component, "float or { use = ... }"),
        (ComponentField, "{ use = ... } or str"),
        (Tap | None, "str"),
        (Taps, "list of str or str"),
        (list[Any], "list"),
        (dict[str, str] | str, "table or str"),
        (Target, "{ macs, parameters }"),
        (Path | None, "path"),
    ],
)
def test_types_in_words(annotation: Any, text: str) -> None:
    assert kind_of(annotation) == text


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_of_a_distillation_is_described(kind: str, name: str) -> None:
    component, _ = resolve(kind, name)
    line = summary(component)
    assert 20 <= len(line) <= 100
    assert line.endswith(".")
    assert "et al" not in line  # cut in the middle of a name
    shown = describe(name)
    assert re.search(r"\b(19|20)\d\d\b", shown["source"])
    assert shown["module"].startswith(f"edgekd.{'objectives' if kind == 'rules' else kind}.")
    text = shown["text"]
    for row in shown["parameters"]:
        assert f"  {row}\n" in text
        assert not re.search(r"Optional|Annotated|Union|typing|NoneType|FieldInfo", row)
        assert row.split()[0] not in ("network", "networks", "students", "taps", "self")
    assert shown["parameters"] or "no parameters" in text
    assert ("as every objective:" in text) == (kind == "objectives")
    assert all(f"  {part}" in text for part in shown["snippet"].splitlines())


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_snippet_is_planned(kind: str, name: str, tmp_path: Path) -> None:
    snippet = tomllib.loads(describe(name)["snippet"])
    assert f"'{name}'" in repr(snippet)
    base = {key: value for key, value in STAGE.items() if not (key == "model" and "students" in snippet)}
    planned = plan(parse_recipe({**RECIPE, "stage": [{**base, **snippet}]}), tmp_path)
    assert planned.steps[-1].spec is not None


def test_a_component_without_a_snippet_gets_one() -> None:
    def mine(student: Tap, power: Annotated[float, Field(gt=1, examples=[2.0])], tau: float = 1.0) -> None:
        """Mine, which ends
        here. And goes on.

        Source: Someone 2020,
        arXiv:1234.56789.
        """

    register("objectives", "mine")(mine)
    try:
        shown = describe("mine")
        assert shown["snippet"] == 'objectives = ["ce", { use = "mine", student = "layer2", power = 2.0 }]'
        assert shown["source"] == "Someone 2020, arXiv:1234.56789"
        assert "Source:" not in documented(mine)[0]
        assert summary(mine) == "Mine, which ends here."
        rows = parameter_rows(parameters(mine).model_fields)
        optional = parameter_rows(parameters(resolve("objectives", "crd")[0]).model_fields)
        assert optional[0] == "student (str, optional): module path, such as layer2"
        assert rows[1:] == ["power (float > 1, required)", "tau (float, default 1.0)"]
    finally:
        unregister("objectives", "mine")
