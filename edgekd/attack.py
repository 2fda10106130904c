"""Images changed to mislead a student while it trains: adversarially robust distillation."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

__all__ = ["Attack", "AttackSpec"]


class AttackSpec(BaseModel):
    """`{ use = "pgd", eps = 0.031, steps = 10 }`: sizes are in units of images in [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    use: Literal["fgsm", "pgd"] = "pgd"
    eps: Annotated[float, Field(gt=0, le=1, description="largest change of a pixel; images are in [0, 1]")] = 8 / 255
    step: Annotated[float | None, Field(gt=0, description="of pgd; default: 2.5 eps / steps")] = None
    steps: Annotated[int, Field(gt=0, description="of pgd")] = 10
    against: Annotated[
        Literal["teacher", "label"],
        Field(description="what it leads the student away from; the other, where there is none"),
    ] = "teacher"


class Attack:
    """`attack(student, images, teacher_logits, labels) -> images`, normalised by `mean` and `std` as the input is.

    `fgsm` is one step of size eps (Goodfellow et al. 2015, arXiv:1412.6572), `pgd` several from a random start within
    eps (Madry et al. 2018, arXiv:1706.06083). `against = "teacher"`: the change raises the KL divergence from the
    teacher, as in RSLAD (Zi et al. 2021, arXiv:2108.07969), which needs no labels. `against = "label"`: it raises the
    cross-entropy with the label, as in ARD (Goldblum et al. 2020, arXiv:1905.09747). Where one of the two is not there
    (no teacher, an image without a label) the other one takes its place.
    """

    def __init__(self, spec: AttackSpec, mean: list[float], std: list[float]) -> None:
        self.spec, self.mean, self.std = spec, mean, std

    def __call__(self, student: nn.Module, image: Tensor, teacher: Tensor | None, label: Tensor) -> Tensor:
        """image [N, C, H, W], teacher logits [N, K] or None, label [N] -> changed image, without gradient."""
        spec = self.spec
        mean, std = (
            torch.tensor(v, device=image.device, dtype=image.dtype).view(1, -1, 1, 1) for v in (self.mean, self.std)
        )
        low, high = -mean / std, (1 - mean) / std
        eps = spec.eps / std
        steps, size = (1, eps) if spec.use == "fgsm" else (spec.steps, (spec.step or 2.5 * spec.eps / spec.steps) / std)
        training = student.training
        student.eval()  # neither dropout nor moving statistics while the change is sought
        changed = image.detach().clone()
        if spec.use == "pgd":
            changed = (changed + (2 * torch.rand_like(changed) - 1) * eps).clamp(low, high)
        with torch.enable_grad():
            for _ in range(steps):
                changed.requires_grad_(True)
                loss = _gap(student(changed)["logits"].float(), teacher, label, spec.against)
                (slope,) = torch.autograd.grad(loss, changed)
                moved = changed.detach() + size * slope.sign()
                changed = moved.clamp(image - eps, image + eps).clamp(low, high).detach()
        student.train(training)
        return changed


def _gap(logits: Tensor, teacher: Tensor | None, label: Tensor, against: str) -> Tensor:
    """Summed over the batch, so that every image is attacked as if it were alone."""
    by_label = label >= 0 if teacher is None or against == "label" else torch.zeros_like(label, dtype=torch.bool)
    gap = F.cross_entropy(logits[by_label], label[by_label], reduction="sum")
    if teacher is None:
        return gap
    log_q, log_p = F.log_softmax(logits[~by_label], dim=1), F.log_softmax(teacher[~by_label], dim=1)
    return gap + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
