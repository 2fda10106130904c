"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import register
from .folded import folded
from .network import knows

__all__ = ["Ensemble", "confidence"]

Outputs = dict[str, Tensor]


def confidence(logits: Tensor, label: Tensor, known: Tensor) -> Tensor:
    """Weights [M, N] of teachers by their own cross-entropy per image (CA-MKD: Zhang et al. 2022, arXiv:2201.00007).

    w_m = (1 - softmax_m(CE_m)) / (M - 1) from logits [M, N, K], labels [N] and which classes each knows [M, K]. A
    teacher that does not know the label gets nothing; rows without a label weigh all alike.
    """
    count, rows = logits.shape[:2]
    target = label.clamp(min=0)
    masked = logits.masked_fill(~known[:, None, :], float("-inf"))
    loss = torch.stack([F.cross_entropy(own, target, reduction="none") for own in masked])  # inf where unknown
    able = known[:, target]
    if count == 1:
        return torch.ones_like(loss)
    # A teacher without the label has an infinite loss: it takes the whole softmax unless it is left out.
    share = torch.where(able, loss, float("-inf")).softmax(dim=0).nan_to_num(0.0)
    several = able.sum(dim=0) > 1
    weights = torch.where(several, (1 - share) / (able.sum(dim=0) - 1).clamp(min=1), 1.0) * able
    return torch.where(label[None] >= 0, weights, torch.full_like(loss, 1 / count).expand(count, rows))


@register("teachers", "ensemble")
class Ensemble(nn.Module):
    """Several teachers as one: by mean, fixed weights, accuracy, confidence, chance, or data set.

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531; confidence: Zhang et al. 2022 (CA-MKD), arXiv:2201.00007.

    `confidence` weighs per image, `random` draws one teacher per batch, `source` gives each data set its own. Logits
    are averaged. Teachers of some classes only are merged: each class takes those that know it. Tapped features are
    the first teacher's. Weights by `accuracy` are 1 / (error + 0.01), from validation images.
    """

    snippet = (
        'objectives = [{ use = "ce", weight = 0.1 }, { use = "kl", weight = 0.9, tau = 4.0 }]\n'
        'teacher = ["teacher", "teacher-2"]\nsource = { use = "ensemble", combine = "confidence" }'
    )

    def __init__(
        self,
        networks: Sequence[nn.Module],
        combine: Annotated[
            Literal["mean", "fixed", "accuracy", "confidence", "random", "source"],
            Field(description="how their answers become one"),
        ] = "mean",
        weights: Annotated[
            list[Annotated[float, Field(ge=0)]] | None, Field(description="of 'fixed': one per teacher")
        ] = None,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(folded(n) for n in networks)
        self.combine = combine
        known = [knows(n) for n in networks]
        wide = max(len(k) for k in known)
        self.known: Tensor
        self.register_buffer("known", torch.stack([k.expand(wide) if len(k) == 1 else k for k in known]))
        self._check(len(networks), weights)
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(self._given(weights)))
        self.repeatable = combine not in ("random", "source")

    def _check(self, count: int, weights: list[float] | None) -> None:
        if (self.combine == "fixed") != (weights is not None):
            what = "needs its weights" if weights is None else f"takes no weights, combine is {self.combine!r}"
            raise UsageError(what, where="source.weights", hint="combine = 'fixed', weights = [0.7, 0.3]")
        if weights is not None and (len(weights) != count or sum(weights) == 0):
            what = f"{len(weights)} weights for {count} teachers" if len(weights) != count else "all weights are 0"
            raise UsageError(what, where="source.weights", hint="one per teacher, in their order")
        if self.combine in ("random", "source") and not bool(self.known.all()):
            what = f"combine = {self.combine!r} needs teachers that know all classes"
            raise UsageError(what, where="source.combine", hint="combine = 'mean' or 'confidence'")
        if not bool(self.known.any(dim=0).all()):
            missing = int((~self.known.any(dim=0)).sum())
            what = f"{missing} of {self.known.shape[1]} classes are known to no teacher"
            raise UsageError(what, where="source", hint="add a teacher for them")

    def _given(self, weights: list[float] | None) -> list[float]:
        if self.combine == "accuracy":
            accuracies = [getattr(n, "accuracy", None) for n in self.networks]
            if None in accuracies:
                number = accuracies.index(None) + 1
                raise UsageError(
                    f"teacher {number} may have been trained on the validation images, or there are none",
                    where="source.combine",
                    hint="set held_out = true for it if it was not, or weigh by 'confidence' or 'fixed'",
                )
            return [1 / (1.01 - float(a)) for a in accuracies if a is not None]
        return weights if weights is not None else [1.0] * len(self.networks)

    def train(self, mode: bool = True) -> Ensemble:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], students: list[Outputs]) -> list[Outputs]:
        """image [N, C, H, W] (and label [N], source [N]) -> the same outputs for every student."""
        if self.combine == "random":
            drawn = int(torch.randint(len(self.networks), ()))
            outputs = self.networks[drawn](batch["image"])
        elif self.combine == "source":
            outputs = self._by_source(batch)
        else:
            found = [network(batch["image"]) for network in self.networks]
            logits = torch.stack([f["logits"].float() for f in found])
            outputs = {**found[0], "logits": self._merged(logits, batch)}
        return [outputs for _ in students]

    def _merged(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        known = self.known.expand(len(logits), logits.shape[2])
        if self.combine == "confidence":
            weights = confidence(logits, batch["label"], known)
        else:
            weights = self.weights.to(logits)[:, None].expand(logits.shape[:2])
        # A class that no weighted teacher knows takes the plain mean of those that do.
        shares = weights[:, :, None] * known[:, None, :]
        shares = torch.where(shares.sum(dim=0) > 0, shares, known[:, None, :].to(logits))
        return (shares * logits).sum(dim=0) / shares.sum(dim=0)

    def _by_source(self, batch: dict[str, Any]) -> Outputs:
        image, origin = batch["image"], batch.get("source", batch["label"].new_zeros(len(batch["label"])))
        merged: Tensor | None = None
        for number in origin.unique().tolist():
            rows = origin == number
            answers = self.networks[min(int(number), len(self.networks) - 1)](image[rows])["logits"].float()
            merged = answers.new_zeros(len(image), answers.shape[1]) if merged is None else merged
            merged[rows] = answers
        assert merged is not None
        return {"logits": merged}
