"""Every shipped profile: figures against arithmetic, versions against the table, nothing odd in any."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edgekd.catalogue import catalogue, catalogue_text, vetted
from edgekd.jetpack import JETPACKS, highest_opset
from edgekd.profile import Profile, load_profile, profile_names, profile_toml
from edgekd.quant import scheme_named
from edgekd.shipped import shipped

every = pytest.mark.parametrize("name", profile_names())
#: Classes of CPUs, which have no datasheet.
CLASSES = {"cpu-x86", "cpu-x86-avx2", "cpu-x86-avx512-vnni"}
#: Streaming multiprocessors (of the Pi: cores), their clock in GHz when figures are quoted, and operations a cycle in
#: each: fp32, fp16 and int8 (a multiply-add is two). Sources: NVIDIA's architecture whitepapers of Turing, Ampere, Ada,
#: Hopper and Blackwell; Jetson data sheets; Arm, Cortex-A76.
ARITHMETIC = {
    "cpu-arm64": (4, 2.4, 16, None, 64),
    "gpu-h100": (132, 1.83, None, 4096, 8192),
    "gpu-l4": (58, 2.04, 256, 1024, 2048),
    "gpu-rtx": (128, 2.52, 256, 1024, 2048),
    "gpu-t4": (40, 1.59, 128, 1024, 2048),
    "jetson-agx-orin-64gb": (16, 1.3, 256, 2048, 4096),
    "jetson-orin-nano-8gb": (8, 0.625, 256, 2048, 4096),
    "jetson-orin-nano-8gb-super": (8, 1.02, 256, 2048, 4096),
    "jetson-orin-nx-16gb": (8, 0.918, 256, 2048, 4096),
    "jetson-thor": (20, 1.575, 256, 8192, 16384),
}


def test_the_profiles_that_are_promised_are_there() -> None:
    assert set(profile_names()) == CLASSES | set(ARITHMETIC)


@every
def test_it_loads_is_right_and_nothing_in_it_is_odd(name: str) -> None:
    profile = load_profile(name)
    assert (profile.name, vetted(name)) == (name, (name, [], []))
    assert scheme_named(profile.scheme, name)
    assert profile.channel_multiple == 16  # bytes: a NEON register, what a Tensor Core wants
    assert "int8" in profile.precisions


@every
def test_it_is_written_as_toml_that_loads_equal(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    file = tmp_path / f"{name}.toml"
    file.write_text(profile_toml(profile))
    assert load_profile(str(file)) == profile
    assert "extends" not in tomllib.loads(file.read_text())


@every
def test_its_datasheet_says_where_it_is_from(name: str) -> None:
    sheet = load_profile(name).datasheet
    assert (sheet is None) == (name in CLASSES)
    if sheet is not None:
        assert len(sheet.source) > 20


@pytest.mark.parametrize("name", ARITHMETIC)
def test_its_peaks_are_dense_and_those_of_its_units(name: str) -> None:
    units, ghz, *per_cycle = ARITHMETIC[name]
    sheet = load_profile(name).datasheet
    assert sheet is not None
    for figure, operations in zip((sheet.fp32_tflops, sheet.fp16_tflops, sheet.int8_tops), per_cycle, strict=True):
        if operations is not None:
            assert figure == pytest.approx(units * ghz * operations / 1000, rel=0.03)
    assert sheet.bf16_tflops in (None, sheet.fp16_tflops, pytest.approx((sheet.fp16_tflops or 0) / 2, rel=0.01))


def with_tensorrt() -> list[Profile]:
    return [p for name in profile_names() if (p := load_profile(name)).tensorrt is not None]


@pytest.mark.parametrize("profile", with_tensorrt(), ids=lambda p: p.name)
def test_its_tensorrt_takes_its_files(profile: Profile) -> None:
    tensorrt = profile.tensorrt
    assert tensorrt is not None
    assert (profile.runtime, profile.scheme) == ("tensorrt", "trt-s8s8")
    assert profile.opset <= (highest_opset(tensorrt.version) or 0)
    assert profile.opset >= 19 if tensorrt.strongly_typed else profile.opset == 17
    assert ("bf16" in profile.precisions) == (float(profile.compute_capability or 0) >= 8)
    if profile.device == "jetson":
        (jetpack,) = [p for p in JETPACKS if p.version == tensorrt.jetpack]
        assert jetpack.tensorrt.startswith(tensorrt.version)
        assert profile.compute_capability in jetpack.boards
        assert profile.power_mode
    else:
        assert (profile.power_mode, tensorrt.jetpack) == (None, None)


def test_what_is_guessed_is_called_so() -> None:
    """A figure without an opened source says "not verified", in the file where a reader sees it."""
    text = {f.stem: f.read_text(encoding="utf-8") for f in shipped("profiles").glob("*.toml")}
    assert all("not verified" in text[name] for name in ("gpu-l4", "gpu-t4", "jetson-orin-nx-16gb", "jetson-thor"))


@pytest.mark.parametrize(
    ("machine", "instructions", "here"),
    [
        ("x86_64", ["avx2", "avx512_vnni"], {"cpu-x86", "cpu-x86-avx512-vnni"}),  # avx2's kernels are others there
        ("x86_64", ["avx2"], {"cpu-x86", "cpu-x86-avx2"}),
        ("aarch64", ["asimd"], {"cpu-arm64"}),
        ("riscv64", [], set()),
    ],
)
def test_which_of_them_a_machine_is(machine: str, instructions: list[str], here: set[str]) -> None:
    rows = catalogue({"machine": machine, "instruction_sets": instructions})
    assert {row["name"] for row in rows if row["here"]} == here
    assert all(row["why"] for row in rows if not row["here"])
    assert {line.split()[0] for line in catalogue_text(rows).splitlines() if "  yes  " in line} == here
