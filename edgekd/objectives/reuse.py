"""The student keeps the teacher's classifier and learns only what feeds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register
from .feature import Tap, check_maps, same_size

__all__ = ["ClassifierReuse"]

Outputs = dict[str, Tensor]
MODEL = 'model = { use = "reuse", student = "cifar-resnet", tap = "layer3", channels = 64 }'


@register("objectives", "classifier-reuse")
class ClassifierReuse(nn.Module):
    """Squared distance of the last feature maps, under the teacher's own classifier (SimKD 2022).

    Source: Chen et al. 2022, arXiv:2203.14001.

    The student is a model `reuse`, its `channels` those of the teacher's maps; `teacher` taps the maps before the
    teacher's pooling, `classifier` is the linear layer after it.
    """

    student_taps = ("projector",)
    snippet = f'{MODEL}\nobjectives = [{{ use = "classifier-reuse", teacher = "layer3", classifier = "linear" }}]'

    def __init__(self, teacher: Tap, classifier: str = "linear") -> None:
        super().__init__()
        self.teacher_taps, self.classifier = (teacher,), classifier

    def begin(self, student: nn.Module, teacher: nn.Module | None, images: int) -> None:
        """Copy the teacher's classifier into the student and freeze it. Raises UsageError where it does not fit."""
        assert teacher is not None
        own = getattr(student, "classifier", None)
        if not hasattr(student, "projector") or not isinstance(own, nn.Linear):
            raise UsageError("the student has no projector to share a classifier through", where="model", hint=MODEL)
        try:
            theirs = teacher.get_submodule(self.classifier)
        except AttributeError as error:
            linear = [path for path, module in teacher.named_modules() if isinstance(module, nn.Linear)]
            what = f"the teacher has no module {self.classifier!r}"
            hint = f"its linear layers: {', '.join(linear[-5:]) or 'none'}"
            raise UsageError(what, where="classifier", hint=hint) from error
        if not isinstance(theirs, nn.Linear) or theirs.weight.shape != own.weight.shape:
            shape = list(theirs.weight.shape) if isinstance(theirs, nn.Linear) else type(theirs).__name__
            what = f"the teacher's classifier is {shape}, the student's {list(own.weight.shape)}"
            hint = "set the model's channels to the teacher's; when pruning: protected = ['projector*']"
            raise UsageError(what, where="classifier", hint=hint)
        with torch.no_grad():
            own.weight.copy_(theirs.weight)
            if own.bias is not None:
                own.bias.copy_(theirs.bias if theirs.bias is not None else torch.zeros_like(own.bias))
        own.requires_grad_(False)

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Nothing to size. Raises UsageError where the teacher's tap gives no maps of the projector's width."""
        check_maps(teacher, self.teacher_taps, "classifier-reuse.teacher")
        s, t = student["projector"], teacher[self.teacher_taps[0]]
        if s.shape[1] != t.shape[1]:
            what = f"the projector gives {s.shape[1]} channels, the teacher's {self.teacher_taps[0]!r} {t.shape[1]}"
            raise UsageError(what, where="classifier-reuse.teacher", hint=f"channels = {t.shape[1]} in the model")

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Maps [N, C, H, W] of the projector and of the teacher -> [N]; larger maps take the smaller's size."""
        s, t = student["projector"], teacher[self.teacher_taps[0]]
        s, t = same_size(s, t)
        gap = s.to(t.dtype) - t
        return gap.square().flatten(1).mean(dim=1)
