"""Students that teach themselves or each other, and a teacher that is no network at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register

__all__ = ["MovingAverage", "Peers", "TeacherFree"]

Outputs = dict[str, Tensor]


@register("teachers", "ema")
class MovingAverage(nn.Module):
    """Each student's own moving average teaches it (Mean Teacher 2017).

    Source: Tarvainen and Valpola 2017, arXiv:1703.01780.

    After every step, average = decay * average + (1 - decay) * student, statistics of batch norms included; the decay
    rises as (1 + step) / (10 + step) at first.
    """

    snippet = 'objectives = ["ce", { use = "kl", tau = 1.0 }]\nsource = { use = "ema", decay = 0.99 }'

    def __init__(
        self,
        students: Sequence[nn.Module],
        taps: Sequence[str] = (),
        decay: Annotated[float, Field(gt=0, lt=1)] = 0.999,
    ) -> None:
        super().__init__()
        self.averages = nn.ModuleList(copy.deepcopy(s).eval().requires_grad_(False) for s in students)
        for average in self.averages:
            if hasattr(average, "taps"):  # the wrapper taps what is wanted of students; here, what of teachers
                average.taps = tuple(taps)  # type: ignore[assignment]
        self.decay = decay
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> MovingAverage:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, students: Sequence[nn.Module]) -> None:
        """Move every average towards its student."""
        step = int(self.steps)
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, student in zip(self.averages, students, strict=True):
            live = student.state_dict()
            for name, kept in average.state_dict().items():
                if kept.is_floating_point():
                    kept.lerp_(live[name].to(kept), 1 - decay)
                else:
                    kept.copy_(live[name])
        self.steps += 1

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """image [N, C, H, W] -> each student's average's outputs."""
        return [average(batch["image"]) for average in self.averages]


@register("teachers", "peers")
class Peers(nn.Module):
    """Students in training teach each other, by the mean of the others' probabilities (DML 2018).

    Source: Zhang et al. 2018, Deep Mutual Learning, arXiv:1706.00384, which uses `kl` with tau = 1.

    With `students = [{ start = "teacher" }, { model = ... }]` the teacher goes on learning from its student.
    """

    carries = False
    snippet = (
        'students = [{ model = { use = "cifar-resnet", depth = 14 } }, { model = { use = "cifar-resnet", depth = 8 } }]'
        '\nobjectives = ["ce", { use = "kl", tau = 1.0 }]\nsource = "peers"'
    )

    def __init__(self, students: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(students) < 2:
            raise UsageError("peers are two students or more", where="source", hint="students = [{ ... }, { ... }]")

    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """Logits [N, K] of all students -> for each, the log of the others' mean probability [N, K]."""
        probabilities = [F.softmax(s["logits"].detach().float(), dim=1) for s in students]
        total = torch.stack(probabilities).sum(dim=0)
        others = [(total - own) / (len(students) - 1) for own in probabilities]
        return [{"logits": o.clamp(min=1e-12).log()} for o in others]


@register("teachers", "teacher-free")
class TeacherFree(nn.Module):
    """A virtual teacher, right with probability `correct`, that spreads the rest evenly (Tf-KD 2020).

    Source: Yuan et al. 2020, arXiv:1909.11723, which uses `kl` with tau = 20.

    Rows without a label get the even distribution.
    """

    snippet = (
        'objectives = ["ce", { use = "kl", tau = 20.0, weight = 0.1 }]\n'
        'source = { use = "teacher-free", correct = 0.9 }'
    )

    def __init__(self, correct: Annotated[float, Field(gt=0, lt=1)] = 0.9) -> None:
        super().__init__()
        self.correct = correct

    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """label [N] -> the log of the virtual probabilities [N, K], for students' K."""
        label = batch["label"]
        answers = []
        for student in students:
            classes = student["logits"].shape[1]
            own = F.one_hot(label.clamp(min=0), classes).to(torch.float32)
            p = own * self.correct + (1 - own) * (1 - self.correct) / (classes - 1)
            p = torch.where(label[:, None] >= 0, p, torch.full_like(p, 1 / classes))
            answers.append({"logits": p.log()})
        return answers
