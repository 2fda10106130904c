"""The gate at work: rules on a run or on files, with a baseline that is measured beside them or read from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .artifact import MANIFEST, Artifact
from .bench import Results, Samples, paired_ratio, ratios_known, round_medians
from .candidates import Candidate
from .data import Dataset, load
from .errors import UsageError, nearest
from .gate import OWN_METRICS, Baseline, RuleFor, Verdict
from .profile import Profile
from .recipe import Component, Recipe, load_recipe
from .registry import load_plugin
from .runs import bench_paths, find_source
from .scorecard import measure
from .tasks import make_task
from .verdicts import judge_results, judge_stored, rules_of, stored

__all__ = ["gate_files", "gate_run", "read_baseline"]

Emit = Callable[[dict[str, Any]], None]
BASELINE = "baseline"


def gate_run(
    directory: Path,
    rules: dict[str, Any] | None,
    profiles: Sequence[str],
    baseline: str | None,
    emit: Emit,
    *,
    other_machine: bool = False,
) -> tuple[Results, list[Verdict]]:
    """Verdicts on a run's results.json by `rules`, or by its recipe's; renews its gate.json and report.

    A `baseline` that is a model is measured now, interleaved with the run's final file, where a rule compares with it.
    Raises UsageError, RecipeError or StageError.
    """
    results, table, loaded, others = stored(directory, rules, profiles)
    against = None
    if baseline is not None:
        against = read_baseline(baseline, other_machine)
        asked = [r for r in rules_of(table, loaded, others) if r.bound == "regress"]
        if against is None and asked:
            recipe = load_recipe(directory / "recipe.toml")
            against = _measured_beside(directory, baseline, loaded, asked, recipe, emit)
    return results, judge_stored(directory, results, table, loaded, others, against)


def gate_files(
    paths: Sequence[str],
    rules: dict[str, Any],
    profiles: Sequence[str],
    baseline: str | None,
    emit: Emit,
    *,
    other_machine: bool = False,
) -> tuple[Results, list[Verdict]]:
    """Measurements of artifacts and ONNX files, and verdicts on the last one. Raises UsageError or StageError."""
    against = read_baseline(baseline, other_machine) if baseline is not None else None
    beside = [_model(baseline)] if baseline is not None and against is None else []

    def settle(devices: Sequence[Profile]) -> Callable[[str, Samples], bool] | None:
        asked = rules_of(rules, devices)  # a wrong rule is told before minutes go into measuring
        return _settled(asked, devices) if beside else None

    results = bench_paths(paths, profiles, emit, beside=beside, settle=settle, brief=True)
    loaded = [Profile.model_validate(p.settings) for p in results.profiles]
    if beside:
        pairs = [p.model_copy(update={"variants": [p.variants[-1], p.variants[-2]]}) for p in results.profiles]
        against = Baseline(results.model_copy(update={"profiles": pairs}), str(baseline), interleaved=True)
        ours = [p.model_copy(update={"variants": p.variants[:-1]}) for p in results.profiles]
        results = results.model_copy(update={"profiles": ours})
    return results, judge_results(results, rules, loaded, baseline=against)


def read_baseline(text: str, other_machine: bool = False) -> Baseline | None:
    """A baseline from a JSON document; None where `text` names a model to measure. Raises UsageError."""
    path = Path(text)
    if path.suffix == ".json":
        return Baseline(Results.read(path), text, other_machine=other_machine)
    if path.is_dir() and (path / "results.json").is_file() and not any(path.glob(f"*/{MANIFEST}")):
        return Baseline(Results.read(path / "results.json"), text, other_machine=other_machine)
    return None


def final_file(directory: Path, profile: str | None = None) -> Candidate:
    """The last variant of a run on a profile as its measurements name it, found without planning its recipe anew.

    A baseline's recipe may name files of another checkout, and may not name the profile: then its first one counts.
    Raises UsageError when nothing fits.
    """
    results = Results.read(directory / "results.json")
    measured = [p for p in results.profiles if p.variants]
    last = next((p.variants[-1] for p in [*(p for p in measured if p.profile == profile), *measured]), None)
    if last is None:
        raise UsageError(f"nothing was measured in {directory}", hint=f"edgekd bench {directory}")
    for manifest in sorted(directory.glob(f"*/{MANIFEST}")):
        artifact = Artifact.open(manifest.parent, verify=False)
        if artifact.key != last.key:
            continue
        artifact = Artifact.open(manifest.parent)
        if artifact.manifest.kind == "export":
            return Candidate(last.name, artifact.file("model.onnx"), artifact, takes="own")
        for file in sorted((directory / ".onnx").glob(f"*-{artifact.key[:12]}-*.onnx")):
            return Candidate(last.name, file, artifact)
    raise UsageError(
        f"the final file of {directory} is gone", hint=f"run it again: edgekd run {directory / 'recipe.toml'}"
    )


def _model(text: str, profile: str | None = None) -> Candidate:
    path = Path(text)
    if path.suffix == ".onnx":
        if not path.is_file():
            near = nearest(str(path), [str(p) for p in path.parent.glob("*.onnx")] if path.parent.is_dir() else [])
            raise UsageError(f"no baseline at {text}", where="--baseline", hint=near)
        return Candidate(BASELINE, path, None)
    if path.is_file() or (not path.exists() and ":" not in text):
        hint = "expected a run, an artifact, an .onnx file, or a JSON of `edgekd baseline update`"
        what = "neither a model nor a JSON" if path.is_file() else "no baseline there"
        raise UsageError(f"{text}: {what}", where="--baseline", hint=hint)
    if (path / "recipe.toml").is_file():
        return replace(final_file(path, profile), name=BASELINE)
    artifact = find_source(text).artifact
    if artifact.manifest.kind != "export":
        raise UsageError(f"{text} is no exported model", where="--baseline", hint="give the run that it lies in")
    return Candidate(BASELINE, artifact.file("model.onnx"), artifact, takes="own")


def _measured_beside(
    directory: Path,
    baseline: str,
    profiles: Sequence[Profile],
    rules: Sequence[RuleFor],
    recipe: Recipe,
    emit: Emit,
) -> Baseline:
    """Each profile's file of the baseline and of the run, in the same rounds; accuracies only where a rule asks."""
    data: Dataset | None = None
    for plugin in recipe.plugins:
        load_plugin(Path(plugin))
    if any(not r.metric.startswith("latency.") and r.metric not in OWN_METRICS for r in rules):
        data = load(recipe.data, recipe.seed)
    pairs: dict[tuple[Path, Path], list[Profile]] = {}
    owners: dict[tuple[Path, Path], list[Candidate]] = {}
    for profile in profiles:
        base, own = _model(baseline, profile.name), final_file(directory, profile.name)
        own = own if own.name != BASELINE else replace(own, name=f"{BASELINE}-now")
        pairs.setdefault((base.file, own.file), []).append(profile)
        owners[base.file, own.file] = [base, own]
    parts = [
        measure(
            owners[files],
            same,
            data=data,
            task=make_task(recipe.task if data is not None else Component(use="classification")),
            name=recipe.name,
            command="",
            emit=emit,
            settled=_settled(rules, same),
            brief=True,
        )
        for files, same in pairs.items()
    ]
    results = parts[0].model_copy(update={"profiles": [p for part in parts for p in part.profiles]})
    return Baseline(results, baseline, interleaved=True)


def _settled(rules: Sequence[RuleFor], profiles: Sequence[Profile]) -> Callable[[str, Samples], bool]:
    """When the rounds may end: ratios are known within the profile's precision, and no limit lies inside an interval.

    Only one look is taken at the verdict. Where it is open the rounds go on to the cap: whoever looks after every
    round and stops at the first clear answer finds differences that are not there.
    """
    precision = {p.name: p.protocol.precision for p in profiles}
    open_still: set[str] = set()

    def settled(profile: str, samples: Samples) -> bool:
        limits = [r.limit for r in rules if (r.profile, r.metric, r.bound) == (profile, "latency.p50", "regress")]
        if profile in open_still or not ratios_known(samples, precision[profile]):
            return False
        medians = round_medians(samples)
        own = next(name for name in reversed(medians) if name != BASELINE)
        worse = paired_ratio(medians[own], medians[BASELINE])
        if any(worse.low - 1 <= limit < worse.high - 1 for limit in limits):
            open_still.add(profile)
            return False
        return True

    return settled
