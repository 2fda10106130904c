"""What taking units away does to the network's answers: measured on images, for every group and every step.

A step is measured on the network that surgery leaves, so it means what removal means, norms over channels included.
Whatever runs before the first layer that a step touches gives what it gave before, and is not computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import StageError
from ..models import outputs
from .graph import apply
from .search import Candidate, removed_channels

__all__ = ["harm"]

#: Of a group with more steps than these so many are measured, evenly spaced; those between lie on straight lines.
POINTS = 16


@torch.no_grad()
def harm(
    network: nn.Module,
    candidates: Sequence[Candidate],
    batches: Iterable[Tensor],
    *,
    reference: nn.Module | None = None,
    points: int = POINTS,
) -> dict[str, list[float]]:
    """For every candidate by name and each of its `steps`, the harm of taking that many of its units away alone.

    Harm is KL(softmax(reference's logits) || softmax(logits without the units)), in nats, mean over the images. Step 0
    is 0. With a `reference` other than the network itself it is what that divergence grows by, and may be negative.

    network: any network that gives logits [N, K]; not changed, measured in evaluation mode and its own precision.
    batches: calibration images [N, C, H, W], as the network takes them; gone through once.
    points: at most so many steps of a candidate are measured, the last among them; the others are interpolated.
    Cost: a forward pass of all images per measured step, less what runs before the group, and one or two more.
    Raises StageError where logits are not finite, or there are no images.
    """
    whole = copy.deepcopy(network).eval()
    device = next((p.device for p in whole.parameters()), torch.device("cpu"))
    other = None if reference is None else copy.deepcopy(reference).eval().to(device)
    measured = {c.group.name: _spread(len(c.steps), points) for c in candidates}
    totals = {c.group.name: torch.zeros(len(c.steps), dtype=torch.float64) for c in candidates}
    first = None
    images = 0
    for batch in batches:
        inputs = batch.to(device)
        first = _Calls.of(whole, inputs[:1]) if first is None else first
        wanted = {path for c in candidates for path in first.before(whole, c)}
        kept, own = _run(whole, inputs, wanted)
        target = own if other is None else _log_probabilities(other, inputs)
        start = _divergence(target, own)
        for c in candidates:
            reused = {path: kept[path] for path in first.before(whole, c)}
            for position in measured[c.group.name]:
                without = _without(whole, c, c.steps[position])
                for path, value in reused.items():
                    without.get_submodule(path).forward = _giving(value)  # type: ignore[method-assign]
                totals[c.group.name][position] += _divergence(target, _log_probabilities(without, inputs)) - start
        images += len(inputs)
    if images == 0:
        raise StageError("no calibration images to measure harm on", where="prune")
    return {c.group.name: _filled(totals[c.group.name] / images, c.steps, measured[c.group.name]) for c in candidates}


def _without(network: nn.Module, candidate: Candidate, units: int) -> nn.Module:
    twin = copy.deepcopy(network)
    channels = removed_channels(candidate, units)
    apply(twin, candidate.group.edits_of(channels), candidate.group.attributes(units))
    return twin


def _log_probabilities(network: nn.Module, images: Tensor) -> Tensor:
    logits = outputs(network(images))["logits"].double()
    if not bool(logits.isfinite().all()):
        hint = "check the weights and the calibration images"
        raise StageError("the logits of the calibration images are not finite", where="prune", hint=hint)
    return logits.log_softmax(1)


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of log-probabilities [N, K], summed over the images."""
    return float((p.exp() * (p - q)).sum())


def _spread(steps: int, points: int) -> list[int]:
    """Positions 1 ... steps - 1, or `points` of them, evenly spaced and with the last."""
    last = steps - 1
    return sorted({round(last * i / min(points, last)) for i in range(1, min(points, last) + 1)})


def _filled(values: Tensor, steps: Sequence[int], measured: Sequence[int]) -> list[float]:
    """The harm of every step, straight lines between those that were measured."""
    known = [0, *measured]
    result = values.tolist()
    for low, high in zip(known, known[1:], strict=False):
        for position in range(low + 1, high):
            share = (steps[position] - steps[low]) / (steps[high] - steps[low])
            result[position] = (1 - share) * result[low] + share * result[high]
    return result


class _Calls:
    """When each module was called in one forward pass, and when it returned."""

    def __init__(self) -> None:
        self.times: dict[str, list[tuple[int, int]]] = {}
        self._found: dict[str, list[str]] = {}

    @classmethod
    def of(cls, network: nn.Module, images: Tensor) -> _Calls:
        calls = cls()
        begun: dict[str, list[int]] = {}
        clock = iter(range(1 << 62))

        def enter(path: str) -> Callable[..., None]:
            return lambda *_: begun.setdefault(path, []).append(next(clock))

        def leave(path: str) -> Callable[..., None]:
            return lambda *_: calls.times.setdefault(path, []).append((begun[path].pop(), next(clock)))

        handles = []
        for path, module in network.named_modules():
            handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave(path))]
        try:
            network(images)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def before(self, network: nn.Module, candidate: Candidate) -> list[str]:
        """The largest modules that ran once, and returned before anything ran that the candidate changes."""
        name = candidate.group.name
        if name not in self._found:
            touched = {*candidate.group.layers, *candidate.group.attributes(1)}
            start = min(self._start(path) for path in touched)
            self._found[name] = list(self._finished(network, "", start))
        return self._found[name]

    def _start(self, path: str) -> int:
        # A parameter, or a module that is read without being called, counts from the start of what holds it.
        while path and path not in self.times:
            path = path.rpartition(".")[0]
        return min(begin for begin, _ in self.times[path])

    def _finished(self, module: nn.Module, path: str, limit: int) -> Iterable[str]:
        times = self.times.get(path, [])
        if len(times) == 1 and times[0][1] < limit:
            yield path
            return
        for name, child in module.named_children():
            yield from self._finished(child, f"{path}.{name}" if path else name, limit)


def _run(network: nn.Module, images: Tensor, wanted: Iterable[str]) -> tuple[Mapping[str, Any], Tensor]:
    """What the wanted modules returned, and the log-probabilities."""
    kept: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            kept[path] = _copied(result)

        return hook

    handles = [network.get_submodule(path).register_forward_hook(keep(path)) for path in wanted]
    try:
        found = _log_probabilities(network, images)
    finally:
        for handle in handles:
            handle.remove()
    return kept, found


def _giving(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: _copied(value)


def _copied(value: Any) -> Any:
    # What follows may change it in place.
    return tree_map_only(Tensor, torch.clone, value)
