"""The sweep of any network: channels and blocks taken away, layers put into int8, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EdgekdError, StageError
from ..models import outputs
from ..pruning import Importance
from ..pruning.candidates import Found, find
from ..pruning.costs import Predicted, counted_layers
from ..pruning.ranking import labelled, unlabelled
from ..pruning.search import Candidate
from ..pruning.sensitivity import Effect, effects, measured_steps, removal
from ..report.sensitivity import harm_at
from .integers import in_integers

__all__ = ["sweep"]

#: Steps of a group that are measured at most.
POINTS = 8
Emit = Callable[[dict[str, Any]], None]
Batch = Mapping[str, Any]
Pair = tuple[Tensor, Tensor | None]


def sweep(
    network: nn.Module,
    measured: Sequence[Batch],
    *,
    calibration: Sequence[Batch],
    channel_multiple: int,
    scheme: str,
    importance: Importance = "magnitude",
    keep_outputs: int | None = None,
    emit: Emit = lambda event: None,
) -> dict[str, Any]:
    """What each change alone does to the answers of a float network, which is not changed.

    measured: the images that it is measured on, calibration: those that set int8 ranges and importances; batches of
    {"image": [N, C, H, W], "label": [N]}. The other arguments are those of `pruning.prune` and a scheme's name.

    `groups` (with `steps` from whole to what may be left), `blocks` and `layers` (in int8) say `harm`, the mean KL
    divergence of the class probabilities from the whole network's in nats, and `drop`, what top-1 accuracy falls by
    (None without labels). Each list begins with what is most harmful, groups with half of them gone. `macs` are shares
    of the network's: left at a step, saved without a block, of a layer. What may not go has a `reason`.
    Raises StageError where there is nothing that could be pruned or quantized.
    """
    network = copy.deepcopy(network).eval()
    example = measured[0]["image"][:1]
    pairs: list[Pair] = [(batch["image"], _labels(batch)) for batch in measured]
    macs = {layer.tensor: layer.cost({}) for layer in counted_layers(network, example, "macs")}
    found, not_pruned = _found(network, example, calibration, importance, channel_multiple, keep_outputs)
    groups, blocks = ([], []) if found is None else _taken_away(network, example, found, pairs, emit)
    try:
        layers, not_quantized = in_integers(network, pairs, calibration, scheme, macs, emit), None
    except EdgekdError as error:
        layers, not_quantized = [], error.problems[0].what
    if not (groups or blocks or layers):
        why = [reason for reason in (not_pruned, not_quantized) if reason]
        raise StageError("; ".join(["nothing to sweep: no layer was found", *why]), where="sensitivity")
    return {
        "importance": importance,
        "channel_multiple": channel_multiple,
        "scheme": scheme,
        "accuracy": _accuracy(network, pairs),
        "macs": round(sum(macs.values())),
        "groups": sorted(groups, key=_half_gone, reverse=True),
        "blocks": sorted(blocks, key=_harm, reverse=True),
        "layers": sorted(layers, key=_harm, reverse=True),
        "not_pruned": not_pruned,
        "not_quantized": not_quantized,
    }


def _labels(batch: Batch) -> Tensor | None:
    labels: Tensor | None = batch.get("label")
    return None if labels is None or bool((labels < 0).any()) else labels


def _half_gone(group: Mapping[str, Any]) -> float:
    value = harm_at(group, 0.5)
    return -1.0 if value is None else value


def _harm(row: Mapping[str, Any]) -> float:
    return -1.0 if row["harm"] is None else float(row["harm"])


@torch.no_grad()
def _accuracy(network: nn.Module, pairs: Iterable[Pair]) -> float | None:
    right = images = 0
    for batch, labels in pairs:
        if labels is None:
            return None
        right += int((outputs(network(batch))["logits"].argmax(1) == labels).sum())
        images += len(batch)
    return right / images


def _found(
    network: nn.Module,
    example: Tensor,
    calibration: Sequence[Batch],
    importance: Importance,
    channel_multiple: int,
    keep_outputs: int | None,
) -> tuple[Found | None, str | None]:
    """What may be taken away, or why the network cannot be looked through."""

    def loss(twin: nn.Module) -> Tensor:
        known = [(images, labels) for images, labels in map(labelled, calibration) if len(labels)]
        if not known:
            raise unlabelled("taylor")
        losses = [nn.functional.cross_entropy(outputs(twin(images))["logits"], labels) for images, labels in known]
        return torch.stack(losses).mean()

    try:
        found = find(
            network,
            example,
            importance=importance,
            channel_multiple=channel_multiple,
            loss=loss,
            batches=calibration,
            keep_outputs=keep_outputs,
        )
    except EdgekdError as error:
        return None, error.problems[0].what
    return found, None


def _taken_away(
    network: nn.Module, example: Tensor, found: Found, pairs: Sequence[Pair], emit: Emit
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    candidates = {c.name: c for c in found.candidates}
    positions = {name: measured_steps(c, POINTS) for name, c in candidates.items()}
    changes = {(name, i): removal(c, i) for name, c in candidates.items() for i in positions[name]}
    total = len(changes) * len(pairs)

    def progress(done: int) -> None:
        emit({"event": "bench", "profile": "sensitivity of channels", "done": done, "total": total})

    measured = effects(network, changes, pairs, progress=progress)
    predicted = Predicted(counted_layers(network, example, "macs"), found.candidates)
    whole = predicted.total({})
    nothing = Effect(0.0, None if any(labels is None for _, labels in pairs) else 0.0)

    def step(c: Candidate, i: int) -> dict[str, Any]:
        effect = measured[c.name, i] if i else nothing
        left = {"left": len(c.group.units) - c.steps[i], "macs": predicted.total({c.name: i}) / whole}
        return {**left, "harm": effect.divergence, "drop": effect.drop}

    def steps(name: str) -> list[dict[str, Any]]:
        return [step(candidates[name], i) for i in (0, *positions[name])] if name in candidates else []

    groups = [
        {"name": g.name, "layers": g.layers, "channels": g.channels, "units": len(g.units)}
        | {"steps": steps(g.name), "reason": g.reason_kept}
        for g in found.groups
    ]
    blocks = [{"name": b.name, **_without(steps(b.name)), "reason": b.reason_kept} for b in found.blocks]
    return groups, blocks


def _without(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What goes with a block, from its steps; nothing is known of one that may not go."""
    if not steps:
        return {"macs": None, "harm": None, "drop": None}
    return {"macs": 1 - steps[-1]["macs"], "harm": steps[-1]["harm"], "drop": steps[-1]["drop"]}
