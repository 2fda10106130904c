"""Objectives on how features relate to each other: between layers, or between the images of a batch.

Between images there is no value of one image alone: those give a scalar. Sums over a batch want full precision, so
none of them runs in autocast's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register
from .feature import Tap, Taps, check_maps, check_pairs, same_size

__all__ = ["Embedded", "Probabilistic", "Relational", "Similarity", "SolutionFlow", "embedding", "full_precision"]
__all__ += ["unit"]

Outputs = dict[str, Tensor]
Level = Annotated[float, Field(ge=0)]


def full_precision(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `forward` outside of autocast: its matrix products keep the precision of what they are given."""

    @functools.wraps(forward)
    def call(self: nn.Module, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        with torch.autocast(student["logits"].device.type, enabled=False):
            return forward(self, student, teacher, batch)

    return call


def embedding(features: Tensor) -> Tensor:
    """[N, D] of a vector [N, D], the mean over pixels of a map [N, D, H, W], or over tokens of [N, T, D]."""
    return features if features.ndim == 2 else features.mean(dim=1) if features.ndim == 3 else features.mean(dim=(2, 3))


def unit(x: Tensor, least: float = 1e-12) -> Tensor:
    """x / |x| along the last axis; zeros, without gradient, where |x| is below `least`: there is no direction there,
    and its gradient would be infinite."""
    squares = x.square().sum(dim=-1, keepdim=True)
    long = squares > least**2
    return torch.where(long, x, 0.0) / torch.where(long, squares, 1.0).sqrt()


@register("objectives", "fsp")
class SolutionFlow(nn.Module):
    """The flow between two layers: squared distance of their channels' inner products (FSP 2017).

    Source: Yim et al. 2017, A Gift from Knowledge Distillation, CVPR.

    Taps are the layers in order; each two neighbours make one matrix. Gives one value per row. Means over the matrix
    where the paper sums, so that widths do not change the weight, and sizes are brought together by average pooling.
    """

    snippet = (
        'objectives = ["ce", "kl", { use = "fsp", student = ["layer1", "layer2", "layer3"], '
        'teacher = ["layer1", "layer2", "layer3"] }]'
    )

    def __init__(self, student: Taps, teacher: Taps) -> None:
        super().__init__()
        check_pairs(student, teacher)
        if len(student) < 2:
            raise UsageError("needs two taps or more", where="student", hint="the flow is that from one to the next")
        self.student_taps, self.teacher_taps = tuple(student), tuple(teacher)

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Nothing to size. Raises UsageError where taps give no maps, or channels differ."""
        check_maps(student, self.student_taps, "fsp.student")
        check_maps(teacher, self.teacher_taps, "fsp.teacher")
        for a, b in zip(self.student_taps, self.teacher_taps, strict=True):
            if student[a].shape[1] != teacher[b].shape[1]:
                what = f"{a!r} has {student[a].shape[1]} channels, the teacher's {b!r} {teacher[b].shape[1]}"
                raise UsageError(what, where="fsp", hint="it compares channel by channel; `similarity` takes any")

    @full_precision
    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Maps [N, C, H, W], equally wide -> [N], means over matrix entries, summed over neighbours."""
        gaps = [
            a - b for a, b in zip(_flows(student, self.student_taps), _flows(teacher, self.teacher_taps), strict=True)
        ]
        return sum((gap.square().mean(dim=(1, 2)) for gap in gaps), gaps[0].new_zeros(()))


def _flows(found: Outputs, taps: tuple[str, ...]) -> list[Tensor]:
    """[N, C1, C2] for every two neighbours: inner products of channels, over the number of pixels."""
    flows = []
    for first, second in itertools.pairwise(taps):
        a, b = (x.flatten(2) for x in same_size(found[first], found[second]))
        flows.append(a @ b.transpose(1, 2) / a.shape[2])
    return flows


class Embedded(nn.Module):
    """The taps of the objectives that compare images: one each, by default the logits. Raises UsageError for one."""

    def __init__(self, student: str | None, teacher: str | None) -> None:
        super().__init__()
        if (student is None) != (teacher is None):
            where, hint = "student" if student is None else "teacher", "without taps, logits are compared"
            raise UsageError("give both taps or neither", where=where, hint=hint)
        self.student_taps = () if student is None else (student,)
        self.teacher_taps = () if teacher is None else (teacher,)

    def forward(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """[N, D] of either."""
        own, other = (*self.student_taps, "logits")[0], (*self.teacher_taps, "logits")[0]
        return embedding(student[own]), embedding(teacher[other])


@register("objectives", "rkd")
class Relational(nn.Module):
    """Huber loss of distances between images and of angles between triples of them (RKD 2019).

    Source: Park et al. 2019, arXiv:1904.05068, with its weights of the two.

    Without taps, of logits.
    """

    snippet = 'objectives = ["ce", { use = "kl", weight = 0.9, tau = 4.0 }, { use = "rkd", weight = 0.02 }]'

    def __init__(
        self, student: Tap | None = None, teacher: Tap | None = None, distance: Level = 25.0, angle: Level = 50.0
    ) -> None:
        super().__init__()
        self.embedded, self.distance, self.angle = Embedded(student, teacher), distance, angle
        self.student_taps, self.teacher_taps = self.embedded.student_taps, self.embedded.teacher_taps

    @full_precision
    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Features of N images -> scalar."""
        s, t = self.embedded(student, teacher)
        loss = self.distance * F.smooth_l1_loss(_distances(s), _distances(t))
        return loss + self.angle * F.smooth_l1_loss(_angles(s), _angles(t)) if self.angle else loss


def _distances(x: Tensor) -> Tensor:
    """[N, N]: Euclidean distances over their mean; zeros on the diagonal."""
    squares = (x[:, None] - x[None]).square().sum(dim=2)
    apart = squares > 1e-12
    # The root's gradient at 0 is infinite: equal images are taken out before it.
    distances = torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=1e-12)


def _angles(x: Tensor) -> Tensor:
    """[N, N, N]: cosine of the angle at image j between the directions to i and to k."""
    directions = unit(x[None] - x[:, None], 1e-6)  # as for distances, equal images are left out
    return directions @ directions.transpose(1, 2)


@register("objectives", "similarity")
class Similarity(nn.Module):
    """Which images activate a layer alike: squared distance of normalised inner products (SP 2019).

    Source: Tung and Mori 2019, arXiv:1907.09682, which weighs it by 3000.
    """

    snippet = (
        'objectives = ["ce", "kl", { use = "similarity", student = "layer3", teacher = "layer3", weight = 3000.0 }]'
    )

    def __init__(self, student: Tap, teacher: Tap) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student,), (teacher,)

    @full_precision
    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Features [N, ...] of any shapes -> scalar, the mean over N x N."""
        s, t = (
            unit(x @ x.T) for x in (student[self.student_taps[0]].flatten(1), teacher[self.teacher_taps[0]].flatten(1))
        )
        return F.mse_loss(s, t)


@register("objectives", "pkt")
class Probabilistic(nn.Module):
    """KL divergence of the probabilities that one image picks another by cosine similarity (PKT 2018).

    Source: Passalis and Tefas 2018, arXiv:1803.10837.

    Without taps, of logits. As in the paper and unlike in its code, an image does not pick itself; the mean over images
    is taken where the paper sums.
    """

    snippet = 'objectives = ["ce", { use = "kl", weight = 0.9, tau = 4.0 }, "pkt"]'

    def __init__(self, student: Tap | None = None, teacher: Tap | None = None) -> None:
        super().__init__()
        self.embedded = Embedded(student, teacher)
        self.student_taps, self.teacher_taps = self.embedded.student_taps, self.embedded.teacher_taps

    @full_precision
    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Features of N images -> scalar in nats, the mean over images."""
        s, t = (_neighbours(x).clamp(min=1e-12) for x in self.embedded(student, teacher))
        return (t * (t / s).log()).sum(dim=1).mean()


def _neighbours(x: Tensor) -> Tensor:
    """[N, N]: each row's probabilities of the other images, by (cosine + 1) / 2; 0 for itself."""
    directions = unit(x)
    similar = (directions @ directions.T + 1) / 2 * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
    return similar / similar.sum(dim=1, keepdim=True).clamp(min=1e-7)
