"""`model = { use = "auto", ... }`: which member of a family it comes to, once for a run and for good."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .. import ranks
from ..artifact import ModelSpec, digest, write_atomically
from ..bench import Interval
from ..bench.env import BUSY
from ..data import Dataset
from ..errors import EdgekdError, Problem, RecipeError, StageError
from ..profile import Profile, load_profile
from ..recipe import Component
from ..registry import bind
from .front import Row, measured_family
from .table import Progress

__all__ = ["Choice", "chosen_students"]

AUTO = "auto"
#: What of a profile changes latencies, or which shapes are measured.
TELLING = {"runtime", "threads", "affinity", "scheme", "opset", "channel_multiple"}
#: The trials of a search lie two levels below it and share the students that it chose.
ABOVE = 2


class Choice(BaseModel):
    """What an `auto` was resolved to, as a run keeps it (`student-*.json`). `asked` is all that it depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = 1
    asked: dict[str, Any]
    name: str
    model: dict[str, Any]
    p50_ms: Interval
    speedup: Interval
    against: str
    macs: int
    parameters: int
    profile: str
    device: str
    runtime: str
    threads: int
    measured: str
    busy: float

    @property
    def text(self) -> str:
        """One line for a terminal."""
        precision, p50 = self.asked["precision"], self.p50_ms
        found = f"{p50.value:.3g} ms [{p50.low:.3g}, {p50.high:.3g}], {self.speedup.value:.3g}x {self.against}"
        place = f"measured on {self.profile}, {self.runtime}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        busy = f", while other programs kept {self.busy:.1f} cores busy" if self.busy > BUSY else ""
        return f"{self.name}: p50 {found}, {precision}, {place}{busy}"


def chosen_students(
    stage: Any,
    data: Dataset,
    profiles: Sequence[Profile],
    teacher: ModelSpec | None,
    directory: Path,
    where: str,
    *,
    measure: bool = True,
    progress: Progress | None = None,
) -> tuple[Any, list[Choice | None]]:
    """A distillation with every `auto` in place of which stands the network that was chosen, and each student's choice.

    A choice is stored in the run's `directory` before this returns, and read from there ever after: a measurement that
    moved does not change a run. Of several processes the first one chooses. Without `measure` one that is not stored
    yet raises an EdgekdError without problems. Raises RecipeError: what is asked makes no sense, or nothing meets it.
    """
    asked = list(_asked(stage))
    if not any(model is not None for _, model in asked):
        return stage, [None] * len(asked)
    resolve = partial(_resolved, asked, data, profiles, teacher, directory, where, measure, progress)
    choices, problems = ranks.from_first(resolve)
    if problems is not None:
        raise RecipeError(problems)
    found = [Component(**choice.model) if choice is not None else None for choice in choices]
    if not getattr(stage, "students", None):
        return stage.model_copy(update={"model": found[0]}), choices
    students = [
        student.model_copy(update={"model": model}) if model is not None else student
        for student, model in zip(stage.students, found, strict=True)
    ]
    return stage.model_copy(update={"students": students}), choices


def _asked(stage: Any) -> Iterator[tuple[str, Component | None]]:
    """Place and model of every student; None where it is not `auto`."""
    if stage.kind != "distill":
        return
    entries = [(f"students[{i}].model", s.model) for i, s in enumerate(stage.students)] or [("model", stage.model)]
    for place, model in entries:
        yield place, model if model is not None and model.use == AUTO else None


def _resolved(
    asked: Sequence[tuple[str, Component | None]],
    data: Dataset,
    profiles: Sequence[Profile],
    teacher: ModelSpec | None,
    directory: Path,
    where: str,
    measure: bool,
    progress: Progress | None,
) -> tuple[list[Choice | None], list[Problem] | None]:
    """Choices, or what is wrong (possibly nothing that is new: an empty list)."""
    problems: list[Problem] = []
    wants: list[tuple[str, dict[str, Any], Profile] | None] = []
    for place, model in asked:
        if model is None:
            wants.append(None)
            continue
        try:
            profile, want = _want(model, data, profiles, teacher, f"{where}.{place}")
            wants.append((f"{where}.{place}", want, profile))
        except EdgekdError as error:
            problems += error.problems
    if problems:
        return [], problems
    choices: list[Choice | None] = []
    for entry in wants:
        if entry is None:
            choices.append(None)
            continue
        place, want, profile = entry
        choice = _stored(directory, want)
        if choice is None and not measure:
            return [], []
        try:
            choices.append(_kept(choice or _chosen(want, profile, teacher, place, progress), directory))
        except EdgekdError as error:
            return [], [
                p if p.where.startswith(where) else Problem(place, str(p).partition("\n")[0], p.hint)
                for p in error.problems
            ]
    return choices, None


def _want(
    model: Component, data: Dataset, profiles: Sequence[Profile], teacher: ModelSpec | None, where: str
) -> tuple[Profile, dict[str, Any]]:
    """The profile, and all that a choice depends on beside measurements. Raises RecipeError or UsageError."""
    _, bound, problems = bind("models", AUTO, model.args, where)
    if problems:
        raise RecipeError(problems)
    p50_ms, speedup, precision = bound["p50_ms"], bound["speedup"], bound["precision"]
    if (p50_ms is None) == (speedup is None):
        what = "needs p50_ms or speedup" if p50_ms is None else "p50_ms and speedup exclude each other"
        raise RecipeError([Problem(where, what, "p50_ms = 0.5 in ms, or speedup = 4.0 against the first teacher")])
    if speedup is not None and teacher is None:
        raise RecipeError([Problem(f"{where}.speedup", "there is no teacher to compare with", "p50_ms = 0.5, in ms")])
    profile = load_profile(bound["profile"], f"{where}.profile") if bound["profile"] is not None else profiles[0]
    if precision not in profile.precisions:
        what = f"the profile {profile.name} does not have {precision}, only {', '.join(profile.precisions)}"
        raise RecipeError([Problem(f"{where}.precision", what, "precision = 'fp32'")])
    return profile, {
        "family": bound["family"],
        "p50_ms": p50_ms,
        "speedup": speedup,
        "precision": precision,
        "profile": profile.model_dump(mode="json", include=TELLING),
        "batch": profile.protocol.batch,
        "size": data.size,
        "classes": len(data.classes),
        "teacher": teacher.model_dump(mode="json") if speedup is not None and teacher is not None else None,
    }


def _chosen(
    want: dict[str, Any], profile: Profile, teacher: ModelSpec | None, where: str, progress: Progress | None
) -> Choice:
    """By what is measured now, or was before on this machine. Raises RecipeError where nothing is fast enough."""
    family, precision = want["family"], want["precision"]
    found = measured_family(
        family,
        profile,
        want["size"],
        want["classes"],
        precisions=[precision],
        teacher=teacher if want["speedup"] is not None else None,
        progress=progress,
    )
    rows: list[Row] = found["candidates"]
    fast = [row for row in rows if _meets(row["precisions"][precision], want)]
    if not fast:
        raise RecipeError([_none_fast(rows[0], want, profile, where)])
    best = max(fast, key=lambda row: (row["macs"], row["parameters"]))
    figures = best["precisions"][precision]
    return Choice(
        asked=want,
        name=best["name"],
        model={"use": family, **best["args"]},
        p50_ms=figures["p50_ms"],
        speedup=figures["speedup"],
        against=found["against"]["name"],
        macs=best["macs"],
        parameters=best["parameters"],
        profile=profile.name,
        device=found["device"],
        runtime=found["runtime"],
        threads=profile.threads,
        measured=found["measured"],
        busy=found["busy"],
    )


def _meets(figures: dict[str, Any], want: dict[str, Any]) -> bool:
    """As the gate judges: with the whole interval."""
    if want["p50_ms"] is not None:
        return bool(figures["p50_ms"]["high"] <= want["p50_ms"])
    return bool(figures["speedup"]["low"] >= want["speedup"])


def _none_fast(nearest: Row, want: dict[str, Any], profile: Profile, where: str) -> Problem:
    family, precision = want["family"], want["precision"]
    key, unit = ("p50_ms", " ms") if want["p50_ms"] is not None else ("speedup", "x")
    found = nearest["precisions"][precision][key]
    what = f"no {family} is that fast in {precision} on {profile.name}: the nearest, {nearest['name']}, has "
    what += f"{found['value']:.3g}{unit} [{found['low']:.3g}, {found['high']:.3g}], asked {want[key]:g}{unit}"
    hint = f"the front: edgekd students --family {family} --profile {profile.name}"
    return Problem(f"{where}.{key}", what, hint)


def _file(directory: Path, want: dict[str, Any]) -> Path:
    return directory / f"student-{digest(want)[:12]}.json"


def _stored(directory: Path, want: dict[str, Any]) -> Choice | None:
    """What this run, or the search that it is a trial of, has chosen. Raises StageError where the file is damaged."""
    for place in (directory, *list(directory.absolute().parents)[:ABOVE]):
        file = _file(place, want)
        if file.is_file():
            try:
                return Choice.model_validate_json(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                hint = "the stages that were made tell which it was: name that network instead of auto"
                raise StageError("the choice of a student is damaged", where=str(file), hint=hint) from error
    return None


def _kept(choice: Choice, directory: Path) -> Choice:
    """Store a choice, unless another process was first: then its choice holds."""
    file = _file(directory, choice.asked)
    if not file.is_file():
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(draft, choice.model_dump_json(indent=1) + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(draft, file)
        except OSError as error:
            hint = "choose another directory with -o DIR"
            raise StageError(f"cannot write to {directory}: {error.strerror}", hint=hint) from error
        finally:
            draft.unlink(missing_ok=True)
    return Choice.model_validate_json(file.read_text(encoding="utf-8"))
