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


H100 = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
RTX, L40 = (
    {"name": "NVIDIA GeForce RTX 4090", "compute_capability": "8.9"},
    {"name": "NVIDIA L40", "compute_capability": "8.9"},
)
LAPTOP = {"name": "NVIDIA GeForce RTX 4090 Laptop GPU", "compute_capability": "8.9"}
OLD_DRIVER = {"name": "Tesla T4", "compute_capability": None}
ORIN = machine("aarch64", "asimd", "asimddp") | {
    "jetson": "R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64",
    "board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    "compute_capability": "8.7",
    "power_mode": "MAXN_SUPER",
}


@pytest.mark.parametrize(
    ("profile", "here", "why"),
    [
        ("gpu-h100", {**XEON, "gpus": [H100]}, None),
        ("gpu-h100", XEON, "gpu-h100 is a GPU, this machine has none that nvidia-smi shows"),
        (
            "gpu-t4",
            {**XEON, "gpus": [H100]},
            "gpu-t4 has compute capability 7.5, NVIDIA H100 80GB HBM3 here has 9.0",
        ),
        ("gpu-rtx", {**XEON, "gpus": [RTX]}, None),
        ("gpu-l4", {**XEON, "gpus": [RTX]}, "gpu-l4 is an NVIDIA L4, this machine has NVIDIA GeForce RTX 4090"),
        ("gpu-l4", {**XEON, "gpus": [L40]}, "gpu-l4 is an NVIDIA L4, this machine has NVIDIA L40"),
        (
            "gpu-rtx",
            {**XEON, "gpus": [LAPTOP]},
            "gpu-rtx is an NVIDIA RTX 4090, this machine has NVIDIA GeForce RTX 4090 Laptop GPU",
        ),
        ("gpu-t4", {**XEON, "gpus": [OLD_DRIVER]}, None),
        ("gpu-l4", {**XEON, "gpus": [OLD_DRIVER]}, "gpu-l4 is an NVIDIA L4, this machine has Tesla T4"),
        ("jetson-orin-nano-8gb-super", ORIN, None),
        ("jetson-orin-nano-8gb-super", XEON, "jetson-orin-nano-8gb-super is aarch64, this machine is x86-64"),
        ("jetson-orin-nano-8gb-super", PI, "jetson-orin-nano-8gb-super is a Jetson, this machine is none"),
        (
            "jetson-orin-nano-8gb",
            ORIN,
            "jetson-orin-nano-8gb is in power mode 15W, this board in MAXN_SUPER: see `sudo nvpmodel -p`",
        ),
        (
            "jetson-agx-orin-64gb",
            ORIN,
            "jetson-agx-orin-64gb is a Jetson AGX Orin, this machine is "
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        ),
        ("gpu-h100", ORIN, "gpu-h100 is a GPU, this machine has none that nvidia-smi shows"),
        ("cpu-arm64", ORIN, None),
    ],
)
def test_another_gpu_or_jetson_is_not_the_device(profile: str, here: dict[str, Any], why: str | None) -> None:
    installed = [RuntimeStatus(name="tensorrt", available=True)]
    assert not_here(load_profile(profile), here, lambda: installed) == why


def test_a_jetson_of_another_chip_that_has_no_name() -> None:
    thor = {**ORIN, "board": "", "compute_capability": "11.0"}
    expected = "jetson-orin-nano-8gb-super has compute capability 8.7, the board here has 11.0"
    assert not_here(load_profile("jetson-orin-nano-8gb-super"), thor, list) == expected


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
