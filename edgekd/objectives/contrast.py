"""Contrastive objectives: an image's embedding should match the teacher's of that image and not those of others."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .. import ranks
from ..errors import UsageError
from ..registry import register
from .feature import Tap
from .relation import Embedded, embedding, full_precision

__all__ = ["Contrast", "SimilarityDistribution", "contrast"]

Outputs = dict[str, Tensor]
Count = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0)]


def contrast(positive: Tensor, negative: Tensor, weights: Tensor, images: int) -> Tensor:
    """Noise-contrastive loss of Tian et al., eq. 17, in nats per row [N].

    `positive` [N] and `negative` [N, M] are scores already divided by their constant; `weights` [N, M] is 0 for
    negatives that do not count. Noise is uniform over the `images` of the memory.
    """
    noise = weights.sum(dim=1) / images
    own = positive / (positive + noise + 1e-7)
    other = noise[:, None] / (negative + noise[:, None] + 1e-7)
    return -own.log() - (weights * torch.where(weights > 0, other, 1.0).log()).sum(dim=1)


@register("objectives", "crd")
class Contrast(nn.Module):
    """Each image's embedding should match the teacher's of it, and no other image's (CRD 2020).

    Source: Tian et al. 2020, arXiv:1910.10699, which weighs it by 0.8.

    Without taps, of logits. A memory holds an embedding of every training image. Student and teacher are embedded in
    `size` dimensions by learned maps; `negatives` other images are drawn per batch (the paper draws 16,384 per image),
    of which those with the row's own label do not count.
    """

    snippet = 'objectives = ["ce", "kl", { use = "crd", student = "layer3", teacher = "layer3", weight = 0.8 }]'
    memory = ("student_memory", "teacher_memory", "labels")
    fresh: dict[str, Tensor] | None = None
    student_memory: Tensor
    teacher_memory: Tensor
    labels: Tensor
    constants: Tensor
    student_map: nn.Module
    teacher_map: nn.Module

    def __init__(
        self,
        student: Tap | None = None,
        teacher: Tap | None = None,
        size: Count = 128,
        negatives: Count = 4096,
        tau: Temperature = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    ) -> None:
        super().__init__()
        self.embedded = Embedded(student, teacher)
        self.student_taps, self.teacher_taps = self.embedded.student_taps, self.embedded.teacher_taps
        self.size, self.negatives, self.tau, self.momentum = size, negatives, tau, momentum

    def begin(self, student: nn.Module, teacher: nn.Module | None, images: int) -> None:
        """The memories are as long as the training set."""
        self.images = images

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Size the embeddings and the memories."""
        s, t = self.embedded(student, teacher)
        self.student_map = nn.Linear(s.shape[1], self.size).to(s.device)
        self.teacher_map = nn.Linear(t.shape[1], self.size).to(s.device)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, F.normalize(torch.randn(self.images, self.size, device=s.device), dim=1))
        self.register_buffer("labels", torch.full((self.images,), -1, device=s.device))
        self.register_buffer("constants", torch.zeros(2, device=s.device))

    @full_precision
    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Features, `index` [N] (rows of the training set) and `label` [N] -> [N] in nats; training moves memories."""
        s, t = self.embedded(student, teacher)
        s, t = F.normalize(self.student_map(s), dim=1), F.normalize(self.teacher_map(t), dim=1)
        index, label = batch["index"].to(s.device), batch["label"]
        drawn = torch.randint(self.images, (min(self.negatives, self.images),), device=s.device)
        others = (drawn != index[:, None]) & ((self.labels[drawn] != label[:, None]) | (label[:, None] < 0))
        weights = others.to(s.dtype)
        # Each side is compared with the memory of the other.
        first = self._side(s, self.teacher_memory, 0, index, drawn, weights)
        second = self._side(t, self.student_memory, 1, index, drawn, weights)
        if self.training:
            _keep(self, index=index, label=label, student=s.detach(), teacher=t.detach())
        return first + second

    @torch.no_grad()
    def memorise(self, index: Tensor, label: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move the memory's rows `index` [N] towards embeddings [N, size]."""
        self.labels[index] = label
        for memory, fresh in ((self.student_memory, student), (self.teacher_memory, teacher)):
            mixed = memory[index] * self.momentum + fresh.to(memory.dtype) * (1 - self.momentum)
            memory[index] = F.normalize(mixed, dim=1)

    def _side(self, x: Tensor, memory: Tensor, which: int, index: Tensor, drawn: Tensor, weights: Tensor) -> Tensor:
        # Copies: the memory changes in place before the backward pass.
        positive = ((x * memory[index].to(x.dtype)).sum(dim=1) / self.tau).exp()
        negative = (x @ memory[drawn].to(x.dtype).T / self.tau).exp()
        if float(self.constants[which]) == 0.0:
            # The paper's normalising constant: estimated from the first batch, then kept.
            scores = torch.cat([positive.detach()[:, None], negative.detach()], dim=1)
            self.constants[which] = scores.mean() * self.images
        constant = self.constants[which].clone().to(x.dtype)  # a copy: the other side may set its own before backward
        return contrast(positive / constant, negative / constant, weights, self.images)


@register("objectives", "seed")
class SimilarityDistribution(nn.Module):
    """How alike an image is to a queue of others, as the teacher sees it; needs no labels (SEED 2021).

    Source: Fang et al. 2021, arXiv:2101.04731.

    The student is embedded by a learned two-layer map of the teacher's width. What is behind the tap learns nothing.
    """

    snippet = 'objectives = [{ use = "seed", student = "layer3", teacher = "layer3" }]'
    memory = ("queue", "next")
    fresh: dict[str, Tensor] | None = None
    queue: Tensor
    next: Tensor
    map: nn.Module

    def __init__(
        self,
        student: Tap,
        teacher: Tap,
        queue: Count = 4096,
        tau: Temperature = 0.2,
        tau_teacher: Temperature = 0.01,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student,), (teacher,)
        self.length, self.tau, self.tau_teacher = queue, tau, tau_teacher

    def fit(self, student: Outputs, teacher: Outputs) -> None:
        """Size the map, and fill the queue with random directions. Raises UsageError for a one-dimensional teacher."""
        s, t = embedding(student[self.student_taps[0]]), embedding(teacher[self.teacher_taps[0]])
        if t.shape[1] < 2:
            raise UsageError(f"{self.teacher_taps[0]!r} gives {list(t.shape)}", where="seed", hint="tap a wider layer")
        layers = nn.Linear(s.shape[1], t.shape[1]), nn.ReLU(), nn.Linear(t.shape[1], t.shape[1])
        self.map = nn.Sequential(*layers).to(s.device)
        self.register_buffer("queue", F.normalize(torch.randn(self.length, t.shape[1], device=s.device), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64, device=s.device))

    @full_precision
    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """Features of N images -> [N] in nats: cross-entropy over the row's own teacher embedding and the queue."""
        s = F.normalize(self.map(embedding(student[self.student_taps[0]])), dim=1)
        t = F.normalize(embedding(teacher[self.teacher_taps[0]]), dim=1)
        queue = self.queue.to(s.dtype)
        p = torch.cat([(t * t).sum(dim=1, keepdim=True), t @ queue.T], dim=1).div(self.tau_teacher).softmax(dim=1)
        log_q = torch.cat([(s * t).sum(dim=1, keepdim=True), s @ queue.T], dim=1).div(self.tau).log_softmax(dim=1)
        if self.training:
            _keep(self, teacher=t)
        return -(p * log_q).sum(dim=1)

    @torch.no_grad()
    def memorise(self, teacher: Tensor) -> None:
        """Put embeddings [N, D] into the queue, in place of the oldest."""
        t = teacher[-self.length :]
        places = (self.next + torch.arange(len(teacher) - len(t), len(teacher), device=t.device)) % self.length
        self.queue = self.queue.index_copy(0, places, t.to(self.queue.dtype))
        self.next = (self.next + len(teacher)) % self.length


def _keep(objective: Contrast | SimilarityDistribution, **rows: Tensor) -> None:
    """Memorise now, or leave the rows for the loop to share where several processes train together."""
    if ranks.count() == 1:
        objective.memorise(**rows)
    else:
        objective.fresh = rows
