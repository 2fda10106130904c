"""The stage `distill`: train a student, or several at once, with teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..artifact import Artifact, ModelSpec
from ..attack import AttackSpec
from ..checkpoint import metrics_file
from ..data import Dataset, Mixed, Stream, Unlabelled, loaded, open_stream
from ..errors import EdgekdError, Problem, RecipeError
from ..learner import Student, parse_objectives
from ..models import build, specify
from ..objectives import Objectives
from ..profile import Profile
from ..recipe import Component, ComponentField, Training
from ..registry import register, resolve
from .teaching import Context, Names, Teaching, learner_problems, load_network
from .workspace import Workspace

__all__ = ["DEFAULT_OBJECTIVES", "Distill"]

DEFAULT_OBJECTIVES: list[dict[str, Any]] = [{"use": "ce", "weight": 0.1}, {"use": "kl", "weight": 0.9, "tau": 4.0}]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class StudentSpec(BaseModel):
    """One student of several: a new network (`model`), or an earlier stage's (`start`), which goes on learning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str | None = Field(None, pattern=NAME, description="names its stage distill.NAME; default: its number from 1")
    model: ComponentField | None = None
    start: str | None = Field(None, description="an earlier stage whose network and weights it begins with")
    objectives: list[Any] | None = Field(None, description="default: those of the stage")


@register("stages", "distill")
class Distill(Training):
    """Train a student towards its teacher; without `model` the network at hand goes on learning."""

    kind: ClassVar[str] = "distill"
    follows: ClassVar[tuple[str, ...]] = ("teacher", "distill", "prune", "fuse")

    model: ComponentField | None = Field(None, description="the student; default: the source's network")
    students: list[StudentSpec] = Field(default=[], description="several students in one pass, instead of `model`")
    objectives: list[Any] = Field(default=DEFAULT_OBJECTIVES, min_length=1)
    source: ComponentField = Field(Component(use="frozen"), description="where the teacher's answers come from")
    teacher: Names | None = Field(
        None, description="stages, or directories of artifacts, that teach; default: every [[teacher]]"
    )
    attack: AttackSpec | None = Field(None, description='what makes images for objectives with input = "adversarial"')
    unlabelled: Unlabelled | None = Field(None, description="a pool of images beside the labelled ones")
    mix: list[Mixed] = Field(default=[], description="further labelled data sets")
    after: str | None = Field(None, description="the stage to go on from; default: the one before")

    @property
    def names(self) -> list[str]:
        """The students' names; empty where there is one."""
        return [s.name or str(i + 1) for i, s in enumerate(self.students)]

    @property
    def starts(self) -> dict[str, str]:
        """The stages that students begin with, and where each is named."""
        return {s.start: f"students[{i}].start" for i, s in enumerate(self.students) if s.start is not None}

    @property
    def fresh(self) -> bool:
        """Whether it starts from networks of its own."""
        return self.model is not None or bool(self.students)

    @property
    def teaching(self) -> Teaching:
        """What its training asks of teachers."""
        return Teaching(self.objectives, self.source, self.teacher, self.attack)

    @property
    def carried(self) -> Teaching:
        """What later stages take over: where its source needs students that learn together, they ask the teacher."""
        try:
            component, _ = resolve("teachers", self.source.use)
        except EdgekdError:  # told by the check
            return self.teaching
        source = self.source if getattr(component, "carries", True) else Component(use="frozen")
        return self.teaching._replace(source=source)

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """Students must build, taps must exist, and outputs must fit the teachers'."""
        where = context.where
        problems = list(self._shape_problems(where))
        streams: list[Stream] = []
        made: list[tuple[str, ModelSpec, list[Any], str]] = []
        try:
            streams = self._streams(context.data, where)
        except EdgekdError as error:
            problems += error.problems
        try:
            made = [] if problems and self.students else self._students(context)
        except EdgekdError as error:
            return None, [*problems, *error.problems]
        if not made:
            return None, problems
        problems += learner_problems(made, self.teaching, self, context, where, streams)
        problems += self._unused(made, len(context.teachers), where)
        return made[0][1], problems

    def _unused(
        self, made: Sequence[tuple[str, ModelSpec, list[Any], str]], teachers: int, where: str
    ) -> Iterator[Problem]:
        """What would train on without a word although the recipe means something else by it."""
        try:
            objectives = [Objectives(parse_objectives(entries)) for _, _, entries, _ in made]
        except EdgekdError:
            return  # told already
        asked = any(o.needs_teacher for o in objectives)
        hint = 'for example { use = "kl", tau = 4.0 }'
        if not asked and "source" in self.model_fields_set:
            yield Problem(f"{where}.source", "no objective asks a teacher", hint)
        if self.unlabelled is not None and not asked and not any(o.taps("student") for o in objectives):
            yield Problem(f"{where}.unlabelled", "every objective looks at labels, these images have none", hint)
        heads = {head for o in objectives for head in o.heads}
        for i, mixed in enumerate(self.mix):
            if mixed.on not in heads:
                what = f"no objective is for the head {mixed.on!r}"
                yield Problem(f"{where}.mix[{i}].on", what, f'{{ use = "ce", on = "{mixed.on}" }}')
        sets = 1 + len(self.mix) + (self.unlabelled is not None)
        if self.source.use == "ensemble" and self.source.args.get("combine") == "source" and teachers != sets:
            what = f"{teachers} teachers for {sets} data sets (the main one, those of mix, the unlabelled one)"
            yield Problem(f"{where}.source.combine", what, "one for each, in this order; one may be named twice")
        if sets > 1 and self.source.use == "cached":
            yield Problem(f"{where}.source", "a cached teacher has not seen the further images", "source = 'frozen'")

    def specs(self, context: Context) -> list[ModelSpec]:
        """The students' networks, in their order."""
        return [spec for _, spec, _, _ in self._students(context)]

    def _shape_problems(self, where: str) -> Iterator[Problem]:
        if self.epochs == 0:
            yield Problem(f"{where}.epochs", "must be at least 1, got 0", "how often all training images are seen")
        if self.model is not None and self.students:
            yield Problem(f"{where}.students", "stands beside model", "put the model among the students")
        if len(set(self.names)) < len(self.names):
            yield Problem(f"{where}.students", "two students have the same name", "give them different ones")
        for i, student in enumerate(self.students):
            if (student.model is None) == (student.start is None):
                yield Problem(
                    f"{where}.students[{i}]", "needs either model or start", "model = { use = 'cifar-resnet' }"
                )

    def _students(self, context: Context) -> list[tuple[str, ModelSpec, list[Any], str]]:
        """Name, spec, objectives and their place, of each student. Raises UsageError or RecipeError."""
        where = context.where
        if not self.students:
            spec = self._specified(self.model, context.data, f"{where}.model") if self.model else context.source
            return [] if spec is None else [("student", spec, self.objectives, f"{where}.objectives")]
        made = []
        problems: list[Problem] = []
        for i, (name, student) in enumerate(zip(self.names, self.students, strict=True)):
            place = f"{where}.students[{i}]"
            try:
                if student.model is not None:
                    spec = self._specified(student.model, context.data, f"{place}.model")
                else:
                    spec = context.starts[student.start or ""]
            except EdgekdError as error:
                problems += error.problems
                continue
            own = student.objectives is not None
            place = f"{place}.objectives" if own else f"{where}.objectives"
            made.append((name, spec, student.objectives if own else self.objectives, place))
        if problems:
            raise RecipeError(problems)
        return made  # type: ignore[return-value]

    def _specified(self, model: Component, data: Dataset, where: str) -> ModelSpec:
        return specify(model.use, model.args, classes=len(data.classes), size=data.size, where=where)

    def _streams(self, data: Dataset, where: str) -> list[Stream]:
        made: list[Stream] = []
        problems: list[Problem] = []
        offset = len(data.train)
        entries = [(m, f"{where}.mix[{i}]") for i, m in enumerate(self.mix)]
        if self.unlabelled is not None:
            entries.append((self.unlabelled, f"{where}.unlabelled"))  # type: ignore[arg-type]
        for number, (entry, place) in enumerate(entries, 1):
            try:
                made.append(open_stream(entry, data, number, offset, place))
            except EdgekdError as error:
                problems += error.problems
                continue
            offset += len(made[-1].data.train)
        if problems:
            raise RecipeError(problems)
        return made

    def inputs(self) -> dict[str, str]:
        """Digests of further data."""
        entries: list[Any] = [*self.mix, *([self.unlabelled] if self.unlabelled is not None else [])]
        return {f"data {i}": stream_fingerprint(entry) for i, entry in enumerate(entries)}

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Distill:
        """Nothing is left open."""
        return self

    def run(self, workspace: Workspace) -> Artifact:
        """Build or take over the students, train them, keep the better weights.

        Each begins as it would alone. On a CPU it also ends so, to the bit, unless dropout, an attack or adapters draw
        random numbers in between.
        """
        everyone = [workspace, *workspace.siblings]
        specs, students = [], []
        for position in range(len(everyone)):
            # Two equal networks must not be twins: they would have nothing to tell each other.
            twins = sum(s.model == self.students[position].model for s in self.students[:position])
            torch.manual_seed(workspace.recipe.seed + twins)
            spec, student = self._begun(workspace, position)
            specs.append(spec)
            students.append(student)
        streams = self._streams(workspace.data, "distill")
        images = len(workspace.data.train) + sum(len(s.data.train) for s in streams)
        learner = workspace.learner(students, self.teaching, images=images)
        done = workspace.train(learner, self, streams=streams)
        # The first one last: with it the checkpoint goes, so that a run killed here saves them all again.
        for position, one in reversed(list(enumerate(everyone))):
            history = workspace.partial / metrics_file(position)
            network, metrics = students[position].network, done[position].metrics
            saved = one.save(network, specs[position], metrics=metrics, history=history)
        return saved

    def _begun(self, workspace: Workspace, position: int) -> tuple[ModelSpec, Student]:
        entry = self.students[position] if self.students else None
        model = entry.model if entry is not None else self.model
        name = self.names[position] if entry is not None else "student"
        objectives = entry.objectives if entry is not None and entry.objectives is not None else self.objectives
        if model is not None:
            spec = self._specified(model, workspace.data, "distill.model")
            network = build(spec)
        else:
            start = workspace.parents[f"start.{entry.start}" if entry is not None else "source"]
            spec, network = start.manifest.model, load_network(start)
        return spec, Student(network, objectives, name, "distill.objectives")


def stream_fingerprint(entry: Unlabelled | Mixed) -> str:
    """sha256 of a stream's data; empty where it cannot be loaded (`check` says so)."""
    try:
        return loaded(entry).fingerprint
    except EdgekdError:
        return ""
