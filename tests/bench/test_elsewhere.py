"""Which machine is the device of a profile."""

from __future__ import annotations

from typing import Any

import pytest

from edgekd.bench import INSTRUCTION_SETS, environment, kernels_differ, not_here
from edgekd.profile import load_profile, profile_names
from edgekd.quant import scheme_named
from edgekd.runtimes import RuntimeStatus


def machine(name: str, *instructions: str) -> dict[str, Any]:
    return {"machine": name, "instruction_sets": list(instructions)}


ZEN3, XEON = machine("x86_64", "avx2"), machine("x86_64", "avx2", "avx512f", "avx512_vnni")
WINDOWS, PI, MAC = machine("AMD64", "avx2"), machine("aarch64", "asimd"), machine("arm64", "asimd", "asimddp")


@pytest.mark.parametrize(
    ("profile", "here", "why"),
    [
        ("cpu-x86", ZEN3, None),
        ("cpu-x86", WINDOWS, None),
        ("cpu-x86", MAC, "cpu-x86 is x86-64, this machine is aarch64"),
        ("cpu-arm64", PI, None),
        ("cpu-arm64", MAC, None),
        ("cpu-arm64", XEON, "cpu-arm64 is aarch64, this machine is x86-64"),
        ("cpu-arm64", machine("riscv64"), "cpu-arm64 is aarch64, this machine is riscv64"),
        ("cpu-x86-avx512-vnni", XEON, None),
        ("cpu-x86-avx512-vnni", ZEN3, "cpu-x86-avx512-vnni has avx512_vnni, this machine has not"),
        ("cpu-x86-avx2", ZEN3, None),
        ("cpu-x86-avx2", XEON, None),  # it runs there, but see below
    ],
)
def test_a_machine_is_the_device_or_says_why_not(profile: str, here: dict[str, Any], why: str | None) -> None:
    assert not_here(load_profile(profile), here) == why


def test_faster_instructions_than_the_devices_are_a_warning() -> None:
    avx2 = load_profile("cpu-x86-avx2")
    assert kernels_differ(avx2, ZEN3) is None
    assert str(kernels_differ(avx2, XEON)).startswith("this machine has avx512_vnni and the device of cpu-x86-avx2")
    assert kernels_differ(load_profile("cpu-x86"), XEON) is None


def test_a_runtime_that_is_not_there() -> None:
    profile = load_profile("cpu-x86").model_copy(update={"runtime": "tensorrt"})

    def probed(available: bool) -> list[RuntimeStatus]:
        return [RuntimeStatus(name="tensorrt", available=available, why=None if available else "not installed")]

    expected = "cpu-x86 runs on tensorrt, which does not run here: not installed"
    assert not_here(profile, ZEN3, lambda: probed(False)) == expected
    assert not_here(profile, ZEN3, lambda: probed(True)) is None
    assert not_here(profile, ZEN3, list) is None  # a runtime of somebody else's: opening a file will tell


def test_a_profile_of_ones_own_may_leave_its_device_open() -> None:
    profile = load_profile("cpu-x86").model_copy(update={"architecture": None})
    assert not_here(profile, PI) is None
    assert not_here(profile, environment()) is None


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_name_what_there_is(name: str) -> None:
    profile = load_profile(name)
    assert scheme_named(profile.scheme, name).name == profile.scheme
    assert {*profile.requires, *profile.lacks} <= set(INSTRUCTION_SETS)
    assert not set(profile.requires) & set(profile.lacks)
    assert profile.architecture is not None or profile.device == "gpu"  # cards stand in both
