"""What of a run is measured, and under which names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.pipeline import plan
from edgekd.recipe import parse_recipe
from edgekd.runs import measured_names

NETWORK = {"use": "cifar-resnet", "depth": 8, "width": 4}
FLEET = {"use": "distill", "epochs": 1, "students": [{"name": "a", "model": NETWORK}, {"name": "b", "model": NETWORK}]}
ONE = {"use": "distill", "epochs": 1, "model": NETWORK}


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ([ONE], ["teacher", "distill"]),
        ([ONE, "export"], ["teacher", "distill"]),
        ([ONE, {"use": "prune", "target": {"macs": 0.8}}, "export"], ["teacher", "distill", "prune"]),
        ([FLEET, "export"], ["teacher", "distill.b", "distill.a"]),  # the first student goes on: it is the final one
        ([FLEET, {"use": "export", "after": "distill.b"}], ["teacher", "distill.a", "distill.b"]),
        ([FLEET, "average", "export"], ["teacher", "distill.a", "distill.b", "average"]),
        ([FLEET, {"use": "export", "after": "distill.b"}, {"use": "export", "after": "distill.a"}],
         ["teacher", "distill.b", "distill.a"]),
    ],
)  # fmt: skip
def test_an_export_is_measured_as_the_stage_it_wrote_out(stages: list[Any], names: list[str], tmp_path: Path) -> None:
    recipe = {
        "version": 1,
        "name": "fleet",
        "data": {"use": "digits", "size": 16},
        "teacher": {"model": NETWORK, "epochs": 1},
        "stage": stages,
    }
    planned = plan(parse_recipe(recipe), tmp_path)
    measured = measured_names(planned)
    assert [measured[step.name] for step in planned.steps if step.name in measured] == names
    for name, called in measured.items():
        assert name == called or planned.step(name).parents["source"] == called
