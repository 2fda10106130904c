"""One run for several quantization schemes and devices, on real digits: its files, measurements, verdicts and pages."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from processes import PROFILE

from edgekd.artifact import Artifact
from edgekd.bench import Results
from edgekd.bench.stats import paired_ratio
from edgekd.errors import UsageError
from edgekd.gate import exit_code
from edgekd.gating import final_file, gate_run
from edgekd.report import render
from edgekd.runs import RunResult, find_source, run
from edgekd.single import run_single
from edgekd.verdicts import gate_stored

NETWORK = '{ use = "cifar-resnet", depth = 8, width = 4 }'
RECIPE = f"""\
version = 1
name = "forks"
data = {{ use = "digits", size = 8, batch = 128 }}
profiles = ["x86.toml", "arm.toml", "signed.toml"]

[teacher]
model = {NETWORK}
epochs = 1

[[stage]]
use = "quantize"
keep_float = false
calibration = 128
heal = {{ epochs = 0 }}

[[stage]]
use = "export"

[gate]
size_mb = {{ max = 1.0 }}
latency = {{ p50 = {{ max = 1000.0 }} }}
accuracy = {{ min = 0.01 }}
"""
STEPS = ["teacher", "quantize.x86-u8s8", "quantize.arm-s8s8", "export.x86-u8s8", "export.arm-s8s8"]
HERE, ELSEWHERE, SIGNED = "x86", "arm", "signed"


def quiet(event: dict[str, Any]) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Profiles of this machine, of one that it is not, and of one that is this machine with another scheme."""
    directory = tmp_path_factory.mktemp("forks")
    x86 = PROFILE.replace("description", 'architecture = "x86-64"\ndescription')
    (directory / "x86.toml").write_text(x86)
    (directory / "arm.toml").write_text(x86.replace('extends = "cpu-x86"', 'extends = "cpu-arm64"').replace(
        'architecture = "x86-64"', 'architecture = "aarch64"'))  # fmt: skip
    (directory / "signed.toml").write_text(x86.replace("description", 'scheme = "arm-s8s8"\ndescription'))
    (directory / "recipe.toml").write_text(RECIPE)
    before = Path.cwd()
    os.chdir(directory)
    yield directory
    os.chdir(before)


@pytest.fixture(scope="module")
def done(project: Path) -> RunResult:
    found = run("recipe.toml")
    assert found is not None
    return found


def names(done: RunResult, profile: str) -> list[str]:
    return [v.name for v in view(done.results, profile).variants]


def view(results: Results, profile: str) -> Any:
    return next(p for p in results.profiles if p.profile == profile)


def activations(file: Path) -> set[int]:
    """ONNX types of the zero points of everything that is quantized at run time."""
    model = onnx.load(file)
    constants = {i.name: i.data_type for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t.data_type
    return {constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"}


def test_each_branch_is_a_file_in_its_scheme_from_one_float_network(done: RunResult) -> None:
    artifacts = {a.path.name[3:-13]: a for a in map(Artifact.open, sorted(done.directory.glob("0*-*")))}
    assert list(artifacts) == STEPS
    floats = artifacts["teacher"].key
    assert artifacts["quantize.x86-u8s8"].manifest.parents["source"] == floats
    assert artifacts["quantize.arm-s8s8"].manifest.parents["source"] == floats
    u8, s8 = (artifacts[f"export.{s}"].file("model.onnx") for s in ("x86-u8s8", "arm-s8s8"))
    assert activations(u8) == {onnx.TensorProto.UINT8}
    assert activations(s8) == {onnx.TensorProto.INT8}


def test_each_profile_has_its_own_file_last_and_the_other_ones_beside_it(done: RunResult) -> None:
    assert names(done, HERE) == ["teacher", "quantize.arm-s8s8", "quantize.x86-u8s8"]
    for profile in (ELSEWHERE, SIGNED):
        assert names(done, profile) == ["teacher", "quantize.x86-u8s8", "quantize.arm-s8s8"]
    here = view(done.results, HERE)
    assert [v.scheme for v in here.variants] == [None, "arm-s8s8", "x86-u8s8"]
    assert [here.foreign(v) for v in here.variants] == [False, True, False]
    other, own = here.variants[1:]
    assert paired_ratio(other.latency.round_p50, own.latency.round_p50).value > 0  # timed in the same rounds
    assert Path(own.file).parent.name.startswith("03-export.x86-u8s8-")


def test_a_profile_of_another_machine_is_not_timed(done: RunResult) -> None:
    found = view(done.results, ELSEWHERE)
    assert found.elsewhere == "arm is aarch64, this machine is x86-64"
    for variant in found.variants:
        figures = (variant.latency, variant.speedup, variant.peak_memory_mb, variant.load_ms)
        assert figures == (None, None, None, None)
        assert (variant.throughput, variant.layers, variant.layer_times) == ({}, {}, [])
    same = {v.name: v for v in view(done.results, SIGNED).variants}
    for variant in found.variants:  # the file is the same, wherever it will run
        assert (variant.metrics, variant.size_mb) == (same[variant.name].metrics, same[variant.name].size_mb)
    assert not json.loads((done.directory / "samples.json").read_text())["profiles"].get(ELSEWHERE)


def test_rules_judge_each_profiles_file_and_leave_open_what_was_not_measured(done: RunResult) -> None:
    found = {(v.profile, v.rule): v for v in done.verdicts}
    judged = {profile: {v.variant for v in done.verdicts if v.profile == profile} for profile in (HERE, SIGNED)}
    assert judged == {HERE: {"quantize.x86-u8s8"}, SIGNED: {"quantize.arm-s8s8"}}
    assert {v.verdict for v in done.verdicts if v.profile != ELSEWHERE} == {"pass"}
    assert found[ELSEWHERE, "size_mb max"].verdict == "pass"
    for rule in ("latency.p50 max", "accuracy min"):
        open_still = found[ELSEWHERE, rule]
        assert (open_still.verdict, open_still.found) == ("inconclusive", None)
        assert open_still.shown == "not known: arm is aarch64, this machine is x86-64"
        assert str(open_still.hint).endswith("edgekd bench RUN --profile arm --host USER@DEVICE")
    assert found[ELSEWHERE, "accuracy min"].allowed == "≥ 1.00 %"
    assert done.exit_code == 4
    assert exit_code(gate_stored(done.directory, None, [])[1]) == 4
    assert exit_code(gate_stored(done.directory, None, ["x86.toml", "signed.toml"])[1]) == 0


def test_reports_say_which_file_is_whose(done: RunResult) -> None:
    texts = {f: render(done.results, done.verdicts, f) for f in ("text", "md", "html")}  # type: ignore[arg-type]
    for text in texts.values():
        assert "not measured here: arm is aarch64, this machine is x86-64" in text.replace("\\", "")
        assert "another profile's" in text.replace("&#39;", "'")
    (own,) = done.directory.glob("03-export.x86-u8s8-*")
    assert f"its file: quantize.x86-u8s8: {own / 'model.onnx'}" in texts["text"]
    document = json.loads(render(done.results, done.verdicts, "json"))
    assert document["files"][HERE] == str(own / "model.onnx")
    assert document["files"][ELSEWHERE] == document["files"][SIGNED] != document["files"][HERE]
    rows = list(csv.DictReader(io.StringIO(render(done.results, [], "csv"))))
    final = {r["profile"]: (r["variant"], r["scheme"]) for r in rows if r["final"] == "True"}
    assert final == {
        HERE: ("quantize.x86-u8s8", "x86-u8s8"),
        ELSEWHERE: ("quantize.arm-s8s8", "arm-s8s8"),
        SIGNED: ("quantize.arm-s8s8", "arm-s8s8"),
    }
    assert {r["elsewhere"] for r in rows if r["profile"] == ELSEWHERE} == {"arm is aarch64, this machine is x86-64"}


def test_the_same_command_again_does_nothing_and_says_so(done: RunResult) -> None:
    events: list[dict[str, Any]] = []
    again = run("recipe.toml", emit=events.append)
    assert again is not None
    assert [e["done"] for e in events if e["event"] == "stage"] == [True] * 5
    assert [e["done"] for e in events if e["event"] == "measured"] == [True]
    assert again.results == done.results


def test_until_and_from_take_a_stage_or_one_step_of_it(
    done: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(done.directory, copy)
    for step in copy.glob("0[1-4]-*"):
        shutil.rmtree(step)
    (copy / "results.json").unlink()

    def made() -> list[str]:
        return [p.name[3:-13] for p in sorted(copy.glob("0*-*"))]

    assert run("recipe.toml", directory=copy, until="quantize.x86-u8s8") is None
    assert made() == STEPS[:2]
    assert run("recipe.toml", directory=copy, until="quantize") is None
    assert made() == STEPS[:3]
    with pytest.raises(UsageError, match="--from export comes after --until quantize"):
        run("recipe.toml", directory=copy, start="export", until="quantize")
    events: list[dict[str, Any]] = []
    assert run("recipe.toml", directory=copy, start="quantize.arm-s8s8", until="quantize", emit=events.append) is None
    assert [e["stage"] for e in events if e["event"] == "made"] == ["quantize.arm-s8s8"]
    # The name of the last stage is the end of the run, which is measured then.
    monkeypatch.setattr("edgekd.runs._measured", lambda *_: done)
    assert run("recipe.toml", directory=copy, until="export") is done
    assert run("recipe.toml", directory=copy, until="export.x86-u8s8") is None


def test_a_source_with_several_schemes_must_be_named(done: RunResult) -> None:
    for text in (str(done.directory), f"{done.directory}:quantize"):
        with pytest.raises(UsageError, match="several quantization schemes") as caught:
            find_source(text, ("quantize",))
        assert f"{done.directory}:quantize.arm-s8s8" in str(caught.value.problem.hint)
    found = find_source(f"{done.directory}:quantize.arm-s8s8")
    assert found.artifact.manifest.config["scheme"] == "arm-s8s8"
    assert find_source(str(done.directory), ("teacher", "distill")).name == "teacher"


def test_export_of_one_branch_is_the_runs_own(done: RunResult) -> None:
    (mine,) = run_single("export", f"{done.directory}:quantize.arm-s8s8", None, None, None, [], None, quiet)
    assert [mine.path] == list(done.directory.glob("04-export.arm-s8s8-*"))


def test_quantize_alone_makes_one_artifact_per_scheme(done: RunResult, tmp_path: Path) -> None:
    # What the run's profiles want does not matter to a step that nobody judges.
    overrides = ['scheme=["trt-s8s8", "x86-u8s7"]', "heal.epochs=0", "calibration=64", "keep_float=false"]
    copy = tmp_path / "run"
    shutil.copytree(done.directory, copy)
    made = run_single("quantize", f"{copy}:teacher", None, None, None, overrides, None, quiet)
    assert [a.path.name[3:-13] for a in made] == ["quantize.trt-s8s8", "quantize.x86-u8s7"]
    assert all(a.path.parent == copy for a in made)
    (alone,) = made[:1]
    out = tmp_path / "out"
    for artifact in made:
        shutil.copytree(artifact.path, out / artifact.path.name)
    shutil.copy(copy / "recipe.toml", out)
    assert find_source(f"{out}:quantize.trt-s8s8").artifact.key == alone.key


@pytest.mark.parametrize(("profile", "branch"), [(HERE, "x86-u8s8"), (ELSEWHERE, "arm-s8s8"), (SIGNED, "arm-s8s8")])
def test_the_final_file_is_that_of_the_profile(done: RunResult, profile: str, branch: str) -> None:
    (export,) = done.directory.glob(f"*-export.{branch}-*")
    assert final_file(done.directory, profile).file == export / "model.onnx"


def test_a_baseline_is_measured_beside_the_file_of_each_profile(
    done: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd import gating

    seen: list[list[tuple[str, list[str]]]] = []
    real: Callable[..., Results] = gating.measure

    def watched(candidates: Any, profiles: Any, **more: Any) -> Results:
        seen.append([(c.artifact.path.name[3:-13], [p.name for p in profiles]) for c in candidates])
        return real(candidates, profiles, **more)

    monkeypatch.setattr(gating, "measure", watched)
    copy = tmp_path / "run"
    shutil.copytree(done.directory, copy)
    rules = {"latency": {"p50": {"regress": 0.99}}}
    _, verdicts = gate_run(copy, rules, [], str(done.directory), quiet)
    assert seen == [
        [("export.x86-u8s8", [HERE])] * 2,
        [("export.arm-s8s8", [ELSEWHERE, SIGNED])] * 2,
    ]
    assert [(v.profile, v.found is None) for v in verdicts] == [(HERE, False), (ELSEWHERE, True), (SIGNED, False)]
