"""A profile for a machine, from what real boards and drivers say of themselves."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from edgekd.bench import environment, not_here
from edgekd.bench.accelerators import accelerators, gpus, with_capability
from edgekd.detect import Detected, detect, l4t_of, tensorrt_of
from edgekd.errors import UsageError
from edgekd.profile import Profile, load_profile

#: /etc/nv_tegra_release of an Orin Nano Super kit ("Jetson LNN", September 2026), an AGX Orin kit (a vehicle's hardware
#: survey, August 2026), a Thor kit (first lines in a test of a public doctor command), as they were published.
NANO_RELEASE = """\
# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, DATE: Thu Sep 18 22:54:44 UTC 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""
AGX_RELEASE = """\
# R36 (release), REVISION: 5.0, GCID: 43688277, BOARD: generic, EABI: aarch64, DATE: Fri Jan 16 03:50:45 UTC 2026
# KERNEL_VARIANT: oot
"""
THOR_RELEASE = """\
# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64, DATE: Thu Sep 25 22:47:11 UTC 2025
# KERNEL_VARIANT: oot
"""
#: dpkg -l of an Orin Nano Super kit: "Jetson Orin Baseline Summary", 19 April 2026, L4T 36.4.7.
NANO_DPKG = """\
ii  libcudnn9-cuda-12                                        9.3.0.75-1                                       arm64        cuDNN runtime libraries for CUDA 12.6
ii  libnvinfer-bin                                           10.3.0.30-1+cuda12.5                             arm64        TensorRT binaries
ii  libnvinfer-dispatch10                                    10.3.0.30-1+cuda12.5                             arm64        TensorRT dispatch runtime library
ii  libnvinfer10                                             10.3.0.30-1+cuda12.5                             arm64        TensorRT runtime libraries
ii  libnvonnxparsers10                                       10.3.0.30-1+cuda12.5                             arm64        TensorRT ONNX libraries
ii  nv-tensorrt-local-tegra-repo-ubuntu2204-10.3.0-cuda-12.5 1.0-1                                            arm64        nv-tensorrt-local-tegra repository configuration files
ii  nvidia-l4t-cuda                                          36.4.7-20250918154033                            arm64        NVIDIA CUDA Package
ii  tensorrt                                                 10.3.0.30-1+cuda12.5                             arm64        Meta package for TensorRT
"""  # noqa: E501
#: What `dpkg-query -W -f '${Package} ${Version}\n'` makes of a Thor's package (10.13.3.9-1+cuda13.0 on JetPack 7.1).
THOR_DPKG = "libnvinfer10 10.13.3.9-1+cuda13.0\n"
#: The same file's lscpu and free; model and mode are from its hostnamectl and `nvpmodel -q` ("NV Power Mode: 25W\n1").
NANO = {
    "cpu": "Cortex-A78AE",
    "instruction_sets": ["asimd", "asimddp"],
    "cores": 6,
    "memory_mb": 7849,
    "machine": "aarch64",
    "board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    "jetson": NANO_RELEASE.splitlines()[0].lstrip("# "),
    "power_mode": "25W",
    "compute_capability": "8.7",
}
AGX = NANO | {
    "cores": 12,
    "memory_mb": 65890,
    "board": "NVIDIA Jetson AGX Orin Developer Kit",
    "jetson": AGX_RELEASE.splitlines()[0].lstrip("# "),
    "power_mode": "MAXN",
}
THOR = NANO | {
    "board": "NVIDIA Jetson AGX Thor Developer Kit",
    "jetson": THOR_RELEASE.splitlines()[0].lstrip("# "),
    "power_mode": "MAXN",
    "compute_capability": "11.0",
}
XEON = {
    "cpu": "Intel(R) Xeon(R) Processor",
    "instruction_sets": ["avx2", "avx512f", "avx512_vnni"],
    "cores": 2,
    "memory_mb": 25277,
    "machine": "x86_64",
}


def written(found: Detected, tmp_path: Path) -> Profile:
    file = tmp_path / "mine.toml"
    file.write_text(found.toml())
    profile = load_profile(str(file))
    assert all(f"# {note}" in file.read_text() for note in found.notes)
    return profile


def test_files_of_real_boards_are_read() -> None:
    releases = (NANO_RELEASE, AGX_RELEASE, THOR_RELEASE)
    assert [l4t_of(text) for text in releases] == ["36.4.7", "36.5.0", "38.2.2"]
    assert l4t_of("") is None
    assert (tensorrt_of(NANO_DPKG), tensorrt_of(THOR_DPKG)) == ("10.3.0", "10.13.3")
    assert tensorrt_of("ii  libnvinfer8:arm64  8.6.2.3-1+cuda12.2  arm64  TensorRT runtime libraries\n") == "8.6.2"
    assert tensorrt_of("\n".join(NANO_DPKG.splitlines()[5:7])) is None  # the repository's name is no version


def test_a_board_says_its_name_and_its_chip(tmp_path: Path) -> None:
    tree, etc = tmp_path / "proc" / "device-tree", tmp_path / "etc"
    tree.mkdir(parents=True)
    etc.mkdir()
    (tree / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    (tree / "compatible").write_bytes(b"nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0")
    assert accelerators(tmp_path) == {"board": "NVIDIA Jetson AGX Orin Developer Kit"}  # no L4T: another system on it
    (etc / "nv_tegra_release").write_text(AGX_RELEASE)
    found = accelerators(tmp_path)
    assert found["compute_capability"] == "8.7"
    assert l4t_of(found["jetson"]) == "36.5.0"


def test_a_card_says_its_capability_and_memory_if_the_driver_does() -> None:
    smi = "NVIDIA H100 80GB HBM3, 570.86.15, 345, 1980, 2619, 34, 700.00, Enabled, 0x0000000000000001\n"
    (told,) = with_capability(gpus(smi), "9.0, 81559\n")
    assert (told["name"], told["compute_capability"], told["memory_mb"]) == ("NVIDIA H100 80GB HBM3", "9.0", 85521)
    for answer in ("", 'Field "compute_cap" is not a valid field to query.\n\n', "[N/A], [N/A]\n"):
        (silent,) = with_capability(gpus(smi), answer)
        assert (silent["compute_capability"], silent["memory_mb"]) == (None, None)


def test_a_jetson_that_is_shipped_is_extended(tmp_path: Path) -> None:
    found = detect(NANO | {"power_mode": "MAXN_SUPER"}, NANO_DPKG)
    assert found.table["extends"] == "jetson-orin-nano-8gb-super"
    profile = written(found, tmp_path)
    assert profile.tensorrt is not None
    assert (profile.tensorrt.version, profile.tensorrt.jetpack) == ("10.3.0", "6.2.1")
    assert profile.datasheet == load_profile("jetson-orin-nano-8gb-super").datasheet
    agx = detect(AGX, "")
    assert agx.table["extends"] == "jetson-agx-orin-64gb"
    assert agx.table["tensorrt"] == {"version": "10.3.0", "jetpack": "6.2.2"}
    assert "TensorRT not found by dpkg" in agx.notes[0]
    thor = written(detect(THOR, THOR_DPKG), tmp_path)
    assert thor.tensorrt is not None
    assert (thor.tensorrt.version, thor.tensorrt.jetpack, thor.opset) == ("10.13.3", "7.0", 17)


def test_a_jetson_in_another_mode_has_no_datasheet_of_ours(tmp_path: Path) -> None:
    found = detect(NANO, NANO_DPKG)
    assert "extends" not in found.table
    profile = written(found, tmp_path)
    assert (profile.power_mode, profile.datasheet, profile.product) == ("25W", None, "Jetson Orin Nano")
    assert profile.tensorrt is not None
    assert profile.tensorrt.jetpack == "6.2.1"
    assert "no shipped profile is this board in power mode 25W" in found.toml()
    assert not_here(profile, NANO, list) is None


@pytest.mark.parametrize(
    ("release", "packages", "jetpack", "version"),
    [
        ("R99 (release), REVISION: 1.0", "libnvinfer10 10.16.2.10-1+cuda13.2\n", "7.2.2", "10.16.2"),
        ("R36 (release), REVISION: 4.7", "libnvinfer8 8.6.2.3-1+cuda12.2\n", "6.0", "8.6.2"),  # put there by hand
        ("R99 (release), REVISION: 1.0", "libnvinfer12 12.1.0.1-1+cuda14.0\n", None, "12.1.0"),
    ],
)
def test_a_jetpack_that_is_not_known_or_not_its_own(
    release: str, packages: str, jetpack: str | None, version: str, tmp_path: Path
) -> None:
    profile = written(detect(NANO | {"jetson": release, "power_mode": "MAXN_SUPER"}, packages), tmp_path)
    assert profile.tensorrt is not None
    assert (profile.tensorrt.jetpack, profile.tensorrt.version) == (jetpack, version)
    assert profile.opset == (20 if version.startswith("12") else 17)


def test_a_jetson_of_a_chip_that_none_is_shipped_for() -> None:
    with pytest.raises(UsageError, match="no shipped profile is near NVIDIA Jetson AGX Xavier"):
        detect(NANO | {"board": "NVIDIA Jetson AGX Xavier", "compute_capability": "7.2"}, "")


def card(name: str, capability: str, memory_mb: int) -> dict[str, Any]:
    driver = {"driver_version": "570.86.15"}
    return XEON | {"gpus": [{"name": name, "compute_capability": capability, "memory_mb": memory_mb, **driver}]}


def test_a_gpu_that_is_shipped_is_extended(tmp_path: Path) -> None:
    found = detect(card("NVIDIA H100 80GB HBM3", "9.0", 85521), "libnvinfer10 10.16.1.11-1+cuda13.2\n")
    assert found.table["extends"] == "gpu-h100"
    assert "its CPU alone: cpu-x86-avx512-vnni" in found.notes
    profile = written(found, tmp_path)
    assert (profile.memory_mb, profile.opset) == (85521, 17)
    assert profile.tensorrt is not None
    assert profile.tensorrt.version == "10.16.1"
    assert profile.datasheet == load_profile("gpu-h100").datasheet


def test_another_gpu_has_no_datasheet_of_ours(tmp_path: Path) -> None:
    found = detect(card("NVIDIA L40S", "8.9", 48000), "")
    assert "extends" not in found.table
    assert "TensorRT was not found here: 11.4 is a guess, write the version that you will have" in found.notes
    profile = written(found, tmp_path)
    assert (profile.datasheet, profile.product, profile.compute_capability) == (None, "L40S", "8.9")
    turing = written(detect(card("NVIDIA GeForce RTX 2080 Ti", "7.5", 11500), ""), tmp_path)
    assert turing.precisions == ["fp32", "fp16", "int8"]
    ampere = written(detect(card("NVIDIA A10", "8.6", 24000), ""), tmp_path)
    assert (ampere.compute_capability, ampere.precisions[2]) == ("8.6", "bf16")


@pytest.mark.parametrize(
    ("instructions", "base"),
    [
        (["avx2", "avx512f", "avx512_vnni"], "cpu-x86-avx512-vnni"),
        (["avx2"], "cpu-x86-avx2"),
        (["avx2", "avx_vnni"], "cpu-x86"),
        ([], "cpu-x86"),
    ],
)
def test_the_nearest_profile_of_a_cpu_is_that_of_its_instructions(instructions: list[str], base: str) -> None:
    found = detect(XEON | {"instruction_sets": instructions})
    assert found.table == {
        "extends": base,
        "description": "Intel(R) Xeon(R) Processor, 2 cores, ONNX Runtime",
        "memory_mb": 25277,
    }


def test_an_arm_cpu_has_the_datasheet_only_if_it_is_that_board(tmp_path: Path) -> None:
    # lscpu and model of a Raspberry Pi 5 with 8 GB, as others published them.
    arm = {"cpu": "Cortex-A76", "instruction_sets": ["asimd", "asimddp"], "cores": 4, "memory_mb": 8439}
    pi = detect(arm | {"machine": "aarch64", "board": "Raspberry Pi 5 Model B Rev 1.0"})
    assert pi.table["extends"] == "cpu-arm64"
    graviton = detect(arm | {"machine": "aarch64", "cpu": "Neoverse-N1", "cores": 2})
    assert "extends" not in graviton.table
    profile = written(graviton, tmp_path)
    assert (profile.datasheet, profile.scheme, profile.threads) == (None, "arm-s8s8", 2)
    with pytest.raises(UsageError, match="no shipped profile is near a riscv64 CPU"):
        detect(arm | {"machine": "riscv64"})


def test_this_machine_is_what_its_own_profile_says(tmp_path: Path) -> None:
    found = detect()
    profile = written(found, tmp_path)
    machine = environment()
    assert not_here(profile, machine, list) is None
    assert f"CPU: {machine['cpu']}" in found.toml()
    assert tomllib.loads(found.toml()) == found.table
