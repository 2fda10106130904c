"""Objectives as a recipe writes them, and their weighted sum as a module.

An objective is an `nn.Module` registered under the kind `objectives` with
`forward(student, teacher, batch) -> scalar, or one value per row [N]`, where `student` and `teacher` are dicts of
tensors (`logits [N, K]` and tapped features by module path). It may say

- `needs_teacher = False` when it looks at labels only (the default is True);
- `student_taps` and `teacher_taps`: module paths whose outputs it wants to see;
- `begin(student, teacher, images)`: called once with the bare networks and the number of training images;
- `fit(student, teacher)`: called once after that with the outputs of one dry forward, to size adapters;
- `snippet`: the lines of a `[[stage]]` table that `edgekd show` gives as an example, and `Source:` in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from ..errors import EdgekdError, Problem, RecipeError, UsageError, nearest
from ..recipe import Component
from ..registry import bind
from .rules import Rule, rule

__all__ = ["ObjectiveSpec", "Objectives", "bind_objective"]

Outputs = dict[str, Tensor]


class _Objective(Component):
    weight: Rule = Field(1.0, description="factor in the loss: a number from 0 up, or a rule")
    on: str = Field("logits", description="the head that a logit objective looks at")
    input: Literal["clean", "adversarial"] = Field(
        "clean", description="the student's images: as they are, or attacked"
    )


#: `{ use = "kl", weight = 0.9, tau = 4.0 }`, or just `"kl"`.
ObjectiveSpec = Annotated[_Objective, BeforeValidator(lambda v: {"use": v} if isinstance(v, str) else v)]


def bind_objective(spec: _Objective, where: str) -> nn.Module:
    """Build one objective. Raises UsageError (unknown name) or RecipeError (arguments), placed at `where`."""
    component, args, problems = bind("objectives", spec.use, spec.args, where)
    if problems:
        raise RecipeError(problems)
    return _placed(partial(component, **args), where)  # type: ignore[no-any-return]


def _placed(call: Callable[[], Any], where: str) -> Any:
    """The call's result; its errors are placed below `where`."""
    try:
        return call()
    except EdgekdError as error:
        placed = [Problem(f"{where}.{p.where}".rstrip("."), p.what, p.hint) for p in error.problems]
        raise RecipeError(placed) from error


class Objectives(nn.Module):
    """The weighted sum of objectives, with its parts by name."""

    def __init__(self, specs: Sequence[_Objective], where: str = "objectives") -> None:
        super().__init__()
        self.heads = [spec.on for spec in specs]
        self.inputs = [spec.input for spec in specs]
        self.places = [f"{where}[{i}]" for i in range(len(specs))]
        problems: list[Problem] = []
        self.modules_list, self.weights = nn.ModuleList(), nn.ModuleList()
        for spec, place in zip(specs, self.places, strict=True):
            try:
                self.modules_list.append(bind_objective(spec, place))
                self.weights.append(_placed(partial(rule, spec.weight, "weight"), place))
            except EdgekdError as error:
                problems += error.problems
        if problems:
            raise RecipeError(problems)
        uses = [spec.use for spec in specs]
        self.labels = [u if uses.count(u) == 1 else f"{u}-{i}" for i, u in enumerate(uses)]

    @property
    def needs_teacher(self) -> bool:
        return any(self._needs_teacher(i) for i in range(len(self.labels)))

    def _needs_teacher(self, i: int) -> bool:
        rules = [*self.weights[i].modules(), *list(self.modules_list[i].modules())[1:]]
        asked = any(getattr(module, "needs_teacher", False) for module in rules)
        return asked or getattr(self.modules_list[i], "needs_teacher", True)

    def taps(self, of: str) -> list[str]:
        """Module paths that the objectives want of the `student` or the `teacher`."""
        paths: list[str] = [p for module in self.modules_list for p in getattr(module, f"{of}_taps", ())]
        return list(dict.fromkeys(paths))

    def too_long(self, epochs: int) -> Iterator[Problem]:
        """Rules that would not end within a training of so many epochs."""
        for place, weight, module in zip(self.places, self.weights, self.modules_list, strict=True):
            for key, part in (("weight", weight), ("tau", module)):
                until = max((getattr(m, "until", 0.0) for m in part.modules()), default=0.0)
                if until > epochs:
                    what = f"goes on to epoch {until:g}, the training has {epochs}"
                    yield Problem(f"{place}.{key}.epochs", what, "leave epochs out: then it fills the training")

    def begin(self, student: nn.Module, teacher: nn.Module | None, images: int) -> None:
        """Let objectives see the bare networks and the size of the training set. Raises RecipeError, placed."""
        for place, module in zip(self.places, self.modules_list, strict=True):
            begin = getattr(module, "begin", None)
            if callable(begin):
                _placed(partial(begin, student, teacher, images), place)

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Let objectives size their adapters from the outputs of one dry forward. Raises UsageError, placed."""
        for place, head, module in zip(self.places, self.heads, self.modules_list, strict=True):
            if head not in student:
                heads = student.keys() - {*self.taps("student")}
                raise UsageError(f"the student has no head {head!r}", where=f"{place}.on", hint=nearest(head, heads))
            missing = [tap for tap in getattr(module, "teacher_taps", ()) if tap not in teacher]
            if missing:
                what = f"this teacher source gives logits only, not {missing[0]!r}"
                raise UsageError(what, where=f"{place}.teacher", hint="source = 'frozen', or objectives on logits")
            fit = getattr(module, "fit", None)
            if callable(fit):
                try:
                    fit(_with_head(student, head), _with_head(teacher, head))
                except UsageError as error:
                    raise UsageError(error.problem.what, where=place, hint=error.problem.hint) from error

    def forward(
        self, student: Outputs, teacher: Outputs, batch: dict[str, Any], attacked: Outputs | None = None
    ) -> Outputs:
        """Outputs of both and the batch -> {"loss": scalar, part name: scalar (unweighted)}.

        `attacked` is what the student says to the adversarial images. Rows count for nothing that `batch["taught"]` [N]
        leaves out, where a teacher is asked, and those of another head's data (`batch["of"]`).
        """
        parts = {}
        total: Tensor = student["logits"].sum() * 0.0
        for i, label in enumerate(self.labels):
            seen = attacked if self.inputs[i] == "adversarial" and attacked is not None else student
            s, t, b = (_with_head(found, self.heads[i]) for found in (seen, teacher, batch))
            b = _with_labels(b, self.heads[i])
            rows, share = self._counted(i, batch)
            if rows is not None:
                s, t, b = ({k: _rows(v, rows) for k, v in found.items()} for found in (s, t, b))
            if share == 0.0:
                parts[label] = total.detach() * 0.0
                continue
            part = self.modules_list[i](s, t, b)
            weight = self.weights[i](s, t, b).to(part)
            if weight.ndim and not part.ndim:
                what = f"{label} gives one number for the whole batch, its weight one per image"
                raise UsageError(what, where=f"{self.places[i]}.weight", hint="weigh it by a number or a schedule")
            parts[label] = part.detach().mean() * share
            total = total + (weight * part).mean() * share
        return {"loss": total, **parts}

    def _counted(self, i: int, batch: dict[str, Any]) -> tuple[Tensor | None, float]:
        """The rows that an objective looks at (None: all), and their share of the batch."""
        rows = batch.get("of", {}).get(self.heads[i])
        if "taught" in batch and self._needs_teacher(i):
            rows = batch["taught"] if rows is None else rows & batch["taught"]
        if rows is None or bool(rows.all()):
            return None, 1.0
        return rows, int(rows.sum()) / len(rows)


def _with_head(outputs: dict[str, Any], head: str) -> dict[str, Any]:
    # A teacher without this head teaches it by its logits; that the student has it was checked by fit().
    return outputs if head == "logits" or head not in outputs else {**outputs, "logits": outputs[head]}


def _with_labels(batch: dict[str, Any], head: str) -> dict[str, Any]:
    # Soft targets of a mixture are those of the main head.
    labels = batch.get("labels", {})
    return {**{k: v for k, v in batch.items() if k != "target"}, "label": labels[head]} if head in labels else batch


def _rows(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == len(rows) else value
