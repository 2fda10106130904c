"""Student + teacher source + objectives as one module that gives a loss: all that a training loop needs to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from .errors import RecipeError, UsageError
from .models import Tapped
from .objectives import Objectives
from .objectives.spec import ObjectiveSpec
from .registry import validation_problems
from .teachers import Frozen

__all__ = ["Learner"]

Outputs = dict[str, Tensor]


class Learner(nn.Module):
    """`forward(batch) -> {"loss": scalar, part: scalar, ...}`; works in any training loop.

        learner = Learner.of(student, objectives=["ce", {"use": "kl", "tau": 2.0}], teacher=teacher, example=images)
        learner({"image": images, "label": labels})["loss"].backward()

    `learner.parameters()` are the student's and the adapters'; the teacher is no part of them, nor of the state dict,
    but moves between devices with the learner.
    """

    def __init__(self, student: nn.Module, objectives: Objectives, source: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        self.objectives = objectives
        self._source = (source,)  # in a tuple, so that it is no submodule: not saved, not trained

    @classmethod
    def of(
        cls,
        student: nn.Module,
        *,
        objectives: Sequence[Any],
        teacher: nn.Module | None = None,
        example: Tensor,
        source: Callable[[nn.Module], nn.Module] = Frozen,
        tap: Callable[[nn.Module, Sequence[str]], nn.Module] = Tapped,
    ) -> Learner:
        """Put a learner together: taps are checked and adapters sized by one dry forward of `example` [N, C, H, W].

        `objectives` are recipe entries (dicts, or names). `tap` wraps the student so that it returns a dict with its
        taps. Raises UsageError where an objective lacks its teacher, a tap does not exist, or outputs do not fit.
        """
        specs = parse_objectives(objectives)
        if not specs:
            raise UsageError("no objectives: nothing to learn", where="objectives", hint="at least 'ce'")
        weighted = Objectives(specs)
        if weighted.needs_teacher and teacher is None:
            raise UsageError("these objectives need a teacher", where="objectives", hint="give one, or use only 'ce'")
        teaching = None
        _check_taps(weighted, "student", student)
        if teacher is not None and weighted.needs_teacher:
            _check_taps(weighted, "teacher", teacher)
            teaching = source(Tapped(teacher, weighted.taps("teacher")))
        learner = cls(tap(student, weighted.taps("student")), weighted, teaching)
        learner._fit(example)
        return learner

    @property
    def source(self) -> nn.Module | None:
        return self._source[0]

    @torch.no_grad()
    def _fit(self, example: Tensor) -> None:
        training = self.student.training
        self.student.eval()
        student = self.student(example)
        self.student.train(training)
        batch = {"image": example, "label": torch.zeros(len(example), dtype=torch.int64), "view": 0}
        batch["index"] = torch.arange(len(example))
        teacher = self.source(batch, [student])[0] if self.source else {}
        if self.source and student["logits"].shape != teacher["logits"].shape:
            raise UsageError(
                f"the student gives {tuple(student['logits'].shape)} logits and the teacher "
                f"{tuple(teacher['logits'].shape)}",
                where="objectives",
                hint="both need the same classes in the same order",
            )
        self.objectives.fit(student, teacher)

    def forward(self, batch: dict[str, Any]) -> Outputs:
        """image [N, C, H, W] and label [N] -> {"loss": scalar, part name: scalar}."""
        student = _float(self.student(batch["image"]))
        source = self.source
        teacher = _float(source(batch, [student])[0]) if source is not None else {}
        return self.objectives(student, teacher, batch)

    def _apply(self, fn: Any, recurse: bool = True) -> Learner:
        if self.source is not None:
            self.source._apply(fn)
        return super()._apply(fn, recurse)


def _check_taps(objectives: Objectives, of: str, network: nn.Module) -> None:
    for place, module in zip(objectives.places, objectives.modules_list, strict=True):
        try:
            Tapped(network, getattr(module, f"{of}_taps", ()))
        except UsageError as error:
            raise UsageError(f"{of}: {error.problem.what}", where=f"{place}.{of}", hint=error.problem.hint) from error


def _float(outputs: Outputs) -> Outputs:
    # Under autocast outputs are bf16; softmax, squares and their sums want fp32.
    return {name: value.float() for name, value in outputs.items()}


def parse_objectives(entries: Sequence[Any], where: str = "objectives") -> list[Any]:
    """Recipe entries as ObjectiveSpec. Raises RecipeError with every problem."""
    try:
        return TypeAdapter(list[ObjectiveSpec]).validate_python(list(entries))
    except ValidationError as error:
        raise RecipeError(validation_problems(error, where)) from error
