"""Whether a target can be reached, as far as that is known of a network before anything is trained or timed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from ..errors import UsageError
from .budget import Met
from .candidates import Found, find
from .goal import Goal, Task, goal_of
from .plan import Target

__all__ = ["reach", "unreachable"]


def reach(
    network: nn.Module,
    example: Tensor,
    *,
    target: Target,
    channel_multiple: int,
    protected: Sequence[str],
    keep_outputs: int,
    depth: bool,
    tapped: Collection[str],
) -> None:
    """Go through a network as `prune` does, and take everything away that may go. The network is not changed.

    Its weights do not matter: channels are ranked by magnitude. The arguments are those of `prune`; of a latency only
    the network and the patterns are looked at. Raises what `prune` would raise: UsageError (a pattern that matches
    nothing, a share that more than everything would have to go for) and StageError (it cannot be traced).
    """
    whole = copy.deepcopy(network).eval()
    found = find(
        whole,
        example,
        importance="magnitude",
        channel_multiple=channel_multiple,
        protected=protected,
        keep_outputs=keep_outputs,
        depth=depth,
        tapped=tapped,
    )
    if target.latency is not None:
        return
    goal = goal_of(Task(whole, whole, example, found.candidates, 1.0), target, None)
    if goal.budget({c.name: len(c.steps) - 1 for c in found.candidates}) is None:
        raise unreachable(goal, Met(None, goal.floor), found, channel_multiple)


def unreachable(goal: Goal, met: Met, found: Found, channel_multiple: int) -> UsageError:
    """What the nearest is, and what helps."""
    total = f"{len(found.candidates)} of {len(found.groups) + len(found.blocks)} groups of channels and blocks"
    return goal.unreachable(met, total, _more_room(found, channel_multiple))


def _more_room(found: Found, channel_multiple: int) -> str:
    reasons = [group.reason_kept or "" for group in found.groups] + [block.reason_kept or "" for block in found.blocks]
    if any("does not rank" in reason for reason in reasons):
        return 'use importance = "magnitude", which ranks the channels of every layer'
    if channel_multiple > 1 and any("fewer than" in reason for reason in reasons):
        return f"raise the target, lower channel_multiple (now {channel_multiple}), or start from a smaller student"
    if any(reason.startswith("protected") for reason in reasons):
        return "raise the target, or protect fewer layers"
    return "raise the target, or start from a smaller student"
