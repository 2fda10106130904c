"""What one change does to a network's answers: measured on images, for every group, every step, every block.

A step is measured on the network that surgery leaves, so it means what removal means, norms over channels included.
Whatever runs before the first layer that a change touches gives what it gave before, and is not computed again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..models import outputs
from .clone import clone
from .graph import apply
from .prefix import Calls, reusing, run_keeping
from .search import Candidate, surgery

__all__ = ["Change", "Effect", "effects", "filled", "harm", "measured_steps", "removal"]

#: Of a group with more steps than these so many are measured, evenly spaced; those between lie on straight lines.
POINTS = 16
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Change:
    """Something done to a copy of a network, in place, and the modules and parameters that it touches."""

    make: Callable[[nn.Module], None]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Effect:
    """What a change does to the answers, mean over the images.

    divergence: KL(softmax(logits before) || softmax(logits after)), in nats.
    drop: top-1 accuracy before - after, a fraction; None where the images have no labels.
    """

    divergence: float
    drop: float | None


def harm(
    network: nn.Module,
    candidates: Sequence[Candidate],
    batches: Iterable[Tensor],
    *,
    reference: nn.Module | None = None,
    points: int = POINTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """For every candidate by name and each of its `steps`, the harm of taking that many of its units away alone.

    Harm is KL(softmax(reference's logits) || softmax(logits without the units)), in nats, mean over the images. Step 0
    is 0. With a `reference` other than the network itself it is what that divergence grows by, and may be negative.

    network: any network that gives logits [N, K]; not changed, measured in evaluation mode and its own precision.
    batches: calibration images [N, C, H, W], as the network takes them.
    points: at most so many steps of a candidate are measured, the last among them; the others are interpolated.
    progress: told how many forward passes of a batch are done, and how many there are.
    Cost: a forward pass of all images per measured step, less what runs before the group, and one or two more.
    Raises StageError where logits are not finite, or there are no images.
    """
    steps = {c.name: measured_steps(c, points) for c in candidates}
    changes = {(c.name, i): removal(c, i) for c in candidates for i in steps[c.name]}
    pairs = [(batch, None) for batch in batches]
    total = len(changes) * len(pairs)
    found = effects(network, changes, pairs, reference=reference, progress=lambda done: progress(done, total))
    return {c.name: filled({i: found[c.name, i].divergence for i in steps[c.name]}, c.steps) for c in candidates}


def measured_steps(candidate: Candidate, points: int = POINTS) -> list[int]:
    """Positions in the candidate's steps, 0 left out: all, or `points` of them, evenly spaced and with the last."""
    last = len(candidate.steps) - 1
    wanted = min(points, last)
    return [round(last * i / wanted) for i in range(1, wanted + 1)]


def filled(values: Mapping[int, float], steps: Sequence[int]) -> list[float]:
    """The value of every step from those at some positions: 0 at step 0, and straight lines in between."""
    known = {0: 0.0, **values}
    result = [known.get(position, 0.0) for position in range(len(steps))]
    for low, high in itertools.pairwise(known):
        for position in range(low + 1, high):
            share = (steps[position] - steps[low]) / (steps[high] - steps[low])
            result[position] = (1 - share) * known[low] + share * known[high]
    return result


def removal(candidate: Candidate, position: int) -> Change:
    """Taking a candidate alone to that position of its steps."""
    edits, attributes, blocks = surgery([candidate], {candidate.name: position})
    return Change(lambda network: apply(network, edits, attributes, blocks), (*candidate.group.layers, *attributes))


@torch.no_grad()
def effects(
    network: nn.Module,
    changes: Mapping[Key, Change],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    reference: nn.Module | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[Key, Effect]:
    """The effect of every change alone, on images [N, C, H, W] with or without labels [N].

    network: not changed; it is measured in evaluation mode, on its own device and in its own precision. With a
    `reference`, the divergence is from its answers, less that of the unchanged network. `progress` is told how many
    forward passes of a batch with a change are done.
    Raises StageError where logits are not finite, or there are no images.
    """
    whole = copy.deepcopy(network).eval()
    device = next((p.device for p in whole.parameters()), torch.device("cpu"))
    other = None if reference is None else copy.deepcopy(reference).eval().to(device)
    divergence = dict.fromkeys(changes, 0.0)
    lost = dict.fromkeys(changes, 0)
    before: dict[Key, list[str]] = {}
    images, done, labelled = 0, 0, True
    for batch, labels in batches:
        inputs = batch.to(device)
        if not images:
            calls = Calls.of(whole, inputs[:1])
            before = {key: calls.before(whole, change.paths) for key, change in changes.items()}
        kept, result = run_keeping(whole, inputs, set(itertools.chain(*before.values())))
        own = _log_probabilities(result)
        target = own if other is None else _log_probabilities(other(inputs))
        start, right = _divergence(target, own), _right(own, labels)
        for key, change in changes.items():
            changed = clone(whole)
            change.make(changed)
            reusing(changed, {path: kept[path] for path in before[key]})
            found = _log_probabilities(changed(inputs))
            divergence[key] += _divergence(target, found) - start
            lost[key] += right - _right(found, labels)
            progress(done := done + 1)
        images += len(inputs)
        labelled = labelled and labels is not None
    if images == 0:
        raise StageError("no calibration images to measure on", hint="give more images")
    return {key: Effect(divergence[key] / images, lost[key] / images if labelled else None) for key in changes}


def _log_probabilities(result: Any) -> Tensor:
    logits = outputs(result)["logits"].double()
    if not bool(logits.isfinite().all()):
        hint = "check the weights and the calibration images"
        raise StageError("the logits of the calibration images are not finite", hint=hint)
    return logits.log_softmax(1)


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of log-probabilities [N, K], summed over the images."""
    return float((p.exp() * (p - q)).sum())


def _right(answers: Tensor, labels: Tensor | None) -> int:
    return 0 if labels is None else int((answers.argmax(1) == labels.to(answers.device)).sum())
