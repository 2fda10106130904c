"""Parameters and multiply-accumulates of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count"]


def count(module: nn.Module, size: Sequence[int]) -> tuple[int, int]:
    """(parameters, multiply-accumulates for one image of `size` [C, H, W]), counted in evaluation mode.

    Counted are convolutions and matrix products (attention included), not elementwise work. Half the figure of
    `torch.utils.flop_counter.FlopCounterMode`, which counts a multiply-accumulate as two operations.
    """
    parameters = sum(p.numel() for p in module.parameters())
    first = next(module.parameters(), torch.empty(0))
    image = torch.zeros(1, *size, device=first.device, dtype=first.dtype)
    modes = {m: m.training for m in module.modules()}
    if any(modes.values()):
        module.eval()
    try:
        # The fused CPU attention kernel is unknown to the counter: without this, attention would count as nothing.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(image)
    finally:
        for m, mode in modes.items():
            m.training = mode
    return parameters, counter.get_total_flops() // 2
