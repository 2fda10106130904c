"""Students + teacher source + objectives as one module that gives a loss: all that a training loop needs to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from .attack import Attack
from .errors import EdgekdError, Problem, RecipeError, UsageError
from .models import Tapped
from .objectives import Objectives
from .objectives.spec import ObjectiveSpec, bind_objective
from .registry import validation_problems
from .teachers import Frozen, asks_network, make_source

__all__ = ["Learner", "Student", "objectives_of", "parse_objectives"]

Outputs = dict[str, Tensor]


class Student(NamedTuple):
    """A network to be trained, what for, and where a recipe says so."""

    network: nn.Module
    objectives: Sequence[Any]
    name: str = "student"
    where: str = "objectives"


class Learner(nn.Module):
    """`forward(batch) -> {"loss": scalar, part: scalar, ...}`; works in any training loop.

        learner = Learner.of(student, objectives=["ce", {"use": "kl", "tau": 2.0}], teacher=teacher, example=images)
        learner({"image": images, "label": labels})["loss"].backward()

    `learner.parameters()` are the students' and the adapters'; the teacher is no part of them, nor of the state dict,
    but moves between devices with the learner. A source that follows the students wants `learner.follow()` after
    every step.
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        objectives: Sequence[Objectives],
        source: nn.Module | None = None,
        *,
        names: Sequence[str] = ("student",),
        attack: Attack | None = None,
    ) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.objectives = nn.ModuleList(objectives)
        self.names = tuple(names)
        self.attack = attack
        self._source = (source,)  # in a tuple, so that it is no submodule: not saved, not trained

    @classmethod
    def of(
        cls,
        student: nn.Module,
        *,
        objectives: Sequence[Any],
        teacher: nn.Module | None = None,
        example: Tensor,
        source: Callable[..., nn.Module] = Frozen,
        tap: Callable[[nn.Module, Sequence[str]], nn.Module] = Tapped,
        images: int = 0,
        attack: Attack | None = None,
    ) -> Learner:
        """Put a learner together: taps are checked and adapters sized by one dry forward of `example` [N, C, H, W].

        `objectives` are recipe entries (dicts, or names). `source` is called with what its signature names of
        `network`, `networks`, `students` and `taps`. `tap` wraps the student so that it returns a dict with its taps.
        `images` is the size of the training set, which objectives with a memory want to know.
        Raises UsageError where an objective lacks its teacher, a tap does not exist, or outputs do not fit.
        """
        teachers = [] if teacher is None else [teacher]
        one = Student(student, objectives)
        return cls.fleet([one], teachers, example=example, source=source, tap=tap, images=images, attack=attack)

    @classmethod
    def fleet(
        cls,
        students: Sequence[Student],
        teachers: Sequence[nn.Module],
        *,
        example: Tensor,
        source: Callable[..., nn.Module] = Frozen,
        tap: Callable[[nn.Module, Sequence[str]], nn.Module] = Tapped,
        images: int = 0,
        attack: Attack | None = None,
    ) -> Learner:
        """The same for several students and teachers: one answer of the source per batch teaches all students."""
        weighted = objectives_of(students, teachers[:1] if asks_network(source) else None)
        asked = any(w.needs_teacher for w in weighted)
        if asked and asks_network(source) and not teachers:
            where = students[0].where
            raise UsageError("these objectives need a teacher", where=where, hint="give one, or use only 'ce'")
        networks = [tap(s.network, w.taps("student")) for s, w in zip(students, weighted, strict=True)]
        teaching = _teaching(source, teachers, networks, weighted) if asked else None
        learner = cls(networks, weighted, teaching, names=[s.name for s in students], attack=attack)
        first = teachers[0] if teachers else None
        for made, student in zip(weighted, students, strict=True):
            made.begin(student.network, first, max(images, len(example)))
        learner._fit(example)
        return learner

    @property
    def student(self) -> nn.Module:
        """The first student."""
        return self.students[0]

    @property
    def weighted(self) -> list[Objectives]:
        """Each student's objectives."""
        return list(self.objectives)  # type: ignore[arg-type]

    @property
    def source(self) -> nn.Module | None:
        return self._source[0]

    def follow(self) -> None:
        """Tell the source that the students have moved."""
        follow = getattr(self.source, "follow", None)
        if callable(follow):
            follow(list(self.students))

    @torch.no_grad()
    def _fit(self, example: Tensor) -> None:
        answers = [_in_evaluation(network, example) for network in self.students]
        batch = {"image": example, "label": torch.zeros(len(example), dtype=torch.int64), "view": 0}
        batch["index"] = torch.arange(len(example))
        teachers = self.source(batch, answers) if self.source else [{} for _ in answers]
        for objectives, student, teacher in zip(self.weighted, answers, teachers, strict=True):
            heads = {"logits", *objectives.heads}
            for head in heads & student.keys() & teacher.keys():
                if student[head].shape != teacher[head].shape:
                    raise UsageError(
                        f"the student gives {tuple(student[head].shape)} {head} and the teacher "
                        f"{tuple(teacher[head].shape)}",
                        where=objectives.places[0].rpartition("[")[0],
                        hint="both need the same classes in the same order",
                    )
            objectives.fit(student, teacher)

    def forward(self, batch: dict[str, Any]) -> Outputs:
        """image [N, C, H, W] and label [N] -> {"loss": scalar, part name: scalar}; parts carry their student's name
        where there are several."""
        answers = [_float(student(batch["image"])) for student in self.students]
        source = self.source
        found = source(batch, answers) if source is not None else [{} for _ in answers]
        shared = {id(f): _float(f) for f in found}  # most sources say the same to all
        teachers = [shared[id(f)] for f in found]
        total: Tensor | float = 0.0
        parts: Outputs = {}
        for i, name in enumerate(self.names):
            attacked = self._attacked(i, batch, teachers[i])
            made = self.weighted[i](answers[i], teachers[i], _with_taught(batch, teachers[i]), attacked)
            total = total + made["loss"]
            if len(self.names) == 1:
                return made
            parts.update({f"{name}.{part}": value.detach() for part, value in made.items()})
        assert isinstance(total, Tensor)
        return {"loss": total, **parts}

    def _attacked(self, i: int, batch: dict[str, Any], teacher: Outputs) -> Outputs | None:
        """What a student says to images that were changed to mislead it, where an objective wants that."""
        if self.attack is None or "adversarial" not in self.weighted[i].inputs:
            return None
        student = self.students[i]
        return _float(student(self.attack(student, batch["image"], teacher.get("logits"), batch["label"])))

    def _apply(self, fn: Any, recurse: bool = True) -> Learner:
        if self.source is not None:
            self.source._apply(fn)
        return super()._apply(fn, recurse)


def objectives_of(students: Sequence[Student], teacher: Sequence[nn.Module] | None) -> list[Objectives]:
    """Each student's objectives, with their taps checked. Raises RecipeError with the problems of all students.

    `teacher` holds the one whose features are taught, or nobody; None where students are taught by their own.
    """
    made: list[Objectives] = []
    problems: list[Problem] = []
    for student in students:
        try:
            made.append(Objectives(parse_objectives(student.objectives, student.where), student.where))
            if not made[-1].labels:
                raise UsageError("no objectives: nothing to learn", where=student.where, hint="at least 'ce'")
        except EdgekdError as error:
            problems += error.problems
            continue
        problems += _tap_problems(made[-1], "student", student.network)
        for network in [student.network] if teacher is None else teacher:
            problems += _tap_problems(made[-1], "teacher", network)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))  # students that share objectives share what is wrong
    return made


def _teaching(
    source: Callable[..., nn.Module],
    teachers: Sequence[nn.Module],
    networks: Sequence[nn.Module],
    weighted: Sequence[Objectives],
) -> nn.Module:
    taps = list(dict.fromkeys(t for w in weighted for t in w.taps("teacher")))
    tapped = [_tapped(t, taps if i == 0 else []) for i, t in enumerate(teachers)] if asks_network(source) else []
    return make_source(source, tapped, networks, taps)


def _tapped(teacher: nn.Module, taps: Sequence[str]) -> nn.Module:
    """The teacher with its taps; one that is wrapped already (to place its classes) is tapped inside."""
    inner = getattr(teacher, "network", None)
    if hasattr(teacher, "known") and isinstance(inner, nn.Module):
        teacher.network = Tapped(inner, taps)
        return teacher
    return Tapped(teacher, taps)


def _in_evaluation(network: nn.Module, example: Tensor) -> Outputs:
    training = network.training
    network.eval()
    found: Outputs = network(example)
    network.train(training)
    return found


def _tap_problems(objectives: Objectives, of: str, network: nn.Module) -> Iterator[Problem]:
    inner = getattr(network, "network", network) if hasattr(network, "known") else network
    for place, module in zip(objectives.places, objectives.modules_list, strict=True):
        for tap in dict.fromkeys(getattr(module, f"{of}_taps", ())):
            try:
                Tapped(inner, [tap])
            except UsageError as error:
                yield Problem(f"{place}.{of}", f"{of}: {error.problem.what}", error.problem.hint)


def _with_taught(batch: dict[str, Any], teacher: Outputs) -> dict[str, Any]:
    """The batch with the rows of an unlabelled pool of which the teacher is sure enough."""
    if "threshold" not in batch or "logits" not in teacher:
        return batch
    return {**batch, "taught": teacher["logits"].softmax(dim=1).amax(dim=1) >= batch["threshold"]}


def _float(outputs: Outputs) -> Outputs:
    # Under autocast outputs are bf16; softmax, squares and their sums want fp32.
    return {name: value.float() for name, value in outputs.items()}


def parse_objectives(entries: Sequence[Any], where: str = "objectives") -> list[Any]:
    """Recipe entries as ObjectiveSpec. Raises RecipeError with every problem, those of arguments included."""
    adapter, model = TypeAdapter(ObjectiveSpec), get_args(ObjectiveSpec)[0]
    specs: dict[str, Any] = {}
    problems: list[Problem] = []
    for i, entry in enumerate(entries):
        place = f"{where}[{i}]"
        try:
            specs[place] = adapter.validate_python(entry)
        except ValidationError as error:
            problems += validation_problems(error, place, model)
    if not problems:
        return list(specs.values())
    for place, spec in specs.items():
        try:
            bind_objective(spec, place)
        except EdgekdError as error:
            problems += error.problems
    raise RecipeError(problems)
