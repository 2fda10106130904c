"""Objectives on features inside the networks, reached by module path. Each gives one value per row [N]."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register

__all__ = ["Attention", "Hidden", "Hint", "Tap", "Taps", "check_maps", "check_pairs"]
__all__ += ["same_size"]

Outputs = dict[str, Tensor]

Tap = Annotated[str, Field(examples=["layer2"], description="module path, such as layer2")]
#: One module path, or a list of them.
Taps = Annotated[
    list[str],
    BeforeValidator(lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=list[str] | str),
    Field(min_length=1, examples=[["layer2", "layer3"]], description="one module path or several"),
]
ALIKE = "tap layers of the same kind: maps with maps, vectors with vectors, sequences of one length"


def check_pairs(student: list[str], teacher: list[str]) -> None:
    """As many taps on either side. Raises UsageError."""
    if len(student) != len(teacher):
        what = f"{len(student)} student taps and {len(teacher)} teacher taps"
        raise UsageError(what, where="student", hint="they go in pairs: the first with the first, and so on")


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [N, ., H, W], both averaged to the smaller of their heights and widths."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    first, second = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return first, second


def _adapter(s: Tensor, t: Tensor, taps: tuple[str, str], where: str) -> nn.Module:
    """A 1x1 convolution for maps [N, C, H, W], a linear layer for [N, C] and [N, T, C]. Raises UsageError."""
    # Maps can be brought to one size; sequences of different lengths have no such meaning.
    if s.ndim != t.ndim or s.ndim not in (2, 3, 4) or (s.ndim == 3 and s.shape[1] != t.shape[1]):
        what = f"{taps[0]!r} gives {list(s.shape)}, the teacher's {taps[1]!r} {list(t.shape)}"
        raise UsageError(what, where=where, hint=ALIKE)
    axis = 1 if s.ndim == 4 else -1
    sizes = s.shape[axis], t.shape[axis]
    made = nn.Conv2d(*sizes, 1, bias=False) if s.ndim == 4 else nn.Linear(*sizes, bias=False)
    return made.to(s.device)


@register("objectives", "hint")
class Hint(nn.Module):
    """Mean squared distance of features through a learned adapter (FitNets 2015).

    Source: Romero et al. 2015, arXiv:1412.6550.
    """

    snippet = 'objectives = ["ce", "kl", { use = "hint", student = "layer2", teacher = "layer2" }]'

    def __init__(self, student: Tap, teacher: Tap) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student,), (teacher,)
        self.adapter: nn.Module = nn.Identity()

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Size the adapter; made even when sizes agree, since the student's basis need not be the teacher's."""
        taps = self.student_taps[0], self.teacher_taps[0]
        self.adapter = _adapter(student[taps[0]], teacher[taps[1]], taps, "hint")

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Features [N, C, H, W] (or [N, C], [N, T, C]) -> [N]; maps take the size of the teacher's."""
        s, t = self.adapter(student[self.student_taps[0]]), teacher[self.teacher_taps[0]]
        if s.ndim == 4 and s.shape[2:] != t.shape[2:]:
            s = F.interpolate(s, size=t.shape[2:], mode="bilinear", align_corners=False)
        return (s.to(t.dtype) - t).square().flatten(1).mean(dim=1)


@register("objectives", "hidden")
class Hidden(nn.Module):
    """Mean squared distance of hidden states, mapped linearly only where widths differ (TinyBERT 2020).

    Source: Jiao et al. 2020, arXiv:1909.10351.

    For transformers' [N, T, C], and for [N, C] and maps of one size.
    """

    snippet = 'objectives = ["ce", "kl", { use = "hidden", student = "layer3", teacher = "layer3" }]'

    def __init__(self, student: Taps, teacher: Taps) -> None:
        super().__init__()
        check_pairs(student, teacher)
        self.student_taps, self.teacher_taps = tuple(student), tuple(teacher)
        self.adapters = nn.ModuleList()

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Size the maps where they are needed. Raises UsageError for features of other kinds or sizes."""
        self.adapters = nn.ModuleList()
        for taps in zip(self.student_taps, self.teacher_taps, strict=True):
            s, t = student[taps[0]], teacher[taps[1]]
            made = _adapter(s, t, taps, "hidden")
            if s.shape[2:] != t.shape[2:] and s.ndim == 4:
                what = f"{taps[0]!r} gives {list(s.shape)}, the teacher's {taps[1]!r} {list(t.shape)}"
                raise UsageError(what, where="hidden", hint="tap layers of one size; `hint` takes maps of other sizes")
            self.adapters.append(nn.Identity() if s.shape == t.shape else made)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Pairs of [N, T, C], [N, C] or [N, C, H, W] -> [N]: means over all but the row, summed over pairs."""
        pairs = zip(self.adapters, self.student_taps, self.teacher_taps, strict=True)
        gaps = [adapter(student[s]).to(teacher[t].dtype) - teacher[t] for adapter, s, t in pairs]
        return sum((gap.square().flatten(1).mean(dim=1) for gap in gaps), gaps[0].new_zeros(()))


@register("objectives", "attention")
class Attention(nn.Module):
    """Where a layer looks: squared distance of normalised maps of activation energy (AT 2017).

    Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928.

    With the mean over positions of their code, which wants a weight of about 500.
    """

    snippet = (
        'objectives = ["ce", "kl", { use = "attention", student = ["layer1", "layer2", "layer3"], '
        'teacher = ["layer1", "layer2", "layer3"], weight = 500.0 }]'
    )

    def __init__(self, student: Taps, teacher: Taps) -> None:
        super().__init__()
        check_pairs(student, teacher)
        self.student_taps, self.teacher_taps = tuple(student), tuple(teacher)

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Nothing to size. Raises UsageError where a tap gives no maps."""
        check_maps(student, self.student_taps, "attention.student")
        check_maps(teacher, self.teacher_taps, "attention.teacher")

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Pairs of maps [N, C, H, W], C of any size -> [N], summed over pairs; larger maps take the smaller's size."""
        total = student["logits"].new_zeros(())
        for a, b in zip(self.student_taps, self.teacher_taps, strict=True):
            s, t = same_size(*(x.square().mean(dim=1, keepdim=True) for x in (student[a], teacher[b])))
            gap = F.normalize(s.flatten(1), dim=1) - F.normalize(t.flatten(1), dim=1)
            total = total + gap.square().mean(dim=1)
        return total


def check_maps(found: Outputs, taps: tuple[str, ...], where: str) -> None:
    """Every tap gives maps [N, C, H, W]. Raises UsageError."""
    for tap in taps:
        if found[tap].ndim != 4:
            what = f"{tap!r} gives {list(found[tap].shape)}, expected maps [N, C, H, W]"
            raise UsageError(what, where=where, hint="tap a convolution, or a block of them")
