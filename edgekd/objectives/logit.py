"""Objectives on logits. Each gives one value per row [N], unless it says otherwise; `Objectives` takes the mean."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import register
from .rules import Tau, rule

__all__ = ["CrossEntropy", "Decoupled", "LabelSmoothing", "LogitSquares", "ProbabilitySquares", "SoftTargets"]
__all__ += ["Correlations", "label_cross_entropy", "standardized"]

Outputs = dict[str, Tensor]


@register("objectives", "ce")
class CrossEntropy(nn.Module):
    """Cross-entropy with the labels, in nats; rows without a label (-1) are skipped.

    Source: Bishop 2006, Pattern Recognition and Machine Learning, eq. 4.108.
    """

    snippet = 'objectives = ["ce"]'
    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K], and labels [N] or (after mixup or cutmix) soft targets [N, K] -> [N], mean over labelled."""
        return label_cross_entropy(student["logits"], batch)


@register("objectives", "label-smoothing")
class LabelSmoothing(nn.Module):
    """Cross-entropy with labels that share `amount` of their mass among all classes (Inception 2016).

    Source: Szegedy et al. 2016, arXiv:1512.00567.

    In nats; rows without a label are skipped.
    """

    snippet = 'objectives = ["label-smoothing"]'
    needs_teacher = False

    def __init__(self, amount: Annotated[float, Field(gt=0, lt=1)] = 0.1) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K], and labels [N] or soft targets [N, K] -> [N], mean over labelled rows."""
        return label_cross_entropy(student["logits"], batch, self.amount)


def label_cross_entropy(logits: Tensor, batch: dict[str, Any], smoothing: float = 0.0) -> Tensor:
    """logits [N, K], and labels [N] or soft targets [N, K] of the batch -> [N] in nats; their mean is that over the
    labelled rows."""
    labels = batch["label"]
    labelled = labels >= 0
    if bool(labelled.all()):
        return F.cross_entropy(logits, batch.get("target", labels), label_smoothing=smoothing, reduction="none")
    target = batch.get("target", labels.clamp(min=0))
    rows = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    return _of_labelled(rows, labels)


def _of_labelled(rows: Tensor, label: Tensor) -> Tensor:
    """Values [N] scaled so that the mean over all rows is the mean over the labelled ones."""
    labelled = label >= 0
    return torch.where(labelled, rows, 0.0) * (len(label) / labelled.sum().clamp(min=1))


def standardized(logits: Tensor) -> Tensor:
    """Each row [N, K] with mean 0 and standard deviation 1 (Sun et al. 2024, arXiv:2403.01427), a constant row zeros.

    The deviation is the paper's, over K; its code divides by K - 1.
    """
    deviation = logits.std(dim=1, correction=0, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / deviation.clamp(min=1e-7)


class _Tempered(nn.Module):
    """The temperature, and whether logits are standardized before it: shared by the objectives on tempered logits."""

    def __init__(self, tau: Tau, standardize: bool) -> None:
        super().__init__()
        self.rule, self.standardize = rule(tau, "tau"), standardize

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Tempered logits [N, K] of student and teacher, and tau (a scalar or [N])."""
        s, t = student["logits"], teacher["logits"]
        tau = self.rule(student, teacher, batch).to(s)
        if self.standardize:
            s, t = standardized(s), standardized(t)
        divisor = tau[:, None] if tau.ndim else tau
        return s / divisor, t / divisor, tau


@register("objectives", "kl")
class SoftTargets(nn.Module):
    """KL divergence between tempered class probabilities (Hinton 2015).

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531; standardized: Sun et al. 2024, arXiv:2403.01427.

    `standardize` brings each row of logits to mean 0 and deviation 1 first, so that only their shape is taught; it
    wants tau = 2 and a weight of about 9.
    """

    snippet = 'objectives = [{ use = "ce", weight = 0.1 }, { use = "kl", weight = 0.9, tau = 4.0 }]'

    def __init__(self, tau: Tau = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.tempered = _Tempered(tau, standardize)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of both -> [N] in nats, times tau^2 so that gradients keep their size."""
        s, t, tau = self.tempered(student, teacher, batch)
        return _divergence(F.log_softmax(t, dim=1), F.log_softmax(s, dim=1)) * tau**2


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of rows [N, K] -> [N]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


@register("objectives", "mse-logits")
class LogitSquares(nn.Module):
    """Mean squared distance of logits (Ba and Caruana 2014).

    Source: Ba and Caruana 2014, arXiv:1312.6184.
    """

    snippet = 'objectives = [{ use = "ce", weight = 0.1 }, { use = "mse-logits", weight = 0.9 }]'

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of both -> [N], the mean over K."""
        return (student["logits"] - teacher["logits"]).square().mean(dim=1)


@register("objectives", "mse-probs")
class ProbabilitySquares(nn.Module):
    """Squared distance of class probabilities: the Brier score against the teacher (Brier 1950).

    Source: Brier 1950, Monthly Weather Review 78.
    """

    snippet = 'objectives = ["ce", { use = "mse-probs", weight = 1.0 }]'

    def __init__(self, tau: Tau = 1.0, standardize: bool = False) -> None:
        super().__init__()
        self.tempered = _Tempered(tau, standardize)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of both -> [N], the sum over K, times tau^2."""
        s, t, tau = self.tempered(student, teacher, batch)
        return (s.softmax(dim=1) - t.softmax(dim=1)).square().sum(dim=1) * tau**2


@register("objectives", "dkd")
class Decoupled(nn.Module):
    """Decoupled KL: the label's probability apart from how the other classes compare (DKD 2022).

    Source: Zhao et al. 2022, arXiv:2203.08679.

    Rows without a label are skipped. `alpha` weighs the divergence of (label, not label), `beta` that among the other
    classes; with alpha = 1 and beta the teacher's probability of not being the label it would be `kl`.
    """

    snippet = 'objectives = ["ce", { use = "dkd", tau = 4.0, alpha = 1.0, beta = 8.0 }]'

    def __init__(
        self,
        tau: Tau = 4.0,
        alpha: Annotated[float, Field(ge=0)] = 1.0,
        beta: Annotated[float, Field(ge=0)] = 8.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.tempered = alpha, beta, _Tempered(tau, standardize)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K >= 2] of both, labels [N] -> [N] in nats, times tau^2."""
        s, t, tau = self.tempered(student, teacher, batch)
        label = batch["label"].clamp(min=0)
        (log_q, rest_q), (log_p, rest_p) = _decoupled(s, label), _decoupled(t, label)
        rows = (self.alpha * _divergence(log_p, log_q) + self.beta * _divergence(rest_p, rest_q)) * tau**2
        return _of_labelled(rows, batch["label"])


def _decoupled(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """log [N, 2] of (label, not label), and log-probabilities [N, K - 1] among the others."""
    own = F.one_hot(label, logits.shape[1]).bool()
    others = logits[~own].view(len(logits), -1)
    mass = torch.stack([logits[own], others.logsumexp(dim=1)], dim=1)
    return F.log_softmax(mass, dim=1), F.log_softmax(others, dim=1)


@register("objectives", "dist")
class Correlations(nn.Module):
    """Pearson correlation of probabilities, within each image and within each class (DIST 2022).

    Source: Huang et al. 2022, arXiv:2205.10536.

    Gives a scalar: within a class, images of the batch count together.
    """

    snippet = 'objectives = ["ce", { use = "dist", weight = 2.0 }]'

    def __init__(
        self,
        tau: Tau = 1.0,
        beta: Annotated[float, Field(ge=0, description="within each image")] = 1.0,
        gamma: Annotated[float, Field(ge=0, description="within each class")] = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.beta, self.gamma, self.tempered = beta, gamma, _Tempered(tau, standardize)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> Tensor:
        """logits [N, K] of both -> scalar: sums of 1 - correlation, times tau^2."""
        s, t, tau = self.tempered(student, teacher, batch)
        q, p = s.softmax(dim=1), t.softmax(dim=1)
        within_images, within_classes = _correlation(q, p), _correlation(q.T, p.T)
        loss = self.beta * (1 - within_images).mean() + self.gamma * (1 - within_classes).mean()
        return loss * tau.square().mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the rows of two [N, M] -> [N]; 0 where a row is constant.

    The 1e-8 is that of the paper's code: a class that no image of the batch comes near to counts for little.
    """
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
