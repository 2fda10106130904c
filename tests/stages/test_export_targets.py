"""Which files the stage `export` is to write, and what is told before anything runs."""

from __future__ import annotations

import pytest
from tiny_stages import made_recipe

from edgekd.data import Dataset
from edgekd.profile import Profile, load_profile
from edgekd.recipe import Component
from edgekd.stages import Context, Export
from edgekd.stages.teaching import Teaching

ORIN = load_profile("jetson-orin-nano-8gb")


def resolved(stage: Export, *profiles: Profile) -> Export:
    return stage.resolved(profiles, Teaching([], Component(use="frozen")))


def tensorrt(**changes: object) -> Profile:
    assert ORIN.tensorrt is not None
    return ORIN.model_copy(update={"tensorrt": ORIN.tensorrt.model_copy(update=changes)})


def test_targets_are_what_the_profiles_run_unless_the_recipe_says_so(cpu: Profile) -> None:
    assert resolved(Export(), cpu).targets == ["onnx"]
    assert resolved(Export(), cpu, ORIN).targets == ["onnx", "trt"]
    assert resolved(Export(targets=["onnx"]), ORIN).targets == ["onnx"]
    # model.onnx is always there: one set of files, and one key, however it is asked for.
    assert resolved(Export(targets=["trt"]), cpu).targets == ["onnx", "trt"]


def test_an_export_for_another_tensorrt_is_made_anew_and_one_for_none_is_not(cpu: Profile) -> None:
    versions = [resolved(Export(), tensorrt(version=version)).inputs() for version in ("8.6", "10.3", "11.4")]
    assert len({str(found) for found in versions}) == 3
    assert resolved(Export(), cpu).inputs() == {}
    assert resolved(Export(targets=["onnx"]), ORIN).inputs() == {}
    assert resolved(Export(), tensorrt(dla=0, dla_cores=1)).inputs() != resolved(Export(), ORIN).inputs()


@pytest.mark.parametrize(
    ("scheme", "fits"), [("trt-s8s8", True), (None, True), ("x86-u8s8", False), ("arm-s8s8", False)]
)
def test_integers_of_another_runtime_are_told_before_anything_runs(
    dataset: Dataset, scheme: str | None, fits: bool
) -> None:
    context = Context(made_recipe(), dataset, [ORIN], [], None, "stage[1]", {}, scheme=scheme)
    _, problems = resolved(Export(), ORIN).check(context)
    if fits:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.where == "stage[1].targets"
        assert f"trt-s8s8, the network has {scheme}" in problem.what
        assert 'scheme = "trt-s8s8"' in str(problem.hint)
    assert resolved(Export(targets=["onnx"]), ORIN).check(context)[1] == []


def test_a_dla_wants_a_fixed_batch(dataset: Dataset) -> None:
    profile = tensorrt(dla=0, dla_cores=1)
    context = Context(made_recipe(), dataset, [profile], [], None, "stage[1]", {})
    (problem,) = resolved(Export(), profile).check(context)[1]
    assert "static shapes only" in problem.what
    assert resolved(Export(dynamic_batch=False), profile).check(context)[1] == []
