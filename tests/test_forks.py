"""Plans for several quantization schemes: which steps there are, what they build on, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import Problem, RecipeError, UsageError
from edgekd.pipeline import Plan, plan
from edgekd.recipe import parse_recipe
from edgekd.runs import measured_names

NETWORK = {"use": "cifar-resnet", "depth": 8, "width": 4}
DISTILL = {"use": "distill", "epochs": 1, "model": NETWORK}
FLEET = {"use": "distill", "epochs": 1, "students": [{"name": "a", "model": NETWORK}, {"name": "b", "model": NETWORK}]}
BOTH = ["cpu-x86", "cpu-arm64"]


def planned(*stages: Any, profiles: list[str] | None = None) -> Plan:
    recipe = {
        "version": 1,
        "name": "forks",
        "data": {"use": "digits", "size": 16},
        "profiles": profiles or BOTH,
        "teacher": {"model": NETWORK, "epochs": 1},
        "stage": list(stages),
    }
    return plan(parse_recipe(recipe), Path("nowhere"))


def quantize(*schemes: str, **more: Any) -> dict[str, Any]:
    return {"use": "quantize", "scheme": list(schemes), "heal": {"epochs": 0}, **more}


def problems_of(*stages: Any, profiles: list[str] | None = None) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        planned(*stages, profiles=profiles)
    return list(caught.value.problems)


def test_profiles_that_want_different_schemes_fork_quantize_and_export() -> None:
    found = planned(DISTILL, "quantize", "export")
    names = [s.name for s in found.steps]
    assert names == ["teacher", "distill", "quantize.x86-u8s8", "quantize.arm-s8s8", "export.x86-u8s8",
                     "export.arm-s8s8"]  # fmt: skip
    parents = {s.name: s.parents.get("source") for s in found.steps}
    assert parents["quantize.x86-u8s8"] == parents["quantize.arm-s8s8"] == "distill"
    assert parents["export.arm-s8s8"] == "quantize.arm-s8s8"
    assert [s.config["scheme"] for s in found.called("quantize")] == ["x86-u8s8", "arm-s8s8"]
    assert [[p.name for p in s.profiles] for s in found.called("export")] == [["cpu-x86"], ["cpu-arm64"]]
    assert [s.directory.name for s in found.called("export")] == [
        f"0{4 + i}-{s.name}-{s.key[:12]}" for i, s in enumerate(found.called("export"))
    ]
    assert len({s.key for s in found.steps}) == 6
    assert list(measured_names(found).values()) == names[:4]


def test_one_scheme_keeps_names_and_keys() -> None:
    one = planned(DISTILL, "quantize", "export", profiles=["cpu-x86"])
    assert [s.name for s in one.steps] == ["teacher", "distill", "quantize", "export"]
    listed = planned(DISTILL, {"use": "quantize", "scheme": ["x86-u8s8"]}, "export", profiles=["cpu-x86"])
    forked = planned(DISTILL, "quantize", "export")
    assert [s.key for s in listed.steps] == [s.key for s in one.steps]
    assert forked.step("export.x86-u8s8").key == one.step("export").key  # the same work, whatever stands beside it


def test_profiles_of_one_scheme_share_its_step_and_its_lowest_opset(tmp_path: Path) -> None:
    for name, base in (("new", "cpu-x86"), ("arm", "cpu-arm64")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{base}"\nopset = {20 if name == "new" else 22}\n')
    profiles = ["cpu-x86", str(tmp_path / "new.toml"), str(tmp_path / "arm.toml")]
    found = planned(DISTILL, "quantize", "export", profiles=profiles)
    assert [[p.name for p in s.profiles] for s in found.called("quantize")] == [["cpu-x86", "new"], ["arm"]]
    assert [s.config["opset"] for s in found.called("export")] == [18, 22]


def test_a_scheme_that_no_profile_wants_stands_for_itself() -> None:
    found = planned(DISTILL, quantize("x86-u8s8", "trt-s8s8"), "export", profiles=["cpu-x86"])
    assert [[p.name for p in s.profiles] for s in found.called("quantize")] == [["cpu-x86"], []]
    assert found.step("export.trt-s8s8").config["opset"] == 18


def test_a_stage_may_go_on_from_one_step_of_a_fork_or_from_all() -> None:
    one = planned(DISTILL, "quantize", {"use": "export", "after": "quantize.arm-s8s8"})
    assert [(s.name, s.parents["source"], [p.name for p in s.profiles]) for s in one.steps[4:]] == [
        ("export", "quantize.arm-s8s8", ["cpu-arm64"])
    ]
    assert measured_names(one)["export"] == "quantize.arm-s8s8"
    later = planned(DISTILL, "quantize", {"use": "export", "after": "distill"}, {"use": "export", "after": "quantize"})
    assert [s.name for s in later.steps[4:]] == ["export", "export-2.x86-u8s8", "export-2.arm-s8s8"]
    alone = planned(DISTILL, quantize("arm-s8s8"), {"use": "export", "after": "quantize"})
    assert alone.step("export").parents["source"] == "quantize"


def test_a_fork_goes_on_from_the_first_student_of_a_fleet_or_from_the_one_named() -> None:
    first = planned(FLEET, "quantize", "export")
    assert [s.parents["source"] for s in first.called("quantize")] == ["distill.a", "distill.a"]
    named = planned(FLEET, {"use": "quantize", "after": "distill.b"}, "export")
    assert [s.parents["source"] for s in named.called("quantize")] == ["distill.b", "distill.b"]
    (problem,) = problems_of(FLEET, {"use": "quantize", "after": "distill"})
    assert (problem.where, problem.what) == ("stage[1].after", "no earlier stage and no artifact 'distill'")
    assert "distill.b" in str(problem.hint)


def test_branches_share_the_cache_of_the_teachers_answers() -> None:
    heal = {"epochs": 1, "source": "cached", "objectives": ["kl"]}
    found = planned(DISTILL, {"use": "quantize", "heal": heal})
    one, other = (s.cache for s in found.called("quantize"))
    assert one is not None
    assert other is not None
    assert one.directory == other.directory


def test_a_stage_is_all_its_steps() -> None:
    found = planned(DISTILL, "quantize", "export")
    assert [s.name for s in found.called("quantize.arm-s8s8")] == ["quantize.arm-s8s8"]
    assert len(found.called("quantize")) == 2
    with pytest.raises(UsageError, match="no stage 'quantise'") as caught:
        found.called("quantise")
    assert caught.value.problem.hint == "did you mean 'quantize'?"


@pytest.mark.parametrize(
    ("schemes", "what", "hint"),
    [
        (["x86-u8s8", "trt-s8s9"], "no quantization scheme 'trt-s8s9'", "did you mean 'trt-s8s8'?"),
        (["x86-u8s8", "x86-u8s8"], "names 'x86-u8s8' twice, got ['x86-u8s8', 'x86-u8s8']", None),
        (["x86-u8s8", "auto"], "auto stands alone: it is what the profiles want, got ['x86-u8s8', 'auto']", None),
        (["arm-s8s8", "trt-s8s8"], "none of arm-s8s8, trt-s8s8 is what profile cpu-x86 wants: x86-u8s8",
         "add 'x86-u8s8', or name one scheme for all profiles"),
    ],
)  # fmt: skip
def test_schemes_that_cannot_be(schemes: list[str], what: str, hint: str | None) -> None:
    (problem,) = problems_of(DISTILL, quantize(*schemes), "export", profiles=["cpu-x86"])
    assert (problem.where, problem.what) == ("stage[1].scheme", what)
    if hint is not None:
        assert problem.hint == hint


def test_no_scheme_at_all() -> None:
    (problem,) = problems_of(DISTILL, quantize(), "export")
    assert problem.where == "stage[1].scheme"
    assert "at least 1 item" in problem.what


def test_what_is_wrong_with_every_branch_is_told_once() -> None:
    (problem,) = problems_of(DISTILL, {"use": "quantize", "heal": {"epochs": 1, "objectives": ["cee"]}}, "export")
    assert (problem.where, problem.hint) == ("stage[1].heal.objectives[0]", "did you mean 'ce'?")


def test_what_needs_a_float_network_cannot_go_on_from_a_fork() -> None:
    prune = {"use": "prune", "target": {"macs": 0.8}, "heal": {"epochs": 0}}
    (problem,) = problems_of(DISTILL, "quantize", prune)
    assert (problem.where, problem.what) == ("stage[2]", "prune cannot follow quantize")
    teaching = {**DISTILL, "teacher": "quantize.arm-s8s8", "after": "distill"}
    (problem,) = problems_of(DISTILL, "quantize", teaching)
    assert (problem.where, problem.what) == ("stage[2].teacher", "quantize.arm-s8s8 holds no float network")
    (problem,) = problems_of(DISTILL, "quantize", {"use": "export", "after": "quantize.arm-s8s9"})
    assert (problem.where, problem.hint) == ("stage[2].after", "did you mean 'quantize.arm-s8s8'?")
