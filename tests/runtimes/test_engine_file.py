"""Engines and their sidecars. The drivers' texts are recorded: see the tests that read them."""

from __future__ import annotations

import json

import pytest
import tiny_onnx

from edgekd.errors import ArtifactError, StageError, UsageError
from edgekd.runtimes.engine_file import (
    BatchRange,
    EngineMetadata,
    Here,
    check_engine,
    driver_version,
    engine_of,
    read_engine,
    sidecar_of,
    write_engine,
)

KNOWN = {
    "gpu": "NVIDIA L4",
    "compute_capability": "8.9",
    "driver": "570.86.15",
    "tensorrt": "10.3.0.30",
    "cuda": "12.8",
    "precision": "int8",
    "strongly_typed": False,
    "flags": ["INT8", "FP16"],
    "optimization_level": 3,
    "inputs": {"image": BatchRange(smallest=[1, 1, 4, 4], tuned=[1, 1, 4, 4], largest=[32, 1, 4, 4])},
}
HERE = Here("NVIDIA L4", "8.9", "570.86.15", "10.3.0.30", "12.8")


def metadata(**changes) -> EngineMetadata:
    return EngineMetadata(sha256="0" * 64, onnx="model.onnx", onnx_sha256="1" * 64, **{**KNOWN, **changes})


def here(**changes) -> Here:
    return Here(**{**vars(HERE), **changes})


@pytest.fixture
def engine(tmp_path):
    onnx, _ = tiny_onnx.linear_classifier(tmp_path / "model.int8.onnx")
    write_engine(tmp_path / "model.int8.engine", b"machine code", onnx, **KNOWN)
    return tmp_path / "model.int8.engine"


def test_an_engine_of_this_machine_is_accepted():
    check_engine(metadata(), HERE)


@pytest.mark.parametrize(
    ("machine", "named"),
    [
        ({"tensorrt": "10.3.0.26"}, ["TensorRT 10.3.0.30", "10.3.0.26"]),
        ({"gpu": "Tesla T4", "compute_capability": "7.5"}, ["NVIDIA L4 (compute capability 8.9)", "Tesla T4 (7.5)"]),
        ({"gpu": "NVIDIA GeForce RTX 4090"}, ["NVIDIA L4", "NVIDIA GeForce RTX 4090 (8.9)"]),
        ({"driver": "580.65.06"}, ["driver 570.86.15", "580.65.06"]),
    ],
)
def test_what_differs_is_named_and_rebuilding_is_advised(machine, named):
    with pytest.raises(StageError) as error:
        check_engine(metadata(), here(**machine), "model.engine")
    for words in named:
        assert words in str(error.value)
    assert "rebuild: edgekd export --target trt --build" in str(error.value)
    assert error.value.problem.where == "model.engine"
    assert error.value.exit_code == 3


def test_all_differences_come_in_one_message():
    with pytest.raises(StageError) as error:
        check_engine(metadata(), Here("Tesla T4", "7.5", "535.104.05", "8.6.1", "12.0"))
    assert all(word in str(error.value) for word in ("8.6.1", "Tesla T4", "535.104.05"))


@pytest.mark.parametrize("driver", ["570.124.06", None])
def test_a_driver_of_the_same_branch_or_an_unknown_one_is_no_difference(driver):
    check_engine(metadata(), here(driver=driver))


def test_releases_of_one_l4t_line_are_no_difference_and_another_line_is():
    check_engine(metadata(driver="R36.4.3"), here(driver="R36.4.4"))
    with pytest.raises(StageError, match=r"R36\.4\.3, here is R36\.3\.0"):
        check_engine(metadata(driver="R36.4.3"), here(driver="R36.3.0"))


@pytest.mark.parametrize(
    ("tensorrt", "runs"), [("10.3.0.30", True), ("10.7.0.23", True), ("10.2.0.19", False), ("11.0.0.1", False)]
)
def test_version_compatible_engines_run_in_later_versions_of_the_same_major(tensorrt, runs):
    built = metadata(version_compatible=True)
    if runs:
        check_engine(built, here(tensorrt=tensorrt))
    else:
        with pytest.raises(StageError, match="TensorRT"):
            check_engine(built, here(tensorrt=tensorrt))


@pytest.mark.parametrize(
    ("level", "capability", "runs"),
    [
        ("same-compute-capability", "8.9", True),
        ("same-compute-capability", "8.6", False),
        ("ampere-plus", "8.0", True),
        ("ampere-plus", "12.0", True),
        ("ampere-plus", "7.5", False),
    ],
)
def test_hardware_compatible_engines_run_on_other_gpus(level, capability, runs):
    built, other = metadata(hardware_compatibility=level), here(gpu="another", compute_capability=capability)
    if runs:
        check_engine(built, other)
    else:
        with pytest.raises(StageError, match="another"):
            check_engine(built, other)


def test_what_is_written_is_read_back_and_says_where_it_comes_from(engine):
    found = read_engine(engine)
    assert found.model_dump(include=set(KNOWN)) == {**KNOWN, "inputs": {"image": KNOWN["inputs"]["image"].model_dump()}}
    assert found.onnx == "model.int8.onnx"
    assert engine.read_bytes() == b"machine code"


def test_an_onnx_file_leads_to_the_engine_built_from_it(engine):
    assert engine_of(engine.with_suffix(".onnx")) == engine
    assert engine_of(engine) == engine


def test_engines_of_a_profile_lie_beside_the_artifact(tmp_path):
    artifact, engines = tmp_path / "04-export", tmp_path / "engines-gpu-l4"
    artifact.mkdir()
    engines.mkdir()
    onnx, _ = tiny_onnx.linear_classifier(artifact / "model.int8.onnx")
    write_engine(engines / "model.int8.engine", b"machine code", onnx, **KNOWN)
    assert engine_of(onnx, "engines-gpu-l4") == engines / "model.int8.engine"
    with pytest.raises(UsageError, match=r"no model\.int8\.engine beside it or in .*engines-gpu-t4"):
        engine_of(onnx, "engines-gpu-t4")


def test_an_engine_of_another_onnx_file_is_refused(engine):
    tiny_onnx.linear_classifier(engine.with_suffix(".onnx"), classes=6)
    with pytest.raises(ArtifactError, match=r"another model\.int8\.onnx"):
        engine_of(engine.with_suffix(".onnx"))


def test_without_an_engine_the_hint_says_how_to_build_one(engine):
    engine.unlink()
    with pytest.raises(UsageError, match="--build"):
        engine_of(engine.with_suffix(".onnx"))
    with pytest.raises(UsageError, match="--build"):
        read_engine(engine)


def damaged(engine):
    engine.write_bytes(b"machine cod")


def without_sidecar(engine):
    sidecar_of(engine).unlink()


def truncated_sidecar(engine):
    sidecar_of(engine).write_text(sidecar_of(engine).read_text()[:100])


def sidecar_of_tomorrow(engine):
    table = json.loads(sidecar_of(engine).read_text())
    sidecar_of(engine).write_text(json.dumps({**table, "format": 2}))


@pytest.mark.parametrize("spoil", [damaged, without_sidecar, truncated_sidecar, sidecar_of_tomorrow])
def test_a_damaged_engine_or_sidecar_is_not_loaded(engine, spoil):
    spoil(engine)
    with pytest.raises(ArtifactError, match="rebuild"):
        read_engine(engine)


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        # Talos Linux documentation, "NVIDIA GPU (OSS drivers)"
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  515.65.01  Wed Mar 16 11:24:05 UTC 2022\nGCC version:  gcc"
         " version 12.2.0 (GCC)\n", "515.65.01"),
        # SUSE Linux Enterprise documentation, "Installing NVIDIA GPU drivers"
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  555.42.06  Release Build  (abuild@host)  Thu Jul 11"
         " 12:00:00 UTC 2024\nGCC version:  gcc version 7.5.0 (SUSE Linux)\n", "555.42.06"),
        # a Jetson with JetPack 6.2, as quoted in the tests of roboflow/inference
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  "
         "(buildbrain@mobile-u64-6336-d8000)  Tue Jan  7 17:35:12 PST 2025\n", "540.4.0"),
    ],
)  # fmt: skip
def test_the_driver_is_read_from_what_the_kernel_module_says(tmp_path, text, driver):
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert driver_version(tmp_path) == driver


def test_the_driver_of_a_jetson_is_its_l4t_release(tmp_path):
    (tmp_path / "etc").mkdir()
    # an Orin Nano with JetPack 6.2.1: /etc/nv_tegra_release
    (tmp_path / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, "
        "DATE: Thu Sep 18 22:54:44 UTC 2025\n# KERNEL_VARIANT: oot\n"
    )
    assert driver_version(tmp_path) == "R36.4.7"


def test_without_a_driver_none_is_told(tmp_path):
    assert driver_version(tmp_path) is None
