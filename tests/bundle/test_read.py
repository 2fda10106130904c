"""A runner's results as edgekd's own: reports, gates and comparisons take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import results, run

from edgekd.bench import paired_drop, paired_ratio
from edgekd.bundle import read_results
from edgekd.errors import ArtifactError, UsageError


@pytest.fixture(scope="module")
def written(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results.json of the bundle, run once."""
    out = tmp_path_factory.mktemp("written")
    run(made, "--out", str(out))
    return out / "results.json"


def changed(written: Path, tmp_path: Path, change: Callable[[dict], None]) -> Path:
    table = json.loads(written.read_text())
    change(table)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(table))
    return path


def test_figures_are_the_runners(written: Path, made: Path) -> None:
    found, raw = read_results(written), results(written.parent)
    profile = found.profiles[0]
    first, last = profile.variants
    assert (first.name, last.name, first.precision, last.precision) == ("fp32", "int8", "fp32", "int8")
    medians = [[np.median(r["networks"][n]["ns"]) / 1e6 for r in raw["rounds"]] for n in ("fp32", "int8")]
    assert last.latency is not None
    assert last.latency.round_p50 == pytest.approx(medians[1])
    assert last.speedup is not None
    assert last.speedup.model_dump() == pytest.approx(paired_ratio(*medians).model_dump())
    labels = np.load(made / "inputs.npz")["labels"]
    answers = [np.load(made / "expected.npz")[f"{n}.logits"].argmax(1) for n in ("fp32", "int8")]
    assert last.metrics["accuracy"] == (answers[1] == labels).mean()
    assert last.drop == paired_drop(answers[0] == labels, answers[1] == labels)
    assert last.size_mb == (made / "int8.onnx").stat().st_size / 1e6
    assert (found.test_images, found.headline, profile.profile) == (200, "accuracy", "cpu-x86")
    assert {v.origin for v in profile.variants} == {"measured"}
    assert len(found.classes) == 10


def test_report_compare_and_gate_take_it(written: Path, edgekd: Callable, tmp_path: Path) -> None:
    text = edgekd("report", str(written), "--format", "text")
    assert text.code == 0, text.err
    assert "cpu-x86" in text.out
    assert "int8" in text.out
    same = edgekd("compare", str(written), str(written))
    assert same.code == 0, same.err
    rules = tmp_path / "gate.toml"
    rules.write_text("[gate]\naccuracy = { min = 0.5 }\nsize_mb = { max = 1.0 }\n")
    passed = edgekd("gate", str(written), "--rules", str(rules))
    assert passed.code == 0, passed.err
    rules.write_text("[gate]\naccuracy = { min = 0.999 }\n")
    assert edgekd("gate", str(written), "--rules", str(rules)).code in (1, 4)


def test_another_runtime_or_machine_is_not_the_profiles_device(written: Path, tmp_path: Path) -> None:
    path = changed(written, tmp_path, lambda t: t["manifest"]["profile"].update(runtime="tensorrt"))
    profile = read_results(path).profiles[0]
    assert profile.elsewhere == "cpu-x86 runs on tensorrt, the bundle was run in onnxruntime"
    assert [v.latency for v in profile.variants] == [None, None]
    assert profile.variants[1].metrics["accuracy"] > 0.5, "what it answers is known all the same"
    path = changed(written, tmp_path, lambda t: t["device"].update(machine="aarch64"))
    assert read_results(path).profiles[0].elsewhere == "cpu-x86 is x86-64, the machine that ran it is aarch64"


def test_what_a_gpu_says_of_its_calls_and_sensors_is_kept(written: Path, tmp_path: Path) -> None:
    """As the runner writes rounds of a GPU: medians of the parts, and what the sensors gave since the last round."""

    def on_a_gpu(table: dict) -> None:
        for i, one in enumerate(table["rounds"]):
            one["sensors"] = {"power_mw": {"VIN": 1000 * i}, "temperatures": {"tj": 40.0 + i}, "gpu_mhz": 900.0}
            for block in one["networks"].values():
                block |= {"compute_p50": 0.5, "transfers_p50": 0.1}

    found = read_results(changed(written, tmp_path, on_a_gpu))
    latency = found.profiles[0].variants[0].latency
    assert latency is not None
    assert {name: part.value for name, part in latency.parts.items()} == {"compute": 0.5, "transfers": 0.1}
    expected = {"power_mw": {"VIN": 1000.0}, "temperatures": {"tj": 42.0}, "gpu_mhz": 900.0}
    assert found.environment["sensors"] == expected
    assert read_results(written).profiles[0].variants[0].latency.parts == {}


def test_a_network_that_was_wrong_and_a_run_that_was_stopped_are_told(written: Path, tmp_path: Path) -> None:
    def broken(table: dict) -> None:
        table["networks"]["int8"] = {"file": "int8.onnx", "problem": "output logits is zero everywhere"}
        table["complete"] = False
        for one in table["rounds"]:
            del one["networks"]["int8"]

    profile = read_results(changed(written, tmp_path, broken)).profiles[0]
    assert profile.variants[1].latency is None
    assert profile.variants[1].metrics == {}
    assert profile.variants[0].latency is not None
    assert "int8: output logits is zero everywhere" in profile.warnings
    assert any("not complete: 3 rounds" in text for text in profile.warnings)


def test_power_mode_and_tensorrt_that_are_not_the_profiles_are_told(written: Path, tmp_path: Path) -> None:
    def jetson(table: dict) -> None:
        table["manifest"]["profile"].update(
            runtime="tensorrt", power_mode="MAXN", tensorrt={"version": "10.3"}, architecture=None, requires=[]
        )
        table["runtime"].update(name="trtexec", version="10.7.0")
        table["device"]["power_mode"] = "15W"

    warnings = read_results(changed(written, tmp_path, jetson)).profiles[0].warnings
    assert "power mode 15W, the profile is about MAXN: figures hold in that mode only" in warnings
    assert "TensorRT 10.7.0, the profile is about 10.3" in warnings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ('{"schema_version": 2}', "not a bundle's results"),
        ('{"kind": "edgekd bundle results", "format": 9}', "format 9, expected 1"),
        ('{"kind": "edgekd bundle results", "format": 1}', "damaged: KeyError 'manifest'"),
    ],
)
def test_damaged_or_foreign_results(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said):
        read_results(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["manifest"]["profile"].update(threads=64), "their manifest is not the bundle's: profile differs"),
        (lambda t: t["manifest"]["networks"][1].update(precision="fp16"), "not the bundle's: networks differs"),
        (lambda t: t["manifest"]["files"]["int8.onnx"].__setitem__(1, 1), "not the bundle's: files differs"),
        (lambda t: t.update(labels=t["networks"]["fp32"]["judged"]["answers"]), "their labels are not the bundle's"),
        (lambda t: t.update(bundle="0" * 64), "the results of another bundle"),
    ],
)
def test_what_is_known_here_is_not_believed_otherwise(
    change: Callable[[dict], None], said: str, written: Path, made: Path, tmp_path: Path
) -> None:
    assert read_results(written, bundle=made) == read_results(written)
    with pytest.raises(ArtifactError, match=said):
        read_results(changed(written, tmp_path, change), bundle=made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["networks"]["int8"]["judged"].update(accuracy=1.0), "int8: accuracy is 1.0, its answers have 0"),
        (lambda t: t["networks"]["int8"]["judged"].update(accuracy=7.0), "int8: accuracy is 7.0"),
        (lambda t: t["networks"]["int8"]["judged"].update(loss=float("nan")), "int8: loss is nan"),
        (lambda t: t["networks"]["int8"]["judged"]["answers"].__setitem__(0, 10), "answers are integers from 0 to 9"),
        (lambda t: t["networks"]["int8"]["judged"]["answers"].pop(), "int8: 199 answers for 200 labels"),
        (lambda t: t["labels"].__setitem__(3, -1), "labels are integers from 0 to 9"),
        (lambda t: t["rounds"][1]["networks"]["fp32"]["ns"].__setitem__(0, -5), "fp32: latencies of round 2 must be"),
        (lambda t: t["rounds"][1]["networks"]["fp32"].update(ns=[]), "fp32: latencies of round 2 must be positive"),
        (lambda t: t["networks"].update(other=t["networks"]["fp32"]), "network 'other' is not in its manifest"),
    ],
)
def test_values_that_cannot_be_are_one_message(
    change: Callable[[dict], None], said: str, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=said):
        read_results(changed(written, tmp_path, change))


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results at"):
        read_results(tmp_path / "results.json")
