"""A branch of a fork whose network stayed float is still that branch, and its network a network like others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.bench import Interval
from edgekd.errors import RecipeError
from edgekd.pipeline import Plan, plan, run_steps
from edgekd.quant.mixed import Measured
from edgekd.recipe import parse_recipe
from edgekd.runs import find_source
from edgekd.stages import mixing, paying

NETWORK = {"use": "cifar-resnet", "depth": 8, "width": 4}
SCHEMES = ["x86-u8s8", "x86-u8s7"]


def recipe(*stages: Any) -> Any:
    raw = {
        "version": 1,
        "name": "forks",
        "data": {"use": "digits", "size": 8, "channels": 1, "batch": 128},
        "profiles": ["cpu-x86", "cpu-x86-avx2"],
        "teacher": {"model": NETWORK, "epochs": 1},
        "stage": list(stages),
    }
    return parse_recipe(raw)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    speedup = Interval(value=0.8, low=0.78, high=0.82)
    slower = Measured(profile="cpu-x86", float_ms=1.0, own_ms=1.25, speedup=speedup)
    accuracies = iter([0.9, 0.8] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paying, "measuring_profile", lambda profiles: (profiles[0], ""))
        patch.setattr(paying, "compared", lambda *files: slower)
        patch.setattr(paying, "_export", lambda pricing, module, path: path)
        patch.setattr(mixing, "judged", lambda workspace, network: (next(accuracies), 100, "validation"))
        stage = {"use": "quantize", "scheme": SCHEMES, "calibration": 64, "heal": {"epochs": 0}}
        found = plan(recipe(stage, "export"), tmp_path_factory.mktemp("kept"))
        run_steps(found, lambda event: None)
    return found


def test_exporting_a_branch_that_stayed_float_finds_the_runs_own_export(run: Plan) -> None:
    for scheme in SCHEMES:
        source = find_source(f"{run.directory}:quantize.{scheme}")
        assert source.artifact.manifest.quantization is None
        again = plan(recipe("export"), run.directory, source=source.artifact, teacher=source.teacher, data=run.data)
        [step] = again.steps
        assert step.name == f"export.{scheme}"
        assert step.directory == run.step(f"export.{scheme}").directory
        assert step.done


def test_a_network_that_stayed_float_may_teach(run: Plan) -> None:
    kept = str(run.step("quantize.x86-u8s8").directory)
    distill = {"use": "distill", "epochs": 1, "model": NETWORK, "teacher": kept}
    found = plan(recipe(distill), Path("nowhere"), data=run.data)
    teacher = found.step("distill").parents["teacher"]
    assert not isinstance(teacher, str)
    assert teacher.key == run.step("quantize.x86-u8s8").key
    file = str(run.step("export.x86-u8s8").directory)
    with pytest.raises(RecipeError) as caught:
        plan(recipe({**distill, "teacher": file}), Path("nowhere"), data=run.data)
    assert "holds no float network" in caught.value.problems[0].what
