"""Several rounds of pruning told as one."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import Interval
from .plan import BlockPlan, GroupPlan, PruningPlan, home_of

__all__ = ["merged"]


def merged(plans: Sequence[PruningPlan]) -> PruningPlan:
    """What all rounds did together, in terms of the network before the first.

    plans: in their order, each of the network that the one before left. Harm and savings are summed; both were measured
    in their round, on the network that was healed before.
    """
    last = plans[-1]
    groups: dict[str, GroupPlan] = {}
    blocks: dict[str, BlockPlan] = {}
    for plan in plans:
        for group in plan.groups:
            groups[group.name] = _after(groups[group.name], group) if group.name in groups else group
        for name in [name for name in groups if name not in {group.name for group in plan.groups}]:
            groups[name] = groups[name].model_copy(update={"channels_after": 0})
        for block in plan.blocks:
            blocks[block.name] = block
    gone = [name for name, block in blocks.items() if block.removed]
    for name, group in groups.items():
        home = home_of(group.layers, gone)
        if home is not None:
            update = {"channels_after": 0, "block": home, "removed": [], "attributes": {}}
            reason = f"it went with the block {home}"
            groups[name] = group.model_copy(update={**update, "reason_kept": reason})
    update = {"groups": list(groups.values()), "blocks": list(blocks.values()), "harm": sum(p.harm for p in plans)}
    return last.model_copy(update=update)


def _sum(earlier: Interval | None, later: Interval | None) -> Interval | None:
    """Of what was measured, ends with ends: no narrower than the two are together."""
    if earlier is None or later is None:
        return earlier or later
    return Interval(**{k: getattr(earlier, k) + getattr(later, k) for k in ("value", "low", "high")})


def _after(earlier: GroupPlan, later: GroupPlan) -> GroupPlan:
    left = [i for i in range(earlier.channels_before) if i not in set(earlier.removed)]
    removed = sorted([*earlier.removed, *(left[i] for i in later.removed)])
    share = earlier.importance_removed_share
    return later.model_copy(
        update={
            "channels_before": earlier.channels_before,
            "removed": removed,
            "importance_removed_share": share + (1 - share) * later.importance_removed_share,
            "attributes": later.attributes or earlier.attributes,
            "saved": earlier.saved + later.saved,
            "saved_measured": _sum(earlier.saved_measured, later.saved_measured) if removed else None,
            "harm": sum(filter(None, (earlier.harm, later.harm))) if removed else None,
            "reason_kept": None if removed else later.reason_kept,
        }
    )
