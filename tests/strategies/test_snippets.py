"""What `edgekd show NAME` gives as an example runs, for every objective, teacher source and rule there is."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import torch
from tiny_strategies import RESNET, finite, recipe, run, weights

from edgekd.inspect import describe
from edgekd.models import build
from edgekd.registry import names

EVERY = [(kind, name) for kind in ("objectives", "teachers", "rules") for name in names(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[name for _, name in EVERY])
def test_snippet(kind: str, name: str, teachers: dict[str, dict[str, Any]]) -> None:
    stage = tomllib.loads(describe(name)["snippet"])
    assert _named(stage, kind, name)
    several = [teachers["resnet"], teachers["mobile"]][: len(stage.get("teacher", ["teacher"]))]
    own = {} if {"model", "students"} & stage.keys() else {"model": RESNET}
    made = run(recipe(several, {"use": "distill", "epochs": 1, "lr": 0.01, **own, **stage}, data={"every": 10}))
    students = [n for n in made.artifacts if n.startswith("distill")]
    assert students
    for student in students:
        [record] = made.history(student)
        assert finite([record])
        for objective in stage["objectives"]:
            use = objective if isinstance(objective, str) else objective["use"]
            assert any(value > 0 for part, value in record.items() if part.startswith(f"loss.{use}")), use
        torch.manual_seed(0)
        fresh = build(made[student].manifest.model).state_dict()
        assert any(not torch.equal(value, fresh[key]) for key, value in weights(made[student]).items())


def _named(stage: dict[str, Any], kind: str, name: str) -> bool:
    """Whether the snippet is about what it is to show."""
    source = stage.get("source", "frozen")
    if kind == "teachers":
        return name == (source if isinstance(source, str) else source["use"])
    objectives = [{"use": o} if isinstance(o, str) else o for o in stage["objectives"]]
    if kind == "objectives":
        return name in [o["use"] for o in objectives]
    return name in [v["use"] for o in objectives for v in o.values() if isinstance(v, dict)]
