"""From a recipe's stages to steps: checked, keyed, each with what it builds on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .artifact import FORMAT, MANIFEST, Artifact, ModelSpec, digest, file_sha256
from .data import Dataset
from .drafts import collect
from .errors import Problem, RecipeError, UsageError, nearest
from .forks import Branch, branch_of, branches, ending_of, fork_problems, made_for
from .profile import Profile
from .recipe import Component, Recipe
from .registry import source_digests
from .stages import Context, Expert, Stage, Teaching
from .stages.caches import Cache, cache_of, clashes
from .stages.distill import DEFAULT_OBJECTIVES
from .stages.teaching import expert_of
from .students import Choice, chosen_students

__all__ = ["Step", "steps"]

#: How far means and standard deviations of images in [0, 1] may lie apart: those of another draw of the same data do.
CLOSE = 0.02


@dataclass(frozen=True)
class Step:
    """One step of a plan. `parents` maps roles to the names of earlier steps or to artifacts from elsewhere.

    Steps of one `group` are one stage of the recipe: the students of a fleet, which are run together, or a fork, one
    step per quantization `scheme`, each with the `profiles` that want it.
    """

    name: str
    stage: Stage
    config: dict[str, Any]
    key: str
    directory: Path
    parents: dict[str, str | Artifact]
    spec: ModelSpec | None
    group: str
    profiles: list[Profile]
    scheme: str = ""
    cache: Cache | None = None
    choice: Choice | None = None  # of a student that the recipe left to measurement

    @property
    def done(self) -> bool:
        return (self.directory / MANIFEST).is_file()

    @property
    def work(self) -> str:
        """What is run at once, as events and trackers name it: a fleet's stage, or one step of a fork."""
        return self.name if self.scheme else self.group


class _Building:
    """The steps so far, and what later ones may refer to."""

    def __init__(self, source: Artifact | None, teacher: Artifact | None) -> None:
        self.source, self.teacher = source, teacher
        self.steps: list[Step] = []
        self.specs: dict[str, ModelSpec | None] = {}
        self.experts: dict[str, Expert] = {}
        self.keys: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.fleet: list[str] = []  # the students of the last distillation
        self.caches: dict[str, Cache] = {}
        self.forks: dict[str, dict[str, str]] = {}  # stage -> scheme -> its step
        self.choices: dict[str, list[Choice | None] | None] = {}  # stage -> its students'; None: not found
        self.last: str | None = None
        self.distilled = Teaching(DEFAULT_OBJECTIVES, Component(use="frozen"))

    def fork_before(self, stage: Any) -> dict[str, str]:
        """The fork that a stage goes on from, as scheme -> step; empty where it is none."""
        return self.forks.get(getattr(stage, "after", None) or self.last or "", {}) if _goes_on(stage) else {}

    def scheme_before(self, stage: Any) -> tuple[str | None, str]:
        """The scheme of the one quantized network that a stage goes on from, and what ends its name for it."""
        after = getattr(stage, "after", None)
        if not _goes_on(stage) or after is None:
            alone = self.source if _goes_on(stage) and self.last is None else None
            return (branch_of(alone), ending_of(alone)) if alone is not None else (None, "")
        return next((step.scheme for step in self.steps if step.name == after), None) or None, ""

    def find(self, name: str, where: str, follows: Sequence[str] = (), scheme: str = "") -> str | Artifact:
        """What a recipe names: an earlier stage, or an artifact's directory. Raises UsageError.

        `follows`: kinds of artifacts without a float network that will do; `scheme` chooses among a fork's steps.
        """
        name = self.forks.get(name, {}).get(scheme, name)
        found: str | Artifact | None = name if name in self.specs else None
        if (Path(name) / MANIFEST).is_file() and found is None:
            found = Artifact.open(name)
        kind = found.manifest.kind if isinstance(found, Artifact) else self.kinds.get(name)
        # A quantize stage may have kept its network float, which is known when it is done.
        kept = isinstance(found, Artifact) and kind == "quantize" and found.manifest.quantization is None
        if kind in ("quantize", "export") and kind not in follows and not kept:
            raise UsageError(f"{name} holds no float network", where=where, hint="name the stage before it")
        if found is not None:
            return found
        hint = nearest(name, self.specs) or f"there are: {', '.join(self.specs)}"
        raise UsageError(f"no earlier stage and no artifact {name!r}", where=where, hint=hint)

    def parents(self, stage: Any, scheme: str, where: str) -> dict[str, str | Artifact]:
        """What a stage builds on, by role: `source`, `teacher`, `teacher.2`, ..., `start.NAME`. Raises RecipeError."""
        found: dict[str, str | Artifact] = {}
        if stage.kind == "teacher":
            return found
        last = self.forks.get(self.last or "", {}).get(scheme, self.last)
        before: str | Artifact | None = last or self.source
        named = {f"start.{name}": (name, place) for name, place in getattr(stage, "starts", {}).items()}
        if getattr(stage, "after", None):
            named["source"], before = (stage.after, "after"), None
        if before is not None and _goes_on(stage):
            found["source"] = before
        asked, place = (stage.heal, "heal.teacher") if hasattr(stage, "heal") else (stage, "teacher")
        for i, name in enumerate(getattr(asked, "teacher", None) or []):
            named[_teacher_role(i)] = (name, place)
        if hasattr(asked, "teacher") and not asked.teacher:
            found |= {_teacher_role(i): one for i, one in enumerate(self._every_teacher())}
        problems: list[Problem] = []
        for role, (name, place) in named.items():
            follows = stage.follows if role == "source" else ()
            one = collect(problems, where, partial(self.find, name, f"{where}.{place}", follows, scheme))
            if one is not None:
                found[role] = one
        if problems:
            raise RecipeError(problems)
        return found

    def _every_teacher(self) -> list[str | Artifact]:
        if self.source is not None:
            return [self.teacher] if self.teacher is not None else []
        return [step.name for step in self.steps if step.stage.kind == "teacher"]

    def expert(self, found: str | Artifact) -> Expert | None:
        """A teacher as far as it is known; None for a stage that failed its check."""
        # Another run's validation images may have trained it, or be other ones.
        return self.experts.get(found) if isinstance(found, str) else replace(expert_of(found), accuracy=None)

    def spec(self, found: str | Artifact | None) -> ModelSpec | None:
        return self.specs.get(found) if isinstance(found, str) else found.manifest.model if found is not None else None

    def finished(self, found: str | Artifact | None) -> bool:
        """Whether it holds an ONNX file instead of a network."""
        if isinstance(found, Artifact):
            return "model.onnx" in found.manifest.files
        return any(step.name == found and getattr(step.stage, "backend", "edgekd") != "edgekd" for step in self.steps)

    def scheme(self, found: str | Artifact | None) -> str | None:
        """What it is quantized by; None where it is float or not known."""
        if isinstance(found, Artifact):
            return made_for(found)
        return next((s.config["scheme"] for s in self.steps if s.name == found and s.stage.kind == "quantize"), None)

    def key(self, found: str | Artifact) -> str:
        return self.keys[found] if isinstance(found, str) else found.key

    def add(self, step: Step, data: Dataset) -> None:
        """Later stages may build on this one."""
        stage: Any = step.stage
        self.steps.append(step)
        self.specs[step.name], self.keys[step.name], self.kinds[step.name] = step.spec, step.key, stage.kind
        if step.spec is not None and stage.kind not in ("quantize", "export"):
            apart = stage.kind != "teacher" or stage.weights is None or stage.held_out
            classes = getattr(stage, "classes", None) or data.classes
            # Its accuracy is not known before it is there; any figure does for a check.
            accuracy = 0.5 if apart and len(data.validation) else None
            self.experts[step.name] = Expert(step.spec, step.key, classes, accuracy)


def steps(
    drafted: Sequence[tuple[str, Any, str]],
    recipe: Recipe,
    data: Dataset,
    profiles: list[Profile],
    directory: Path,
    source: Artifact | None,
    teacher: Artifact | None,
    problems: list[Problem],
    emit: Callable[[dict[str, Any]], None] | None = None,
) -> list[Step]:
    """Every stage as a step, the students of a fleet as one each; what is wrong is added to `problems`."""
    made = _Building(source, teacher)
    for name, draft, where in drafted:
        draft = _chosen(made, name, draft, where, data, profiles, directory, problems, emit)
        forked = branches(draft, made.fork_before(draft), *made.scheme_before(draft), profiles)
        found = [] if source is not None else list(fork_problems(draft, forked, profiles, where))
        for branch in forked:
            _add(made, name, branch, where, recipe, data, directory, found)
        problems += dict.fromkeys(found)  # what is wrong with every branch is told once
        own = [step for step in made.steps if step.group == name]
        if len(forked) > 1:
            made.forks[name], made.kinds[name] = {step.scheme: step.name for step in own}, draft.kind
        made.last = name if len(forked) > 1 else own[0].name
        if draft.kind == "distill":
            made.distilled, made.fleet = draft.carried, [step.name for step in own]
    return made.steps


def _chosen(
    made: _Building,
    name: str,
    draft: Any,
    where: str,
    data: Dataset,
    profiles: list[Profile],
    directory: Path,
    problems: list[Problem],
    emit: Callable[[dict[str, Any]], None] | None,
) -> Any:
    """A stage with networks in place of every `auto`. Nothing is measured for a recipe that is wrong already."""

    def progress(done: int, total: int) -> None:
        if emit is not None:
            emit({"event": "bench", "profile": f"students of {name}", "done": done, "total": total})

    teacher = made.spec(next(iter(made._every_teacher()), None))
    choose = partial(chosen_students, draft, data, profiles, teacher, directory, where, measure=not problems)
    found = collect(problems, where, partial(choose, progress=progress))
    made.choices[name] = found[1] if found is not None else None
    return found[0] if found is not None else draft


def _add(
    made: _Building,
    name: str,
    branch: Branch,
    where: str,
    recipe: Recipe,
    data: Dataset,
    directory: Path,
    problems: list[Problem],
) -> None:
    """The steps of one branch of a stage: one, or the students of a fleet."""
    stage = branch.stage.resolved(branch.profiles, made.distilled)
    if stage.kind == "average" and not stage.members:
        stage = stage.model_copy(update={"members": list(made.fleet)})
    parents = collect(problems, where, partial(made.parents, stage, branch.scheme, where))
    name_here = f"{name}.{branch.scheme}" if branch.scheme else name
    students = getattr(stage, "names", [])
    keys = {role: made.key(parent) for role, parent in (parents or {}).items()}
    first = 0 if made.source is None else 1 + _position(made.source)
    places = []
    for i, one in enumerate([f"{name}.{student}" for student in students] or [name_here]):
        config = {"use": stage.kind, **stage.model_dump(mode="json"), **({"student": i} if students else {})}
        key = _key(config, keys, recipe, data, stage.inputs())
        path = directory / f"{first + len(made.steps) + i:02d}-{one}-{key[:12]}"
        if made.source is not None:  # the run that it may lie in counts other branches too
            path = next(directory.glob(f"[0-9]*-{one}-{key[:12]}"), path)
        places.append((one, config, key, path))
    specs = []
    if parents is not None and made.choices[name] is not None:
        done = all((path / MANIFEST).is_file() for *_, path in places)
        specs = _checked(stage, parents, made, recipe, data, branch.profiles, where, problems, done)
    taught_by = [made.key(parent) for role, parent in (parents or {}).items() if role.startswith("teacher")]
    cache = cache_of(stage, taught_by, recipe, data, directory) if specs else None
    if cache is not None:
        place = f"{where}.{'heal.' if hasattr(stage, 'heal') else ''}source.directory"
        if all(problem.where != place for problem in problems):  # by what lies there already
            problems += clashes(cache, made.caches, place)
        made.caches[name_here] = cache
    for i, (one, config, key, path) in enumerate(places):
        spec = specs[i] if i < len(specs) else None
        choice = next(iter((made.choices[name] or [])[i:]), None)
        belongs = (name, branch.profiles, branch.scheme)
        step = Step(one, stage, config, key, path, parents or {}, spec, *belongs, cache, choice)
        made.add(step, data)


def _goes_on(stage: Any) -> bool:
    """Whether a stage begins with the network of another one."""
    return stage.kind not in ("teacher", "average") and not getattr(stage, "fresh", False)


def _checked(
    stage: Any,
    parents: dict[str, str | Artifact],
    made: _Building,
    recipe: Recipe,
    data: Dataset,
    profiles: list[Profile],
    where: str,
    problems: list[Problem],
    done: bool,
) -> list[ModelSpec | None]:
    """The networks that a stage will leave behind (one per student), as far as they are known."""
    foreign = [p for role, parent in parents.items() for p in _foreign(role, parent, made, stage, data, where)]
    if foreign:
        problems += dict.fromkeys(foreign)
        return []
    experts = [made.expert(parent) for role, parent in parents.items() if role.startswith("teacher")]
    starts = {r.removeprefix("start."): made.spec(p) for r, p in parents.items() if r.startswith("start.")}
    known = {name: spec for name, spec in starts.items() if spec is not None}
    if len(known) < len(starts) or None in experts:
        return []  # follows from what was said about them
    there = [expert for expert in experts if expert is not None]
    source = parents.get("source")
    kept = (made.finished(source), made.scheme(source))
    context = Context(recipe, data, profiles, there, made.spec(source), where, known, *kept, done)
    spec, found = stage.check(context)
    problems += found
    if spec is None or any(p.where.startswith((f"{where}.model", f"{where}.students")) for p in found):
        return []  # a network that fails would fail again in every later stage
    return stage.specs(context) if getattr(stage, "students", []) else [spec]


def _teacher_role(i: int) -> str:
    return "teacher" if i == 0 else f"teacher.{i + 1}"


def _foreign(
    role: str, parent: str | Artifact, made: _Building, stage: Any, data: Dataset, where: str
) -> Iterator[Problem]:
    """What does not fit in an artifact from elsewhere that a recipe names by its directory."""
    if isinstance(parent, str) or parent in (made.source, made.teacher):
        return
    teaches = role.startswith("teacher")
    own = "after" if role == "source" else getattr(stage, "starts", {}).get(role.removeprefix("start."), "")
    place = f"{where}.{'heal.teacher' if hasattr(stage, 'heal') else 'teacher'}" if teaches else f"{where}.{own}"
    manifest = parent.manifest
    seen, name = manifest.preprocessing, parent.path
    if seen.size != data.size:
        own, other = ("x".join(map(str, size)) for size in (seen.size, data.size))
        yield Problem(place, f"{name} was made for images of {own}, the data have {other}", "resize one of them")
        return
    unknown = [c for c in manifest.classes if c not in data.classes]
    if unknown or (manifest.classes != data.classes and not teaches):
        what = f"knows the class {unknown[0]!r}, the data do not" if unknown else "has other classes than the data"
        hint = nearest(unknown[0], data.classes) if unknown else "the same classes in the same order are needed"
        yield Problem(place, f"{name} {what}", hint)
    gaps = [abs(a - b) for a, b in zip([*seen.mean, *seen.std], [*data.mean, *data.std], strict=True)]
    if max(gaps) > CLOSE:
        wanted = f"data.normalize = {{ mean = {_rounded(seen.mean)}, std = {_rounded(seen.std)} }}"
        yield Problem(place, f"{name} was trained with another normalisation", wanted)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _position(source: Artifact) -> int:
    """The number in front of an artifact's directory: its place in the run that made it."""
    number = source.path.name.partition("-")[0]
    return int(number) if number.isdigit() else 0


def _key(config: dict[str, Any], parents: dict[str, str], recipe: Recipe, data: Dataset, inputs: dict[str, str]) -> str:
    return digest(
        {
            "format": FORMAT,
            "config": _telling(config),
            "parents": parents,
            "data": data.fingerprint,
            "batches": recipe.data.model_dump(mode="json", include={"batch", "augment"}),
            "normalize": [data.mean, data.std],
            "task": recipe.task.model_dump(mode="json"),
            "seed": recipe.seed,
            "inputs": inputs,
            "plugins": [file_sha256(Path(plugin)) for plugin in recipe.plugins if Path(plugin).is_file()],
            "sources": sorted(source_digests([config, recipe.task.model_dump(), recipe.data.model_dump()])),
        }
    )


def _telling(value: Any) -> Any:
    """A config without what changes no result: how often a checkpoint is written, and where a teacher cache lies."""
    if not isinstance(value, dict):
        return value
    silent = {"checkpoint_s", "directory"} if value.get("use") == "cached" else {"checkpoint_s"}
    return {k: _telling(v) for k, v in value.items() if k not in silent}
