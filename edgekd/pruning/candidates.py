"""What of a network may go, and why the rest may not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError, nearest
from .blocks import Block, residual_blocks
from .graph import ChannelGroup, channel_groups
from .plan import Importance
from .ranking import channel_importance, evidence, unranked
from .search import Candidate, block_candidate, prunable
from .soundness import keep_sound

__all__ = ["Found", "find"]


@dataclass(frozen=True)
class Found:
    """Every group and block of a network, the candidates among them, and the importance of each group's channels."""

    groups: list[ChannelGroup]
    blocks: list[Block]
    candidates: list[Candidate]
    importances: dict[str, Tensor]


def find(
    network: nn.Module,
    example: Tensor,
    *,
    importance: Importance,
    channel_multiple: int,
    protected: Sequence[str] = (),
    loss: Callable[[nn.Module], Tensor] | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    keep_outputs: int | None = None,
    depth: bool = True,
    tapped: Collection[str] = (),
) -> Found:
    """The candidates for pruning; `prune` says what the arguments are. The network is not changed.

    Raises UsageError (a pattern that matches nothing, nothing to measure the importance on) and StageError (it cannot
    be traced).
    """
    covered = _protected_by(network, protected)
    measured = evidence(network, importance, loss=loss, batches=batches)
    groups = channel_groups(network, example, channel_multiple)
    head = _last_layer(network, keep_outputs)
    importances: dict[str, Tensor] = {}
    for group in groups:
        group.reason_kept = group.reason_kept or _reason(group, covered, head)
        if group.reason_kept is not None:
            continue
        scores = channel_importance(network, group, importance, measured, seed)
        if scores is None:
            group.reason_kept = f"{importance} does not rank these channels: {unranked(importance)}"
        else:
            importances[group.name] = scores
    sound = keep_sound(network, example, [group for group in groups if group.reason_kept is None])
    blocks = residual_blocks(network, example) if depth else []
    for block in blocks:
        block.reason_kept = _reason_for_block(block.name, covered, head, tapped)
    candidates = [prunable(network, group, importances[group.name]) for group in sound]
    candidates += [block_candidate(block) for block in blocks if block.reason_kept is None]
    return Found(groups, blocks, candidates, importances)


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


def _reason_for_block(path: str, covered: dict[str, str], head: str | None, tapped: Collection[str]) -> str | None:
    inside = [name for name in covered if name == path or name.startswith(f"{path}.")]
    if inside:
        return f"protected by {covered[inside[0]]!r}"
    if head is not None and head.startswith(f"{path}."):
        return f"{head} makes the network's outputs"
    looked = next((tap for tap in tapped if tap.startswith(f"{path}.")), None)
    return None if looked is None else f"an objective looks at {looked}"
