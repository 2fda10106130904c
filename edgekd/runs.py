"""A run on disk: carry out a recipe, find what a SOURCE names, measure, judge and report."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import ranks
from .artifact import MANIFEST, Artifact, locked, write_atomically
from .bench import Results, Samples, environment
from .bench.devices import with_devices
from .candidates import Candidate, arranged, candidate_of
from .errors import EdgekdError, UsageError, nearest
from .events import recording
from .forks import branch_of, ending_of
from .gate import Verdict, exit_code, write_gate
from .pipeline import Plan, plan, run_steps
from .profile import Profile, load_profile, lowest_opset
from .recipe import Component, Recipe, load_recipe, parse_recipe
from .report import render
from .scorecard import lineage_of, measure
from .tasks import make_task
from .verdicts import judge_results

__all__ = [
    "RunResult",
    "Source",
    "bench_paths",
    "bench_run",
    "candidates_at",
    "find_source",
    "measure_run",
    "open_run",
    "run",
    "run_candidates",
]

Emit = Callable[[dict[str, Any]], None]


def _quiet(event: dict[str, Any]) -> None:
    """Events of a run that nobody watches."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run left: measurements, verdicts and where everything lies."""

    directory: Path
    results: Results
    verdicts: list[Verdict]

    @property
    def exit_code(self) -> int:
        return exit_code(self.verdicts)


def run(
    recipe: Recipe | dict[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    directory: str | Path | None = None,
    emit: Emit = _quiet,
    start: str | None = None,
    until: str | None = None,
    force: bool = False,
    command: str | None = None,
) -> RunResult | None:
    """The whole line: stages, measurement, gate, report. None when `until` stops before the last stage.

    What is complete is not done again. Started by `torchrun` or `accelerate launch`, all processes train, and all get
    the result. Raises RecipeError (everything that is wrong with the recipe), UsageError or StageError.
    """
    with ranks.together():
        return _run(recipe, overrides, directory, emit, start, until, force, command)


def _run(
    recipe: Recipe | dict[str, Any] | str | Path,
    overrides: Sequence[str],
    directory: str | Path | None,
    emit: Emit,
    start: str | None,
    until: str | None,
    force: bool,
    command: str | None,
) -> RunResult | None:
    if isinstance(recipe, dict):
        recipe = parse_recipe(recipe, overrides)
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    planned = plan(recipe, Path(directory) if directory else None, emit=emit)
    # Processes beside the first tell nothing, so they record nothing.
    with recording(planned.directory, command or "edgekd.run", emit) as record, ranks.together():
        run_steps(planned, record, start=start, until=until, force=force)
        done = None
        if until is None or planned.called(until)[-1] is planned.steps[-1]:
            again = force or start is not None
            done = ranks.from_first(lambda: _measured(planned, record, command, again))
        record.write({"event": "end", "exit_code": done.exit_code if done is not None else 0, "error": None})
    return done


def _measured(planned: Plan, emit: Emit, command: str | None, again: bool) -> RunResult:
    with locked(planned.directory):
        results = measure_run(planned, emit, command=command, again=again)
        return _conclude(planned, results, emit)


def _conclude(planned: Plan, results: Results, emit: Emit) -> RunResult:
    results = with_devices(results, planned.directory)
    others = {load_profile(name).name for name in planned.recipe.profiles} - {p.name for p in planned.profiles}
    judged = judge_results(results, planned.recipe.gate, planned.profiles, sorted(others))
    verdicts = [v for v in judged if not v.rule.endswith(" regress")]  # a run has nothing to compare itself with
    if left := list(dict.fromkeys(v.rule for v in judged if v not in verdicts)):
        emit({"event": "unjudged", "rules": left, "path": str(planned.directory)})
    write_gate(planned.directory / "gate.json", verdicts)
    write_atomically(planned.directory / "report.html", render(results, verdicts, "html"))
    return RunResult(planned.directory, results, verdicts)


def measure_run(planned: Plan, emit: Emit = _quiet, *, command: str | None = None, again: bool = False) -> Results:
    """Measure every variant of a run, or take `results.json` where nothing has changed since. Raises StageError."""
    candidates = list(_candidates(planned))
    file = planned.directory / "results.json"
    if not again and file.exists():
        with contextlib.suppress(EdgekdError):
            earlier = Results.read(file)
            if _same(earlier, candidates, planned):
                emit({"event": "measured", "path": str(file), "done": True})
                return earlier
    lineage = [lineage_of(Artifact.open(s.directory, verify=False), s.name) for s in planned.steps]
    results = measure(
        candidates,
        planned.profiles,
        data=planned.data,
        task=planned.task,
        name=planned.recipe.name,
        command=command or f"edgekd run {planned.directory / 'recipe.toml'}",
        seed=planned.recipe.seed,
        lineage=lineage,
        emit=emit,
        samples=planned.directory / "samples.json",
    )
    results.write(file)
    emit({"event": "measured", "path": str(file), "done": False})
    return results


def _candidates(planned: Plan) -> Iterator[Candidate]:
    """One per stage; an `export` stands, at its own place, for the stage that it wrote out."""
    cache = planned.directory / ".onnx"
    shown = measured_names(planned)
    for step in planned.steps:
        if step.name in shown:
            name, opset = shown[step.name], lowest_opset(step.profiles)
            found = candidate_of(Artifact.open(step.directory), name, planned.data, opset, cache)
            yield replace(found, branch=planned.step(name).scheme)


def measured_names(planned: Plan) -> dict[str, str]:
    """The steps whose files are measured, and what each is called: an export as the stage that it wrote out."""
    exported: dict[str, str] = {}
    for step in planned.steps:
        source = step.parents.get("source")
        if step.stage.kind == "export" and isinstance(source, str):
            exported.setdefault(source, step.name)
    called = {export: source for source, export in exported.items()}
    return {step.name: called.get(step.name, step.name) for step in planned.steps if step.name not in exported}


def _same(earlier: Results, candidates: Sequence[Candidate], planned: Plan) -> bool:
    settings = [p.model_dump(mode="json") for p in planned.profiles]
    if [p.settings for p in earlier.profiles] != settings or earlier.environment.get("cpu") != environment().get("cpu"):
        return False
    for measured, profile in zip(earlier.profiles, planned.profiles, strict=True):
        found = [(v.name, v.key) for v in measured.variants]
        wanted = [(c.name, c.key, c.branch in ("", profile.scheme)) for c in arranged(candidates, profile)]
        # Another profile's file may have been left out.
        if [(name, key) for name, key, own in wanted if own or (name, key) in found] != found:
            return False
    return True


def open_run(directory: str | Path) -> Plan:
    """The plan of a run on disk. Raises UsageError when it is none."""
    directory = Path(directory)
    if not (directory / "recipe.toml").is_file():
        raise UsageError(f"no run at {directory}", hint=_known_runs(directory))
    return plan(load_recipe(directory / "recipe.toml"), directory)


def _known_runs(directory: Path) -> str:
    parent = directory.parent if directory.parent.is_dir() else Path("runs")
    runs = [str(p.parent) for p in parent.glob("*/recipe.toml")] if parent.is_dir() else []
    return nearest(str(directory), runs) or "make one with `edgekd run RECIPE`"


@dataclass(frozen=True)
class Source:
    """An artifact to go on from, its teacher, and the recipe that it was made by (None: it lies alone)."""

    artifact: Artifact
    teacher: Artifact | None
    recipe: Recipe | None
    name: str


def find_source(text: str, kinds: Sequence[str] | None = None) -> Source:
    """SOURCE: a run (its last stage of `kinds`), `RUN:stage` (any), or an artifact directory. Raises UsageError."""
    path = Path(text)
    if (path / MANIFEST).is_file():
        recipe_file = path.parent / "recipe.toml"
        recipe = load_recipe(recipe_file) if recipe_file.is_file() else None
        artifact = Artifact.open(path)
        return Source(artifact, _teacher_of(artifact), recipe, artifact.manifest.kind)
    run_text, colon, stage = ("", "", "") if path.is_dir() else text.rpartition(":")
    directory, kinds = (Path(run_text), None) if colon else (path, kinds)
    if (directory / "bundle.json").is_file():
        hint = f"python3 {directory / 'run.py'} on its device, or give edgekd bench also --host USER@DEVICE"
        raise UsageError(f"{text} is a bundle, which is measured where it is run", where="SOURCE", hint=hint)
    if not (directory / "recipe.toml").is_file():
        raise UsageError(f"no run, RUN:stage or artifact at {text}", where="SOURCE", hint=_known_runs(directory))
    recipe = load_recipe(directory / "recipe.toml")
    planned = plan(recipe, directory)
    found = {s.name: s.directory for s in planned.steps if s.done and (kinds is None or s.stage.kind in kinds)}
    forks = {s.group: [t.name for t in planned.steps if t.group == s.group] for s in planned.steps if s.scheme}
    whole = any(name != "teacher" for name in found)
    for name, beside in _made_alone(directory, kinds, planned):
        if not (whole and name in found):
            found.pop(name, None)
            found[name] = beside
    steps = [s.name for s in planned.steps if s.name in found]
    name = stage if colon else steps[-1] if whole else next(reversed(found), "")
    fork = next((names for group, names in forks.items() if stage == group or (not colon and name in names)), None)
    if fork is not None and name not in (found if colon else ()):
        what = f"{directory} goes on from there for several quantization schemes"
        raise UsageError(what, where="SOURCE", hint=f"name one: {' or '.join(f'{directory}:{n}' for n in fork)}")
    if name not in found:
        what = f"stage {stage!r} of {directory} is not there" if colon else f"nothing to go on from in {directory}"
        hint = f"edgekd run {directory / 'recipe.toml'} -o {directory}"
        raise UsageError(what, where="SOURCE", hint=f"there are: {', '.join(found)}" if found else hint)
    artifact = Artifact.open(found[name])
    return Source(artifact, _teacher_of(artifact), recipe, name)


def _made_alone(directory: Path, kinds: Sequence[str] | None, planned: Plan) -> list[tuple[str, Path]]:
    """Artifacts in a run that its recipe does not name (a single step made them), newest last."""
    own = {s.directory.name for s in planned.steps}
    manifests = sorted(directory.glob(f"*/{MANIFEST}"), key=lambda m: m.stat().st_mtime)
    others = [Artifact.open(m.parent, verify=False) for m in manifests if m.parent.name not in own]
    return [(_called(a), a.path) for a in others if kinds is None or a.manifest.kind in kinds]


def _called(artifact: Artifact) -> str:
    """`quantize`, or `quantize.trt-s8s8` where one command made several."""
    ending = ending_of(artifact) if branch_of(artifact) is not None else ""
    return f"{artifact.manifest.kind}.{ending}" if ending else artifact.manifest.kind


def _teacher_of(artifact: Artifact) -> Artifact | None:
    """The teacher's artifact beside this one, by the key in the manifest; a teacher teaches itself."""
    if artifact.manifest.kind == "teacher":
        return artifact
    keys = set(artifact.manifest.parents.values())
    for manifest in sorted(artifact.path.parent.glob(f"*/{MANIFEST}")):
        beside = Artifact.open(manifest.parent, verify=False)
        if beside.key in keys:
            found = beside if beside.manifest.kind == "teacher" else _teacher_of(beside)
            if found is not None:
                return Artifact.open(found.path)
    return None


def bench_run(directory: Path, profiles: Sequence[str], emit: Emit = _quiet) -> Results:
    """Measure a run anew and renew its results.json, gate.json and report. Raises UsageError or StageError."""
    planned = open_run(directory)
    if profiles:
        loaded = [load_profile(name, "--profile") for name in profiles]
        planned = replace(planned, profiles=loaded)
    _complete(planned)
    with locked(directory):
        results = measure_run(planned, emit, again=True)
        _conclude(planned, results, emit)
    return results


def _complete(planned: Plan) -> None:
    for step in planned.steps:
        if not step.done:
            command = f"edgekd run {planned.directory / 'recipe.toml'} -o {planned.directory}"
            raise UsageError(f"stage {step.name!r} of {planned.directory} is not complete", hint=command)


def bench_paths(
    paths: Sequence[str],
    profiles: Sequence[str],
    emit: Emit = _quiet,
    recipe: Recipe | None = None,
    *,
    beside: Sequence[Candidate] = (),
    settle: Callable[[Sequence[Profile]], Callable[[str, Samples], bool] | None] | None = None,
    brief: bool = False,
    samples: Path | None = None,
) -> Results:
    """Measure artifacts and ONNX files, ours or not, interleaved in one session; the first is the reference.

    Accuracy is measured where a recipe (given, or beside an artifact) names the data. `beside` is measured with them,
    last. `settle(profiles)` is asked, before anything is measured on them, for what ends their rounds (`measure`'s
    `settled`). Raises UsageError.
    """
    from .data import load

    found, recipe = candidates_at(paths, recipe, beside)
    data = load(recipe.data, recipe.seed) if recipe is not None else None
    names = list(profiles) or (recipe.profiles if recipe is not None else ["cpu-x86"])
    loaded = [load_profile(name, "--profile") for name in names]
    return measure(
        [*found, *beside],
        loaded,
        data=data,
        task=make_task(recipe.task if recipe is not None else Component(use="classification")),
        name=found[-1].name,
        command=shlex.join(["edgekd", *sys.argv[1:]]),
        emit=emit,
        settled=settle(loaded) if settle is not None else None,
        brief=brief,
        samples=samples,
    )


def candidates_at(
    paths: Sequence[str], recipe: Recipe | None = None, beside: Sequence[Candidate] = ()
) -> tuple[list[Candidate], Recipe | None]:
    """What RUN:stage, artifacts and ONNX files name, and the recipe given or found beside them.

    Names differ from each other and from those of `beside`. Raises UsageError.
    """
    from .data import load

    found: list[Candidate] = []
    for text in paths:
        path = Path(text)
        if path.suffix == ".onnx" or path.is_file():
            owner = _owner(path)
            written = path.parent.parent / "recipe.toml"
            if recipe is None and owner is not None and written.is_file():
                recipe = load_recipe(written)
            found.append(Candidate(_unique(path.stem, [*beside, *found]), path, owner))
            continue
        source = find_source(text)
        recipe = recipe or source.recipe
        if recipe is None and source.artifact.manifest.kind != "export":
            raise UsageError("no recipe beside this artifact names its data", where=text, hint="give --recipe FILE")
        name = _unique(source.name, [*beside, *found])
        if source.artifact.manifest.kind == "export":
            found.append(Candidate(name, source.artifact.file("model.onnx"), source.artifact, takes="all"))
        else:
            assert recipe is not None
            cache = source.artifact.path.parent / ".onnx"
            found.append(candidate_of(source.artifact, name, load(recipe.data, recipe.seed), 18, cache))
    return found, recipe


def run_candidates(planned: Plan) -> list[Candidate]:
    """The files of a run that are measured. Raises UsageError where a stage is not complete."""
    _complete(planned)
    return list(_candidates(planned))


def _owner(file: Path) -> Artifact | None:
    return Artifact.open(file.parent) if (file.parent / MANIFEST).is_file() else None


def _unique(name: str, taken: Sequence[Candidate]) -> str:
    names = {c.name for c in taken}
    return name if name not in names else next(f"{name}-{i}" for i in range(2, 1000) if f"{name}-{i}" not in names)
