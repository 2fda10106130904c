"""What is decided around a build: flags, machines, and whether an engine's outputs are right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgekd.errors import StageError, UsageError
from edgekd.profile import Profile
from edgekd.runtimes.engine_file import Here
from edgekd.trt.answers import agreement
from edgekd.trt.build import build_engines, check_machine, timing_cache
from edgekd.trt.network import precision_flags

HERE = Here("NVIDIA L4", "8.9", "570.86.15", "10.3.0.30", "12.8")


def profile(**changes) -> Profile:
    table = {"name": "here", "description": "", "device": "gpu", "runtime": "tensorrt", "compute_capability": "8.9"}
    return Profile.model_validate({**table, "tensorrt": {"version": "10.3"}, **changes})


@pytest.mark.parametrize(
    ("name", "typed", "flags"),
    [
        ("int8", False, ["INT8", "FP16"]),
        ("int8-fp16", False, ["INT8", "FP16"]),
        ("fp16", False, ["FP16"]),
        ("fp32", False, []),
        ("int8", True, []),
        ("fp16", True, []),
    ],
)
def test_precision_flags_are_for_weakly_typed_builds_only(name, typed, flags):
    assert precision_flags(name, typed) == flags


def test_the_profiles_machine_is_accepted():
    check_machine(profile(), HERE)
    check_machine(profile(compute_capability=None, tensorrt={"version": "10.3.0.30"}), HERE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensorrt": {"version": "10.30"}}, "has TensorRT 10.30, here is 10.3.0.30"),
        ({"tensorrt": {"version": "8.6"}}, "has TensorRT 8.6"),
        ({"compute_capability": "8.7"}, r"compute capability 8.7, here is NVIDIA L4 \(8.9\)"),
    ],
)
def test_another_tensorrt_or_gpu_than_the_profiles_is_an_error_before_building(changes, words):
    with pytest.raises(StageError, match=words):
        check_machine(profile(**changes), HERE)


def test_a_version_is_compared_by_its_numbers_and_not_by_its_digits():
    with pytest.raises(StageError, match=r"has TensorRT 10\.3, here is 10\.30\.1"):
        check_machine(profile(), replace(HERE, tensorrt="10.30.1"))


def test_timing_caches_are_apart_by_gpu_and_version(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache(HERE) == tmp_path / "edgekd/tensorrt/NVIDIA-L4-8.9-10.3.0.30.timing"


def logits(n=64):
    return np.random.default_rng(0).standard_normal((n, 10)).astype(np.float32)


def test_agreement_is_the_share_of_the_outputs_size():
    expected = logits()
    noise = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32) * 0.01
    found = agreement({"logits": expected + noise}, {"logits": expected}, "fp16", "e")
    by_hand = np.linalg.norm(noise) / np.linalg.norm(expected)
    assert found.difference == pytest.approx(by_hand, rel=1e-3)
    assert found.same_answers == pytest.approx(((expected + noise).argmax(1) == expected.argmax(1)).mean())
    assert found.rows == 64


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x * 0, "zero everywhere"),
        (lambda x: np.where(x > 2, np.nan, x), "NaN or infinite"),
        (lambda x: np.where(x > 2, np.inf, x), "NaN or infinite"),
        (lambda x: x[:, :9], r"is \[64, 9\], expected \[64, 10\]"),
        (lambda x: x[::-1], "what int8 explains"),
        (lambda x: x * 1.2, "what int8 explains"),
    ],
)
def test_outputs_of_a_wrong_engine_are_refused(spoil, words):
    with pytest.raises(StageError, match=words):
        agreement({"logits": spoil(logits())}, {"logits": logits()}, "int8", "e")


def test_a_missing_output_is_refused():
    with pytest.raises(StageError, match="missing"):
        agreement({}, {"logits": logits()}, "fp32", "e")


def test_a_profile_without_tensorrt_builds_nothing(tmp_path):
    with pytest.raises(UsageError, match="says nothing of TensorRT"):
        build_engines([], profile(tensorrt=None), tmp_path, {})
