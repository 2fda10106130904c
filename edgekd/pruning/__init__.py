"""Structured pruning: fewer channels and attention heads, down to a measured share of the MACs or parameters."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import StageError, UsageError, nearest
from .graph import ChannelGroup, Edit, apply, channel_groups
from .plan import GroupPlan, Importance, PruningPlan, Target
from .ranking import channel_importance, with_gradients
from .search import (
    Candidate,
    Setting,
    choose,
    count_macs,
    count_parameters,
    prunable,
    removed_channels,
    tensor_costs,
)
from .soundness import difference, keep_sound

__all__ = ["GroupPlan", "Importance", "PruningPlan", "Target", "count_macs", "count_parameters", "prune"]


def prune(
    network: nn.Module,
    example: Tensor,
    *,
    target: Target,
    importance: Importance,
    channel_multiple: int,
    protected: Sequence[str] = (),
    loss: Callable[[nn.Module], Tensor] | None = None,
    keep_outputs: int | None = None,
) -> PruningPlan:
    """Remove the least important channels of `network`, in place, until at most the target's share remains.

    network: any nn.Module; its mode and its frozen parameters stay as they are. example: [1, C, H, W].
    target: the share of MACs or parameters that may remain. It is measured on the pruned network, and never exceeded:
        the result is a largest one that fits, in that no step of any group can be taken back (see `search.choose`).
    importance: how channels are ranked within a group (see `ranking.channel_importance`). Groups are weighed against
        each other by the share of their importance that they lose.
    channel_multiple: every group that is pruned keeps a multiple of so many channels; groups of fewer than twice as
        many are left alone. 1 means no rounding.
    protected: patterns (fnmatch) of module paths whose outputs stay, with everything below them; their inputs follow.
    loss: for "taylor", called once with a copy of the network in evaluation mode; returns the scalar loss of the
        calibration images, which this function differentiates.
    keep_outputs: number of classes: the last layer with so many outputs stays, even where something reads it.

    The outputs of the network stay. Groups whose removal is not the same as masking them (see `soundness`) are left
    alone, and the plan says why. The result is the same for the same inputs.
    Raises UsageError (a pattern that matches nothing, no loss, an unreachable target) and StageError.
    """
    if importance == "taylor" and loss is None:
        raise UsageError('importance = "taylor" needs a calibration loss', where="importance")
    covered = _protected_by(network, protected)
    scored = with_gradients(network, loss) if importance == "taylor" and loss is not None else network
    groups = channel_groups(network, example, channel_multiple)
    head = _last_layer(network, keep_outputs)
    importances: dict[str, Tensor] = {}
    for group in groups:
        group.reason_kept = group.reason_kept or _reason(group, covered, head)
        scores = channel_importance(scored, group, importance)
        if scores is not None:
            importances[group.name] = scores
        elif group.reason_kept is None:
            group.reason_kept = f"{importance} does not rank these channels: " + (
                "no batch normalisation follows" if importance == "bn-scale" else "the loss does not depend on them"
            )
    sound = keep_sound(network, example, [group for group in groups if group.reason_kept is None])
    candidates = [prunable(network, group, importances[group.name]) for group in sound]

    def measure(setting: Setting) -> int:
        twin = copy.deepcopy(network)
        apply(twin, *_surgery(candidates, setting))
        return count_macs(twin, example) if target.measure == "macs" else count_parameters(twin)

    before = {"macs": count_macs(network, example), "parameters": count_parameters(network)}
    whole = before[target.measure]
    costs = tensor_costs(network, example, candidates, target.measure)
    setting = choose(candidates, costs, target.share * whole, measure)
    if setting is None:
        # Rounded up, so that asking for the number that is shown succeeds.
        least = math.ceil(measure({c.group.name: c.steps[-1] for c in candidates}) / whole * 1e4) / 1e4
        raise UsageError(
            f"{target.share:g} cannot be reached: at least {least:.4f} of the {target.measure} remain "
            f"when everything that can be pruned is ({len(candidates)} of {len(groups)} groups of channels)",
            where=f"target.{target.measure}",
            hint=_more_room(groups, channel_multiple),
        )
    surgery = _surgery(candidates, setting)
    problem = difference(network, example, *surgery)
    if problem:
        raise StageError(f"the pruned network would be broken: {problem}", hint="protect some of its layers")
    apply(network, *surgery)
    return PruningPlan(
        target=target,
        importance=importance,
        channel_multiple=channel_multiple,
        groups=_group_plans(groups, {c.group.name: c for c in candidates}, setting, importances),
        macs_before=before["macs"],
        macs_after=count_macs(network, example),
        parameters_before=before["parameters"],
        parameters_after=count_parameters(network),
    )


def _surgery(candidates: Sequence[Candidate], setting: Setting) -> tuple[list[Edit], dict[str, dict[str, Any]]]:
    edits: list[Edit] = []
    attributes: dict[str, dict[str, Any]] = {}
    for c in candidates:
        gone = setting[c.group.name]
        if gone:
            edits += c.group.edits_of(removed_channels(c, gone))
            attributes |= c.group.attributes(gone)
    return edits, attributes


def _group_plans(
    groups: Sequence[ChannelGroup], candidates: dict[str, Candidate], setting: Setting, importances: dict[str, Tensor]
) -> list[GroupPlan]:
    plans = []
    for group in groups:
        gone = setting.get(group.name, 0)
        removed = removed_channels(candidates[group.name], gone) if gone else []
        scores = importances.get(group.name)
        share = float(scores[removed].sum() / scores.sum()) if removed and scores is not None and scores.sum() else 0.0
        plans.append(
            GroupPlan(
                name=group.name,
                layers=group.layers,
                channels_before=group.channels,
                channels_after=group.channels - len(removed),
                removed=removed,
                importance_removed_share=share,
                attributes=group.attributes(gone),
                reason_kept=None if removed else group.reason_kept or "the target was met without it",
            )
        )
    return plans


def _protected_by(network: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Module path -> the pattern that protects it."""
    paths = [path for path, _ in network.named_modules() if path]
    covered: dict[str, str] = {}
    for pattern in patterns:
        hits = fnmatch.filter(paths, pattern)
        if not hits:
            raise UsageError(f"no module matches {pattern!r}", where="protected", hint=nearest(pattern, paths))
        for path in paths:
            if any(path == hit or path.startswith(f"{hit}.") for hit in hits):
                covered.setdefault(path, pattern)
    return covered


def _last_layer(network: nn.Module, outputs: int | None) -> str | None:
    widths = {
        path: getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        for path, module in network.named_modules()
    }
    return next((path for path in reversed(widths) if outputs is not None and widths[path] == outputs), None)


def _reason(group: ChannelGroup, covered: dict[str, str], head: str | None) -> str | None:
    producers = [edit.path for edit in group.edits if edit.produces]
    for path in producers:
        if path in covered:
            return f"protected by {covered[path]!r}"
    if head in producers:
        return f"{head} makes the network's outputs"
    if len(group.units) < 2 * group.step:
        return f"{group.channels} channels are fewer than 2 x {group.step}"
    return None


def _more_room(groups: Sequence[ChannelGroup], channel_multiple: int) -> str:
    reasons = [group.reason_kept or "" for group in groups]
    if any("does not rank" in reason for reason in reasons):
        return 'use importance = "magnitude", which ranks the channels of every layer'
    if channel_multiple > 1 and any("fewer than" in reason for reason in reasons):
        return f"raise the target, lower channel_multiple (now {channel_multiple}), or start from a smaller student"
    if any(reason.startswith("protected") for reason in reasons):
        return "raise the target, or protect fewer layers"
    return "raise the target, or start from a smaller student"
