"""Bias correction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .graph import CONVOLUTIONS, operation
from .side_by_side import layers_side_by_side

__all__ = ["correct_bias"]


@torch.no_grad()
def correct_bias(prepared: nn.Module, batches: Iterable[Tensor]) -> int:
    """Shift each bias so that every output channel has its float mean again; returns how many layers were corrected.

    Empirical: on `batches` of images [N, C, H, W], of which a few hundred suffice, layer by layer, with all earlier
    ones quantized and corrected. Calibrate first. Layers without a bias stay as they are.
    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D. Raises what `layers_side_by_side` raises.
    """
    corrected = 0
    for layer in layers_side_by_side(prepared, batches):
        if layer.bias is None:
            continue
        weight = layer.quantizer(layer.weight)
        axis = 1 if operation(layer.node) in CONVOLUTIONS else -1
        difference, count = torch.zeros_like(layer.bias, dtype=torch.float64), 0
        for x, quantized in zip(layer.floats, layer.quantized, strict=True):
            error = layer.output(x, layer.before) - layer.output(quantized, weight)
            error = error.movedim(axis, 0).flatten(1)
            difference += error.double().sum(dim=1)
            count += error.shape[1]
        layer.bias.add_((difference / count).to(layer.bias.dtype))
        corrected += 1
    return corrected
