"""What several processes that train together must agree on after a step, beside the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import ranks

__all__ = ["Shared"]

STATISTICS = ("running_mean", "running_var")


class Shared:
    """Losses and buffers of a learner in training. With one process nothing is done.

    Statistics of batch norms are averaged: each process has seen other rows, and normalises by its own. What objectives
    memorise (see `edgekd/objectives/contrast.py`) is memorised everywhere, buffers named in their `memory` that is. All
    other buffers, such as ranges of fake quantization, are the first process's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.memories: list[Any] = [m for m in module.modules() if hasattr(m, "memorise")]

    def losses(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """The means over all processes; statistics of batch norms travel with them."""
        if ranks.count() == 1:
            return {name: float(value.detach()) for name, value in losses.items()}
        values = torch.stack([value.detach().double() for value in losses.values()])
        statistics = [b for n, b in self.module.named_buffers() if n.endswith(STATISTICS)]
        ranks.mean([values, *statistics])
        return dict(zip(losses, values.tolist(), strict=True))

    def buffers(self) -> None:
        """Everything else that is no parameter."""
        if ranks.count() == 1:
            return
        ranks.same(list(self._others()))
        for memory in self.memories:
            mine, memory.fresh = memory.fresh, None
            for rows in ranks.gathered(mine and {name: value.cpu() for name, value in mine.items()}):
                if rows:
                    device = getattr(memory, memory.memory[0]).device
                    memory.memorise(**{name: value.to(device) for name, value in rows.items()})

    def _others(self) -> Iterator[Tensor]:
        held = {id(getattr(memory, name)) for memory in self.memories for name in memory.memory}
        for name, buffer in self.module.named_buffers():
            if id(buffer) not in held and not name.endswith((*STATISTICS, "num_batches_tracked")):
                yield buffer
