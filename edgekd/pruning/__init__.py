"""Structured pruning: fewer channels, attention heads and blocks, down to a budget that is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bench import Interval
from ..errors import StageError
from ..models import outputs
from .blocks import Block
from .budget import Met
from .candidates import Found, find
from .costs import Predicted
from .goal import Compared, Task, Timing, goal_of
from .graph import Edit, apply, channel_groups
from .knapsack import uniform
from .plan import BlockPlan, GroupPlan, Importance, LatencyTarget, PruningPlan, Target, home_of
from .progress import Progress, Spent, spend
from .ranking import IMPORTANCES
from .reach import reach, unreachable
from .rounds import merged
from .search import Positions, count_bytes, count_macs, count_parameters, removed_channels, surgery, without
from .soundness import difference

__all__ = ["IMPORTANCES", "BlockPlan", "Compared", "GroupPlan", "Importance", "LatencyTarget", "PruningPlan"]
__all__ += ["Target", "Timing", "carry_out", "count_macs", "count_parameters", "merged", "prune", "reach"]


def prune(
    network: nn.Module,
    example: Tensor,
    *,
    target: Target,
    importance: Importance,
    channel_multiple: int,
    protected: Sequence[str] = (),
    loss: Callable[[nn.Module], Tensor] | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    keep_outputs: int | None = None,
    depth: bool = True,
    strategy: Literal["knapsack", "uniform"] = "knapsack",
    timing: Timing | None = None,
    tapped: Collection[str] = (),
    reference: nn.Module | None = None,
    part: float = 1.0,
    progress: Progress = lambda what, done, total: None,
) -> PruningPlan:
    """Remove what is least missed of `network`, in place, until the target is met.

    network: any nn.Module; its mode and its frozen parameters stay as they are. example: [1, C, H, W].
    target: what may remain of MACs, parameters or bytes, or a latency, for which `timing` is needed. It is measured on
        the pruned network, and never exceeded.
    importance: how channels are ranked within a group (see `ranking.channel_importance`). Groups and blocks are weighed
        against each other by the harm that they do to the answers on `batches` (see `sensitivity.harm`).
    channel_multiple: every group that is pruned keeps a multiple of so many channels; groups of fewer than twice as
        many are left alone. 1 means no rounding.
    protected: patterns (fnmatch) of module paths whose outputs stay, with everything below them; their inputs follow.
    loss: for "taylor", called once with a copy of the network in evaluation mode; returns the scalar loss of the
        calibration images, which this function differentiates.
    batches: calibration images {"image": [N, C, H, W], "label": [N]}; none means the example alone. seed: of "random".
    keep_outputs: number of classes: the last layer with so many outputs stays, even where something reads it.
    depth: residual blocks may go as a whole (see `blocks.residual_blocks`).
    strategy: "knapsack", the least harm within the budget; "uniform", the same share of every group and no blocks.
    timing: how latency is predicted and measured.
    tapped: module paths that are looked at later: no block around one of them goes.
    reference: the network of which the target is a share, where this one was pruned before. part: how far to go on the
        way to the target, geometrically, in (0, 1]: half of the way to a quarter is a half.
    progress: told of the measurements of harm: (what, done, total).

    The outputs of the network stay. Groups whose removal is not the same as masking them (see `soundness`) are left
    alone, and the plan says why. The result is the same for the same inputs, as far as measured times are.
    Raises UsageError (a pattern that matches nothing, no loss, an unreachable target) and StageError.
    """
    whole = copy.deepcopy(network).eval()
    found = find(
        whole,
        example,
        importance=importance,
        channel_multiple=channel_multiple,
        protected=protected,
        loss=loss,
        batches=batches,
        seed=seed,
        keep_outputs=keep_outputs,
        depth=depth and strategy == "knapsack",
        tapped=tapped,
    )
    images = [batch["image"] for batch in batches] or [example]
    original = whole if reference is None else copy.deepcopy(reference).eval()
    goal = goal_of(Task(original, whole, example, found.candidates, part), target, timing)
    layers = goal.layers
    least = {c.name: len(c.steps) - 1 for c in found.candidates}
    budget = goal.budget(least)
    if budget is None:
        spent = Spent(Met(None, goal.floor), {})
    elif budget >= goal.start:  # an earlier round came so far, or it was fast enough
        spent = Spent(Met(dict.fromkeys(least, 0), goal.start), dict.fromkeys(least, 0))
    elif strategy == "uniform":
        met = goal.meet(budget, lambda share: uniform(found.candidates, goal.predicted, goal.cost(share)), least)
        spent = Spent(met, met.positions or {})
    else:
        spent = spend(goal, budget, images, progress)
    if spent.met.positions is None:
        raise unreachable(goal, spent.met, found, channel_multiple)
    positions = spent.positions
    edits, attributes, removed = surgery(found.candidates, positions)
    problem = difference(whole, example, edits, attributes)
    if problem:
        raise StageError(f"the pruned network would be broken: {problem}", hint="protect some of its layers")
    apply(network, edits, attributes, removed)
    after = without(whole, found.candidates, positions)
    predicted, undone = Predicted(layers, found.candidates), _undone(found, positions)
    saved = {name: predicted.total(back) - predicted.total(positions) for name, back in undone.items()}
    most = sorted(undone, key=lambda name: -saved[name])
    measured = goal.savings(found.candidates, positions, {name: undone[name] for name in most})
    groups, blocks = _plans(found, positions, spent.harm, saved, measured)
    return PruningPlan(
        target=target,
        importance=importance,
        strategy=strategy,
        channel_multiple=channel_multiple,
        groups=groups,
        blocks=blocks,
        harm=_divergence(whole, after, images),
        latency=goal.latency(),
        macs_before=count_macs(original, example),
        macs_after=count_macs(after, example),
        parameters_before=count_parameters(original),
        parameters_after=count_parameters(after),
        bytes_before=count_bytes(original),
        bytes_after=count_bytes(after),
    )


def _undone(found: Found, positions: Positions) -> dict[str, Positions]:
    """Of every block that went, and every group that lost channels and went with none: all else as it is, and it whole,
    with the groups inside it, which may have lost channels before the block went."""
    gone = [c.name for c in found.candidates if isinstance(c.group, Block) and positions[c.name]]
    groups = [c for c in found.candidates if not isinstance(c.group, Block) and positions[c.name]]
    homes = {c.name: home_of(c.group.layers, gone) for c in groups}
    undone = [*gone, *(name for name, home in homes.items() if home is None)]
    return {name: {**positions, name: 0, **{g: 0 for g, home in homes.items() if home == name}} for name in undone}


def _plans(
    found: Found,
    positions: Positions,
    harm: Mapping[str, float],
    saved: Mapping[str, float],
    measured: Mapping[str, Interval],
) -> tuple[list[GroupPlan], list[BlockPlan]]:
    candidates = {c.name: c for c in found.candidates}
    gone = [c.name for c in found.candidates if isinstance(c.group, Block) and positions[c.name]]
    groups = []
    for group in found.groups:
        home = home_of(group.layers, gone)
        position = positions.get(group.name, 0) if home is None else 0
        units = candidates[group.name].steps[position] if position else 0
        removed = removed_channels(candidates[group.name], units) if units else []
        scores = found.importances.get(group.name)
        share = float(scores[removed].sum() / scores.sum()) if removed and scores is not None and scores.sum() else 0.0
        kept = f"it went with the block {home}" if home is not None else "the target was met without it"
        groups.append(
            GroupPlan(
                name=group.name,
                layers=group.layers,
                channels_before=group.channels,
                channels_after=group.channels - len(removed) if home is None else 0,
                removed=removed,
                importance_removed_share=share,
                attributes=group.attributes(units),
                saved=saved.get(group.name, 0.0),
                saved_measured=measured.get(group.name),
                harm=harm.get(group.name) if removed else None,
                block=home,
                reason_kept=None if removed else (group.reason_kept if home is None else None) or kept,
            )
        )
    blocks = [
        BlockPlan(
            name=block.name,
            removed=block.name in gone,
            saved=saved.get(block.name, 0.0),
            saved_measured=measured.get(block.name),
            harm=harm.get(block.name),
            reason_kept=None if block.name in gone else block.reason_kept or "the target was met without it",
        )
        for block in found.blocks
    ]
    return groups, blocks


@torch.no_grad()
def _divergence(before: nn.Module, after: nn.Module, images: Sequence[Tensor]) -> float:
    total = 0.0
    for batch in images:
        p, q = (outputs(n(batch))["logits"].double().log_softmax(1) for n in (before, after))
        total += float((p.exp() * (p - q)).sum())
    return total / sum(map(len, images))


def carry_out(network: nn.Module, plan: PruningPlan, example: Tensor) -> None:
    """Do to `network`, in place, what a plan says that was made of the same network. Raises StageError."""
    groups = {group.name: group for group in channel_groups(network, example, plan.channel_multiple)}
    edits: list[Edit] = []
    attributes: dict[str, dict[str, Any]] = {}
    for one in plan.removed():
        if one.name not in groups:
            raise StageError(f"the plan prunes {one.name!r}, which the network does not have", where="plan.json")
        edits += groups[one.name].edits_of(one.removed)
        attributes |= one.attributes
    apply(network, edits, attributes, [block.name for block in plan.blocks if block.removed])
