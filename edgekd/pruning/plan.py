"""What pruning is asked for and what it decided, as values that can be written to disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..bench import Interval

__all__ = ["BlockPlan", "GroupPlan", "Importance", "LatencyPlan", "LatencyTarget", "Measure", "PruningPlan", "Target"]
__all__ += ["home_of"]

Importance = Literal[
    "magnitude", "magnitude-l1", "lamp", "bn-scale", "fpgm", "taylor", "hessian", "activation", "random"
]
Measure = Literal["macs", "parameters", "size", "latency"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatencyTarget(_Record):
    """How fast the network is to be on a device: so many times faster than it is, or a median in milliseconds."""

    profile: str | None = Field(None, description="a profile by name or file; default: the recipe's first")
    speedup: float | None = Field(None, description="median latency before / after, above 1")
    p50_ms: float | None = Field(None, description="median latency of one call, in ms")
    precision: Literal["fp32", "int8"] = Field(
        "fp32", description="int8: the shape is chosen for the int8 file that a later stage makes; both are int8 then"
    )

    @field_validator("speedup")
    @classmethod
    def _faster(cls, value: float | None) -> float | None:
        if value is not None and not 1 < value < float("inf"):
            raise ValueError("must be above 1")
        return value

    @field_validator("p50_ms")
    @classmethod
    def _positive(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < float("inf"):
            raise ValueError("must be above 0")
        return value

    @model_validator(mode="after")
    def _one(self) -> LatencyTarget:
        if (self.speedup is None) == (self.p50_ms is None):
            raise ValueError("give exactly one of speedup and p50_ms")
        return self


class Target(_Record):
    """How much of the network is to remain, or how fast it is to be. Shares are in (0, 1); exactly one is given."""

    macs: float | None = Field(None, description="share of the multiply-accumulates that remains, in (0, 1)")
    parameters: float | None = Field(None, description="share of the parameters that remains, in (0, 1)")
    size: float | None = Field(None, description="share of the stored bytes that remains, in (0, 1)")
    latency: LatencyTarget | None = Field(None, description="measured on a profile: { speedup = 2.0 }")

    @field_validator("macs", "parameters", "size")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        # `got ...` is added where the recipe's problems are shown.
        if value is not None and not 0 < value < 1:
            raise ValueError("must be in (0, 1)")
        return value

    @model_validator(mode="after")
    def _one(self) -> Target:
        if sum(value is not None for value in (self.macs, self.parameters, self.size, self.latency)) != 1:
            raise ValueError("give exactly one of macs, parameters, size and latency")
        return self

    @property
    def measure(self) -> Measure:
        """Which of the four is meant."""
        for name in ("macs", "parameters", "size"):
            if getattr(self, name) is not None:
                return name  # type: ignore[return-value]
        return "latency"

    @property
    def share(self) -> float:
        """The share that is to remain; of a latency target it is known only once the network has been measured."""
        share = next((value for value in (self.macs, self.parameters, self.size) if value is not None), None)
        assert share is not None
        return share


def home_of(layers: Sequence[str], removed: Sequence[str]) -> str | None:
    """The removed block that all these layers lie in, or those blocks, joined by "and"; None where one is elsewhere."""
    homes = [next((block for block in removed if path.startswith(f"{block}.")), None) for path in layers]
    found = [home for home in dict.fromkeys(homes) if home is not None]
    return " and ".join(found) if found and None not in homes else None


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
    saved: float = Field(
        0.0,
        description="predicted: what the network would cost more with this group whole and all else as decided; in ms, "
        "MACs, parameters or bytes, as the target",
    )
    saved_measured: Interval | None = Field(
        None,
        description="the same, measured on the two networks before healing: counted, or in ms, timed side by side for "
        "the 16 groups and blocks that are predicted to save most; null where it was not",
    )
    harm: float | None = Field(
        None,
        description="an estimate of what its removal added to the mean KL divergence of the answers from those of the "
        "whole network, in nats: measured on 128 calibration images at up to 6 numbers of its channels, each with it "
        "alone gone beside what was gone by then, on straight lines between them, summed over the parts of the way; "
        "harms of groups do not add up to that of the plan. Null where none went, or it was not asked for",
    )
    block: str | None = Field(
        None, description='the removed block that it was a part of ("a and b": of both); no channel is left then'
    )
    reason_kept: str | None = Field(None, description="why no channel of it was removed; null where some were")


class BlockPlan(_Record):
    """A residual block that may go as a whole, and what became of it."""

    name: str = Field(description="module path")
    removed: bool
    saved: float = Field(0.0, description="predicted, as a group's")
    saved_measured: Interval | None = Field(None, description="as a group's")
    harm: float | None = Field(
        None, description="as a group's; of one that stayed, what it would have added in the end; null: no candidate"
    )
    reason_kept: str | None = Field(None, description="why it stayed; null where it went")


class LatencyPlan(_Record):
    """A latency target's predicted and measured figures."""

    profile: str
    precision: Literal["fp32", "int8"]
    wanted_speedup: float = Field(description="of a target in ms, the one that leads there")
    predicted_ms_before: float = Field(description="as measured: the table of layers is fitted to it")
    predicted_ms_after: float = Field(description="by the table of layers")
    measured_ms_before: Interval
    measured_ms_after: Interval
    speedup: Interval = Field(description="before / after, paired by round, measured side by side on noise")
    measurements: list[tuple[float, float]] = Field(
        default=[],
        description="predicted and measured speedup of every candidate that was measured, in their order; the "
        "result is the last, and measured twice: the second time counts",
    )
    rounds: int = Field(0, description="of the measurement that counts")
    busy: float | None = Field(None, description="cores that other programs kept busy during it")
    device: str = Field("", description="the processor")
    runtime: str = Field("", description="with its version")
    threads: int = 0


class PruningPlan(_Record):
    """The result of `prune`: JSON-able, written as plan.json."""

    target: Target
    importance: Importance
    strategy: Literal["knapsack", "uniform"] = "knapsack"
    channel_multiple: int
    groups: list[GroupPlan]
    blocks: list[BlockPlan] = Field(default=[], description="whole residual blocks; empty where depth stays as it is")
    harm: float = Field(
        0.0,
        description="measured with all of it gone, before healing: mean KL divergence of the answers on 256 "
        "calibration images, in nats; of several rounds their sum",
    )
    latency: LatencyPlan | None = None
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int = Field(0, description="of all stored tensors")
    bytes_after: int = 0

    @property
    def achieved(self) -> float:
        """The measured share that remains, of what the target names; at most the target."""
        if self.latency is not None:
            return 1 / self.latency.speedup.value
        before, after = {
            "macs": (self.macs_before, self.macs_after),
            "parameters": (self.parameters_before, self.parameters_after),
            "size": (self.bytes_before, self.bytes_after),
        }[self.target.measure]
        return after / before

    def removed(self) -> Sequence[GroupPlan]:
        """The groups that lost channels."""
        return [group for group in self.groups if group.removed]
