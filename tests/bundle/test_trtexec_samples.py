"""trtexec's words as they were recorded (samples/SOURCES.md), and the options that the runner gives to each version."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.bundle.runner.building import engine_settings, kept_engine
from edgekd.bundle.runner.contents import write_json
from edgekd.bundle.runner.errors import Failed
from edgekd.bundle.runner.trtexec import (
    Trtexec,
    build_flags,
    exported_outputs,
    exported_times,
    inference_options,
    performance,
    run_flags,
    version_of,
)

SAMPLES = Path(__file__).parent / "samples"
#: Of --help what matters: 8.6 and 10 have these (NVIDIA/TensorRT, samples/common/sampleOptions.cpp). Of 11 public
#: scripts use --noCudaGraph and --includeDataTransfers, whose opposites are its defaults.
LEVEL = "--builderOptimizationLevel"
USAGE_10 = f"--stronglyTyped {LEVEL} --skipInference --useCudaGraph --useSpinWait --noDataTransfers --exposeDMA"
USAGE_11 = f"{LEVEL} --skipInference --noCudaGraph --useSpinWait --includeDataTransfers --exposeDMA"


def sample(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("trtexec-8.6-banner.txt", "8.6.1"),
        ("trtexec-8.4-xavier.txt", "8.4.0"),
        ("trtexec-10.3-orin-nx.txt", "10.3.0"),
        ("trtexec-10.9.txt", "10.9.0"),
        ("trtexec-10.14-banner.txt", "10.14.1"),
        ("trtexec-11-banner.txt", "11.0.0"),
        ("nvpmodel-thor.txt", None),
    ],
)
def test_version(file: str, version: str | None) -> None:
    assert version_of(sample(file)) == version


def test_performance_summary() -> None:
    found = performance(sample("trtexec-10.9.txt"))
    assert list(found) == ["Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency"]
    assert found["GPU Compute Time"] == {
        "min": 1.38855, "max": 3.00439, "mean": 1.44357, "median": 1.39775, "percentile(90%)": 1.40308,
        "percentile(95%)": 1.67834, "percentile(99%)": 2.57642,
    }  # fmt: skip
    # The metrics belong together: what is called latency is the sum of the three parts.
    parts = sum(found[name]["mean"] for name in ("H2D Latency", "GPU Compute Time", "D2H Latency"))
    assert found["Latency"]["mean"] == pytest.approx(parts, rel=1e-4)
    assert performance(sample("trtexec-8.6.txt"))["Latency"]["percentile(95%)"] == 4.31128
    assert performance(sample("trtexec-8.4-xavier.txt"))["GPU Compute Time"]["percentile(99%)"] == 0.393188


def test_what_trtexec_says_of_how_it_times() -> None:
    found = inference_options(sample("trtexec-10.3-orin-nx.txt"))
    assert (found["Data transfers"], found["Spin-wait"], found["Iterations"]) == ("Enabled", "Disabled", "10")
    assert "DLACore" not in found, "that is another section"
    assert inference_options("") == {}


def test_exported_times_and_outputs_as_the_tools_source_writes_them() -> None:
    row = (
        '{{ "startEnqMs" : 0.5, "endEnqMs" : 0.7, "startH2dMs" : 0.5, "endH2dMs" : 0.5, "startComputeMs" : 0.5'
        ', "endComputeMs" : 1.9, "startD2hMs" : 1.9, "endD2hMs" : 1.9, "h2dMs" : 0, "computeMs" : {0}'
        ', "d2hMs" : 0, "latencyMs" : {0} }}\n'
    )
    text = "[\n  " + row.format("1.39775") + ", " + row.format("1.4") + "]\n"
    assert [one["computeMs"] for one in exported_times(text)] == [1.39775, 1.4]
    text = '[\n  { "name" : "logits"\n  , "dimensions" : "2x2"\n  , "values" : [ 0.5, -1e-05, -nan, inf ]\n  }\n]\n'
    found = exported_outputs(text)["logits"]
    assert found.shape == (2, 2)
    assert (found[0].tolist(), math.isnan(found[1, 0]), found[1, 1]) == ([0.5, -1e-5], True, np.inf)


def network(precision: str, half: bool, batch: str | int = "batch") -> dict[str, Any]:
    inputs = [{"name": "image", "axes": [batch, 3, 32, 32]}]
    return {"precision": precision, "typed_half": half, "batch": 1, "inputs": inputs}


PROFILE = {"tensorrt": {"optimization_level": 5, "workspace_mb": 512}}


@pytest.mark.parametrize(
    ("version", "precision", "half", "typed", "flags"),
    [
        ("8.6.2", "fp32", False, False, []),
        ("8.6.2", "fp16", True, False, ["FP16"]),
        ("8.6.2", "int8", False, False, ["INT8", "FP16"]),
        ("10.3.0", "int8", False, False, ["INT8", "FP16"]),
        ("10.3.0", "int8", True, True, []),
        ("10.3.0", "fp16", True, True, []),
        ("11.0.0", "fp32", False, True, []),
        ("11.0.0", "int8", True, True, []),
    ],
)
def test_typing_and_precisions_of_a_build(
    version: str, precision: str, half: bool, typed: bool, flags: list[str]
) -> None:
    found = engine_settings(network(precision, half), PROFILE, version)
    assert (found["strongly_typed"], found["flags"]) == (typed, flags)
    assert (found["optimization_level"], found["workspace_mb"], found["batch"]) == (5, 512, 1)


def test_a_gpu_is_not_measured_in_the_place_of_a_dla() -> None:
    with pytest.raises(Failed, match="builds for the GPU, the profile asks for DLA 0"):
        engine_settings(network("fp16", True, 1), {"tensorrt": {"dla": 0}}, "10.3.0")
    assert engine_settings(network("fp16", True, 1), {"tensorrt": {"dla": None}}, "10.3.0")["batch"] == 1


def test_build_options() -> None:
    int8 = engine_settings(network("int8", False), PROFILE, "8.6.2")
    assert build_flags(network("int8", False), int8, USAGE_10) == [
        "--int8", "--fp16", "--builderOptimizationLevel=5", "--memPoolSize=workspace:488",
        "--minShapes=image:1x3x32x32", "--optShapes=image:1x3x32x32", "--maxShapes=image:1x3x32x32", "--skipInference",
    ]  # fmt: skip
    typed = engine_settings(network("fp16", True, 1), {}, "10.3.0")
    flags = build_flags(network("fp16", True, 1), typed, USAGE_10)
    assert flags == ["--stronglyTyped", "--builderOptimizationLevel=3", "--skipInference"]
    always = engine_settings(network("fp16", True, 1), {}, "11.0.0")
    assert build_flags(network("fp16", True, 1), always, USAGE_11) == [
        "--builderOptimizationLevel=3",
        "--skipInference",
    ]
    oldest = engine_settings(network("fp32", False, 1), {}, "8.5.2")
    assert build_flags(network("fp32", False, 1), oldest, "--buildOnly") == ["--buildOnly"], "8.5 has no levels"


def test_timing_options_of_versions_with_other_defaults() -> None:
    """8.6 and 10 copy inputs and launch kernels singly unless told otherwise; 11 has a graph and no copies."""
    shapes = "--shapes=image:1x3x32x32"
    some = network("fp32", False)
    assert run_flags(some, 1, USAGE_10) == [shapes, "--useCudaGraph", "--useSpinWait", "--exposeDMA"]
    assert run_flags(some, 1, USAGE_11) == [shapes, "--useSpinWait", "--includeDataTransfers", "--exposeDMA"]
    assert run_flags(network("fp32", False, 1), 1, "--useSpinWait") == ["--useSpinWait"]


def test_what_was_timed_otherwise_than_asked_is_a_warning() -> None:
    session = Trtexec.__new__(Trtexec)  # opening one needs the tool
    session.facts = {"inference_options": inference_options(sample("trtexec-10.3-orin-nx.txt"))}
    assert session.warnings() == ["trtexec timed with Spin-wait: Disabled", "trtexec timed with ExposeDMA: Disabled"]


def test_an_engine_is_used_again_only_by_what_built_it(tmp_path: Path) -> None:
    path, identity = tmp_path / "int8.engine", {"gpu": "Orin", "tensorrt": "10.3.0", "sha256": "ab"}
    assert not kept_engine(str(path), identity)
    path.write_bytes(b"engine")
    write_json(f"{path}.json", identity)
    assert kept_engine(str(path), identity)
    assert not kept_engine(str(path), {**identity, "tensorrt": "10.7.0"})
    assert not kept_engine(str(path), {**identity, "gpu": "Thor"})
    path.write_bytes(b"")
    assert not kept_engine(str(path), identity)
