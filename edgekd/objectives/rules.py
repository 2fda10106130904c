"""Numbers that change: what a recipe may write in place of an objective's `weight` or temperature `tau`.

A rule is an `nn.Module` registered under the kind `rules`, called as `rule(student, teacher, batch)` and giving a
scalar, or one number per row [N]. `batch["epoch"]` is how many epochs are done (a fraction within one),
`batch["epochs"]` how many there will be. A rule with an attribute `until` (in epochs) must fit into the training.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..errors import RecipeError, UsageError
from ..recipe import Component
from ..registry import bind, register

__all__ = ["Cosine", "Curriculum", "Disagreement", "Linear", "Rule", "Tau", "TeacherConfidence", "rule"]

Outputs = dict[str, Tensor]


def _not_negative(value: float | Component) -> float | Component:
    if not isinstance(value, Component) and not value >= 0:
        raise ValueError("input should be greater than or equal to 0")
    return value


def _above_zero(value: float | Component) -> float | Component:
    if not isinstance(value, Component) and not value > 0:
        raise ValueError("input should be greater than 0")
    return value


#: A number, or a rule: `weight = { use = "linear", start = 1.0, end = 0.0 }`.
Rule = Annotated[float | Component, AfterValidator(_not_negative)]
Tau = Annotated[float | Component, AfterValidator(_above_zero), Field(description="temperature: above 0, or a rule")]


def rule(value: float | Component, where: str) -> nn.Module:
    """The module of a number or rule. Raises UsageError (no such rule) or RecipeError (its arguments) at `where`."""
    if not isinstance(value, Component):
        return Constant(value)
    component, args, problems = bind("rules", value.use, value.args, where)
    if problems:
        raise RecipeError(problems)
    made: nn.Module = component(**args)
    if where == "tau" and not getattr(made, "positive", False):
        raise UsageError(f"{value.use} can become 0, a temperature cannot", where=where, hint="use numbers above 0")
    return made


class Constant(nn.Module):
    """A number that stays."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """-> scalar float64, so that it takes no precision away."""
        return torch.tensor(self.value, dtype=torch.float64)


class _Course(nn.Module):
    """The way from `start` to `end` over `epochs` (default: to the training's end), after waiting `after` epochs."""

    def __init__(self, start: float, end: float, epochs: float | None, after: float) -> None:
        super().__init__()
        self.start, self.end, self.epochs, self.after = start, end, epochs, after
        self.until = after + (epochs or 0.0)

    def forward(self, batch: dict[str, Any]) -> float:
        """How much of the way is done, in [0, 1]."""
        length = self.epochs if self.epochs is not None else batch.get("epochs", 1.0) - self.after
        return min(max((batch.get("epoch", 0.0) - self.after) / max(length, 1e-9), 0.0), 1.0)


Level = Annotated[float, Field(ge=0)]
Epochs = Annotated[float, Field(gt=0)]


@register("rules", "linear")
class Linear(nn.Module):
    """From `start` to `end` in a straight line over `epochs`, by default over the whole training.

    Source: Jafari et al. 2021, Annealing Knowledge Distillation, arXiv:2104.07163, of the temperature.
    """

    snippet = (
        'objectives = [{ use = "ce", weight = { use = "linear", start = 0.0, end = 1.0 } }, '
        '{ use = "kl", weight = { use = "linear", start = 1.0, end = 0.1 } }]'
    )

    def __init__(self, start: Level = 1.0, end: Level = 0.0, epochs: Epochs | None = None, after: Level = 0.0) -> None:
        super().__init__()
        self.course, self.positive = _Course(start, end, epochs, after), min(start, end) > 0

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """-> scalar."""
        c = self.course
        return torch.tensor(c.start + (c.end - c.start) * c(batch), dtype=torch.float64)


@register("rules", "cosine")
class Cosine(nn.Module):
    """From `start` to `end` along half a cosine over `epochs`, by default over the whole training.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, of the learning rate.
    """

    snippet = (
        'objectives = ["ce", { use = "kl", weight = { use = "cosine", start = 1.0, end = 0.1 }, '
        'tau = { use = "cosine", start = 8.0, end = 2.0 } }]'
    )

    def __init__(self, start: Level = 1.0, end: Level = 0.0, epochs: Epochs | None = None, after: Level = 0.0) -> None:
        super().__init__()
        self.course, self.positive = _Course(start, end, epochs, after), min(start, end) > 0

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """-> scalar."""
        c = self.course
        return torch.tensor(c.end + (c.start - c.end) * 0.5 * (1 + math.cos(math.pi * c(batch))), dtype=torch.float64)


@register("rules", "teacher-confidence")
class TeacherConfidence(nn.Module):
    """Per row, `scale` times the teacher's probability of the label: where it is wrong it teaches little.

    Source: Meng et al. 2019, Conditional Teacher-Student Learning, arXiv:1904.12399, which takes 0 or 1.

    Rows without a label take the largest probability.
    """

    snippet = (
        'objectives = [{ use = "ce", weight = 0.1 }, '
        '{ use = "kl", tau = 4.0, weight = { use = "teacher-confidence" } }]'
    )
    needs_teacher = True

    def __init__(self, scale: Level = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of the teacher, labels [N] -> [N] in [0, scale]."""
        probabilities, label = teacher["logits"].softmax(dim=1), batch["label"]
        own = probabilities.gather(1, label.clamp(min=0)[:, None])[:, 0]
        return torch.where(label >= 0, own, probabilities.amax(dim=1)) * self.scale


@register("rules", "disagreement")
class Disagreement(nn.Module):
    """Per row, `scale` times how far student and teacher are apart: where they agree, nothing is taught.

    Source: edgekd's own, after the focal loss (Lin et al. 2017, arXiv:1708.02002), which looks at labels.

    How far is half the summed difference of probabilities (total variation).
    """

    snippet = (
        'objectives = [{ use = "ce", weight = 0.1 }, '
        '{ use = "kl", tau = 4.0, weight = { use = "disagreement", scale = 2.0 } }]'
    )
    needs_teacher = True

    def __init__(self, scale: Level = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of both -> [N] in [0, scale], without gradient."""
        gap = student["logits"].detach().softmax(dim=1) - teacher["logits"].softmax(dim=1)
        return gap.abs().sum(dim=1) * (0.5 * self.scale)


@register("rules", "curriculum")
class Curriculum(nn.Module):
    """A learned temperature that makes the task harder for the student (CTKD 2023).

    Source: Li et al. 2023, arXiv:2211.16231.

    One parameter for all images, moved *against* the loss; how strongly rises along half a cosine to `strength` over
    the first `epochs` (default: the whole training). The temperature stays in (low, high).
    """

    snippet = 'objectives = [{ use = "ce", weight = 0.1 }, { use = "kl", weight = 0.9, tau = { use = "curriculum" } }]'
    positive = True

    def __init__(
        self,
        low: Annotated[float, Field(gt=0)] = 1.0,
        high: Annotated[float, Field(gt=0)] = 21.0,
        start: Annotated[float, Field(gt=0, description="the temperature at first")] = 4.0,
        strength: Level = 1.0,
        epochs: Epochs | None = None,
    ) -> None:
        super().__init__()
        if not low < start < high:
            raise UsageError(f"expected low < start < high, got {low:g}, {start:g}, {high:g}", where="tau")
        self.low, self.span, self.strength = low, high - low, strength
        self.course = _Course(0.0, 1.0, epochs, 0.0)
        share = (start - low) / (high - low)
        self.theta = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """-> scalar, whose gradient reaches the parameter with its sign turned."""
        force = self.strength * 0.5 * (1 - math.cos(math.pi * self.course(batch)))
        turned = self.theta.detach() * (1 + force) - self.theta * force
        return self.low + self.span * torch.sigmoid(turned)
