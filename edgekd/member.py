"""One student in training: its optimizer, its averaged weights, and the best that it has been."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .optim import Averaged, make_optimizer
from .recipe import Training

__all__ = ["Member"]


class Member:
    """What the loop keeps for each student of a learner."""

    def __init__(self, name: str, network: nn.Module, objectives: nn.Module, settings: Training) -> None:
        self.name, self.network, self.settings = name, network, settings
        self.trained = nn.ModuleList([network, objectives])
        self.optimizer = make_optimizer(self.trained, settings)
        self.average = Averaged(network, settings.ema) if settings.ema else None
        self.kept: dict[str, Tensor] | None = None
        self.best: float | None = None
        self.best_epoch = -1
        self.history: list[dict[str, Any]] = []

    def step(self, rate: float, index: int, scaler: torch.amp.GradScaler | None) -> None:
        """Step number `index` by the gradients at hand, which `scaler` has scaled where there is one."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.settings.clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained.parameters(), self.settings.clip_norm)
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        if self.average is not None:
            self.average.update(index)

    def stopped(self, epoch: int) -> bool:
        """Whether it has waited long enough for a better epoch."""
        patience = self.settings.patience
        return patience is not None and self.best_epoch >= 0 and epoch - 1 - self.best_epoch >= patience

    def close(self, record: dict[str, Any], score: float | None) -> None:
        """End an epoch with its record and, where there is a validation split, the headline (larger is better)."""
        if score is not None and (self.best is None or score > self.best):
            self.best, self.best_epoch = score, record["epoch"]
            if self.settings.keep == "best":
                self._keep()
        if self.kept is None or self.settings.keep == "last" or score is None:
            self._keep()
        self.history.append(record)

    def _keep(self) -> None:
        self.kept = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def finish(self) -> dict[str, float]:
        """Put the kept weights into the network; their validation metrics."""
        if self.kept is not None:
            self.network.load_state_dict(self.kept)
        row = self.history[self.best_epoch if self.settings.keep == "best" else -1] if self.history else {}
        return {k.removeprefix("val."): v for k, v in row.items() if k.startswith("val.")}

    def finite(self) -> bool:
        """Whether all trained weights are numbers."""
        return all(bool(p.isfinite().all()) for p in self.trained.parameters())

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds of it beside the learner's tensors."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.tensors if self.average else None,
            "kept": self.kept,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load(state["average"])
        self.kept, self.best, self.best_epoch = state["kept"], state["best"], state["best_epoch"]
        self.history = state["history"]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights, where there are averaged ones."""
        if self.average is not None:
            self.average.swap()
