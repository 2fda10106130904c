"""What pruning is asked for and what it decided, as values that can be written to disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["GroupPlan", "Importance", "PruningPlan", "Target"]

Importance = Literal["magnitude", "bn-scale", "taylor"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Record):
    """How much of the network is to remain: a share of its MACs or of its parameters, in (0, 1)."""

    macs: float | None = Field(None, description="share of the multiply-accumulates that remains, in (0, 1)")
    parameters: float | None = Field(None, description="share of the parameters that remains, in (0, 1)")

    @field_validator("macs", "parameters")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        # `got ...` is added where the recipe's problems are shown.
        if value is not None and not 0 < value < 1:
            raise ValueError("must be in (0, 1)")
        return value

    @model_validator(mode="after")
    def _one(self) -> Target:
        if (self.macs is None) == (self.parameters is None):
            raise ValueError("give exactly one of macs and parameters")
        return self

    @property
    def measure(self) -> Literal["macs", "parameters"]:
        """Which of the two is meant."""
        return "parameters" if self.macs is None else "macs"

    @property
    def share(self) -> float:
        """The share that is to remain."""
        share = self.parameters if self.macs is None else self.macs
        assert share is not None
        return share


class GroupPlan(_Record):
    """Channels that can only be removed together, and what became of them."""

    name: str = Field(description="module path of the first layer that produces these channels")
    layers: list[str] = Field(description="paths of every module and parameter whose shape follows")
    channels_before: int
    channels_after: int
    removed: list[int] = Field(default=[], description="indices of the removed output channels of `name`, ascending")
    importance_removed_share: float = Field(0.0, description="importance of the removed channels / of all of the group")
    attributes: dict[str, dict[str, Any]] = Field(
        default={}, description="module path -> attributes that were set beside the shapes (numbers of heads)"
    )
    reason_kept: str | None = Field(None, description="why no channel of it was removed; null where some were")


class PruningPlan(_Record):
    """The result of `prune`: JSON-able, written as plan.json."""

    target: Target
    importance: Importance
    channel_multiple: int
    groups: list[GroupPlan]
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int

    @property
    def achieved(self) -> float:
        """The measured share that remains, of what the target names; at most the target."""
        if self.target.measure == "macs":
            return self.macs_after / self.macs_before
        return self.parameters_after / self.parameters_before

    def removed(self) -> Sequence[GroupPlan]:
        """The groups that lost channels."""
        return [group for group in self.groups if group.removed]
