"""Objectives as a recipe writes them, and their weighted sum as a module.

An objective is an `nn.Module` registered under the kind `objectives` with
`forward(student, teacher, batch) -> scalar`, where `student` and `teacher` are dicts of tensors (`logits [N, K]` and
tapped features by module path). It may say

- `needs_teacher = False` when it looks at labels only (the default is True);
- `student_taps` and `teacher_taps`: module paths whose outputs it wants to see;
- `fit(student, teacher)`: called once with the outputs of one dry forward, to size adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from ..errors import RecipeError, UsageError, nearest
from ..recipe import Component
from ..registry import bind

__all__ = ["ObjectiveSpec", "Objectives", "bind_objective"]

Outputs = dict[str, Tensor]


class _Objective(Component):
    weight: float = Field(1.0, ge=0, description="factor of this objective in the loss")
    on: str = Field("logits", description="the head that a logit objective looks at")


#: `{ use = "kl", weight = 0.9, tau = 4.0 }`, or just `"kl"`.
ObjectiveSpec = Annotated[_Objective, BeforeValidator(lambda v: {"use": v} if isinstance(v, str) else v)]


def bind_objective(spec: _Objective, where: str) -> nn.Module:
    """Build one objective. Raises UsageError (unknown name) or RecipeError (arguments), placed at `where`."""
    component, args, problems = bind("objectives", spec.use, spec.args, where)
    if problems:
        raise RecipeError(problems)
    return component(**args)


class Objectives(nn.Module):
    """The weighted sum of objectives, with its parts by name."""

    def __init__(self, specs: Sequence[_Objective], where: str = "objectives") -> None:
        super().__init__()
        self.weights = [spec.weight for spec in specs]
        self.heads = [spec.on for spec in specs]
        self.places = [f"{where}[{i}]" for i in range(len(specs))]
        made = [bind_objective(spec, place) for spec, place in zip(specs, self.places, strict=True)]
        self.modules_list = nn.ModuleList(made)
        uses = [spec.use for spec in specs]
        self.labels = [u if uses.count(u) == 1 else f"{u}-{i}" for i, u in enumerate(uses)]

    @property
    def needs_teacher(self) -> bool:
        return any(getattr(module, "needs_teacher", True) for module in self.modules_list)

    def taps(self, of: str) -> list[str]:
        """Module paths that the objectives want of the `student` or the `teacher`."""
        paths: list[str] = [p for module in self.modules_list for p in getattr(module, f"{of}_taps", ())]
        return list(dict.fromkeys(paths))

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Let objectives size their adapters from the outputs of one dry forward. Raises UsageError, placed."""
        for place, head, module in zip(self.places, self.heads, self.modules_list, strict=True):
            if head not in student:
                heads = student.keys() - {*self.taps("student")}
                raise UsageError(f"the student has no head {head!r}", where=f"{place}.on", hint=nearest(head, heads))
            fit = getattr(module, "fit", None)
            if callable(fit):
                try:
                    fit(student, teacher)
                except UsageError as error:
                    raise UsageError(error.problem.what, where=place, hint=error.problem.hint) from error

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Outputs:
        """Outputs of both and the batch -> {"loss": scalar, part name: scalar (unweighted)}."""
        parts = {}
        total: Tensor | float = 0.0
        for label, weight, head, module in zip(self.labels, self.weights, self.heads, self.modules_list, strict=True):
            part = module(_with_head(student, head), _with_head(teacher, head), batch)
            parts[label] = part.detach()
            total = total + weight * part
        assert isinstance(total, Tensor)
        return {"loss": total, **parts}


def _with_head(outputs: Outputs, head: str) -> Outputs:
    # A teacher without this head teaches it by its logits; that the student has it was checked by fit().
    return outputs if head == "logits" or head not in outputs else {**outputs, "logits": outputs[head]}
