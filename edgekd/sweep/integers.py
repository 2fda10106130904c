"""One layer at a time in int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import quant
from ..models import Tapped
from ..pruning.sensitivity import Effect
from ..quant.prepared import floating
from ..quant.sensitivity import switches

__all__ = ["in_integers"]


@torch.no_grad()
def in_integers(
    network: nn.Module,
    pairs: Sequence[tuple[Tensor, Tensor | None]],
    calibration: Sequence[Mapping[str, Any]],
    scheme: str,
    macs: Mapping[str, float],
    emit: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Every layer with its input and weights, and a convolution's output, as int8 would have them; all others float.

    macs: by the name of the layer's weight. Raises UsageError or StageError where the network cannot be quantized.
    """
    prepared = quant.prepare(
        Tapped(network), calibration[0]["image"][:2], quant.scheme_named(scheme, "scheme"), qat=False
    )
    quant.calibrate(prepared, (batch["image"] for batch in calibration))
    rows = []

    def answers() -> list[Tensor]:
        return [prepared(batch)["logits"].double().log_softmax(1) for batch, _ in pairs]

    with floating(prepared):
        own, every = answers(), switches(prepared)
        for done, (path, switch) in enumerate(every.items(), 1):
            switch(True)
            effect = _effect(own, answers(), [labels for _, labels in pairs])
            switch(False)
            share = macs.get(f"{path}.weight", 0.0) / sum(macs.values())
            rows.append({"name": path, "macs": share, "harm": effect.divergence, "drop": effect.drop})
            emit({"event": "bench", "profile": "sensitivity to int8", "done": done, "total": len(every)})
    return rows


def _effect(before: Sequence[Tensor], after: Sequence[Tensor], labels: Sequence[Tensor | None]) -> Effect:
    p, q = torch.cat(list(before)), torch.cat(list(after))
    divergence = float((p.exp() * (p - q)).sum(1).mean())
    known = [one for one in labels if one is not None]
    if len(known) < len(labels):
        return Effect(divergence, None)
    right = [int((one.argmax(1) == torch.cat(known)).sum()) for one in (p, q)]
    return Effect(divergence, (right[0] - right[1]) / len(p))
