"""`results.json`: everything that was measured in one run, as one versioned document that reports and gates read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..artifact import write_atomically
from ..errors import ArtifactError, UsageError

__all__ = [
    "ClassFigures",
    "Estimate",
    "Fitted",
    "Histogram",
    "Interval",
    "Latency",
    "LayerTime",
    "Lineage",
    "ProfileResults",
    "Results",
    "Variant",
]

SCHEMA = 2
REPEAT = "edgekd bench RUN, or python3 run.py --again in a bundle"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Record):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Histogram(_Record):
    """Counts of samples in equal bins from `low` to `high`; what lies beyond is in the last bin."""

    low: float
    high: float
    counts: list[int]


class Latency(_Record):
    """Milliseconds per call of one variant, measured interleaved with the others."""

    p50: Interval
    p90: Interval
    p95: Interval
    p99: Interval | None = Field(None, description="None where there are too few samples to know it")
    mean: float
    spread: float = Field(description="(p75 - p25) / p50")
    samples: int
    round_p50: list[float] = Field(description="the median of each round: what intervals and ratios stand on")
    curve: list[tuple[float, float]] = Field(default=[], description="(percentile, ms), denser towards 100")
    histogram: Histogram | None = None
    batch: int
    threads: int
    warmup_s: float = Field(0.0, description="seconds of calls until consecutive windows agreed")
    steady: bool = Field(True, description="whether they agreed before the warm-up's cap")
    energy_mj: Interval | None = Field(None, description="millijoules per call, where the device counts energy")
    parts: dict[str, Interval] = Field(
        default={},
        description="medians in ms of what a call on a device with memory of its own is made of: compute, transfers; "
        "the call itself is end to end, from the host's memory to the host's memory. Empty: all is compute",
    )


class Fitted(_Record):
    """A roofline over the efficiency of networks that were measured on that device; an interval, not a confidence."""

    ms: float
    low_ms: float
    high_ms: float | None = Field(None, description="None with one network, whose range is not known")
    networks: int = Field(gt=0, description="that were measured there in this precision")

    @property
    def coverage(self) -> float:
        """How often a further network of their kind lies inside: the smallest to the largest of n hold (n-1)/(n+1)."""
        return (self.networks - 1) / (self.networks + 1)


class Estimate(_Record):
    """What a datasheet says of a latency that was not measured. Nothing in it is called as in `Latency`."""

    floor_ms: float = Field(description="no call can be faster: a lower bound of every quantile")
    roofline_ms: float = Field(description="every layer at the peak, or at the memory's full bandwidth")
    bound: Literal["compute", "memory"] = Field(description="where most of the roofline goes")
    batch: int
    precision: str = Field(description="in which most operations are carried out")
    source: str = Field(description="of the datasheet's figures")
    fitted: Fitted | None = Field(None, description="with results from that device")


class LayerTime(_Record):
    """One operator of the optimised graph, as the runtime's own profiler times it."""

    name: str
    op: str
    ms: float
    share: float = Field(description="of all operators' time")


class ClassFigures(_Record):
    """One class on the test set; `precision` is None where the class was never answered, `recall` without images."""

    name: str
    images: int
    recall: float | None
    precision: float | None


class Variant(_Record):
    """One network as its file runs in its runtime."""

    name: str = Field(description="the stage it comes from, or the file's name")
    key: str
    file: str
    precision: str = Field(description="fp32, int8, ...")
    scheme: str | None = Field(None, description="the quantization scheme it was made for; None: float, or not known")
    origin: Literal["measured", "compiled", "estimated"] = "measured"
    metrics: dict[str, float] = Field(default={}, description="the task's metrics on the whole test split; fractions")
    drop: Interval | None = Field(None, description="headline metric lost against the first variant, same images")
    mcnemar: float | None = Field(None, description="p of McNemar's exact test of that loss")
    agreement: float | None = Field(None, description="share of test images with the first variant's answer")
    classes: list[ClassFigures] = []
    confusion: list[list[int]] = Field(default=[], description="[true class][answer], up to 100 classes")
    correct: str | None = Field(None, description="bit per test image, base64: pairs this variant with other runs'")
    latency: Latency | None = None
    estimate: Estimate | None = Field(None, description="in place of a latency, where the device is elsewhere")
    speedup: Interval | None = Field(None, description="the first variant's p50 over this one's, from the same rounds")
    throughput: dict[str, Interval] = Field(default={}, description="batch size -> images per second")
    offline: Interval | None = Field(None, description="images per second over a whole set, copies included")
    size_mb: float = Field(description="of the file, in 10^6 bytes")
    parameters: int | None = None
    macs: int | None = Field(None, description="multiply-accumulates per image")
    peak_memory_mb: float | None = Field(
        None, description="largest resident memory that a process with only it reached"
    )
    load_ms: Interval | None = Field(None, description="to open the file in its runtime, in a process of its own")
    layers: dict[str, int] = Field(default={}, description="matrix layers of the optimised graph: int8 and float")
    layer_times: list[LayerTime] = Field(default=[], description="slowest first")

    @model_validator(mode="after")
    def _latencies_are_measured(self) -> Variant:
        if self.latency is not None and (self.estimate is not None or self.origin != "measured"):
            raise ValueError("a latency is measured: an estimate is no latency, and does not stand beside one")
        return self


class ProfileResults(_Record):
    """All variants of a run on one profile.

    The first is the one that others are compared with, the last this profile's file, which rules judge. Those made for
    the schemes of other profiles stand before the ones of this profile's scheme.
    """

    profile: str
    device: str
    runtime: str
    settings: dict[str, Any] = Field(default={}, description="the whole profile, protocol included")
    rounds: int
    variants: list[Variant]
    warnings: list[str] = Field(default=[], description="what disturbed this measurement, with what mends it")
    elsewhere: str | None = Field(
        None, description="why nothing was timed: this machine is not that device; accuracies are those here"
    )

    def foreign(self, variant: Variant) -> bool:
        """Whether it was made for another scheme than this profile's."""
        return variant.scheme not in (None, self.settings.get("scheme", variant.scheme))


class Lineage(_Record):
    """One artifact of the run, for the report."""

    stage: str
    key: str
    parents: dict[str, str] = {}
    config: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    history: list[dict[str, Any]] = Field(default=[], description="one record per epoch of the stage's training")


class Results(_Record):
    """A run's measurements."""

    schema_version: int = SCHEMA
    name: str
    command: str = Field(description="what reproduces it")
    seed: int | None = None
    headline: str = Field(description="the task's headline metric")
    direction: Literal["max", "min"] = "max"
    test_images: int
    data: str = Field("", description="fingerprint of the data: only the same test images can be paired")
    classes: list[str]
    profiles: list[ProfileResults]
    lineage: list[Lineage] = []
    environment: dict[str, Any]

    def write(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises UsageError (no such file) or ArtifactError (damaged, or another schema)."""
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"no results at {path}", hint="measure first: edgekd bench RUN") from error
        except ValueError as error:
            raise ArtifactError(f"not JSON: {error}", where=str(path), hint=f"measure again: {REPEAT}") from error
        version = table.get("schema_version") if isinstance(table, dict) else None
        if version != SCHEMA:
            raise ArtifactError(
                f"results schema {version}, expected {SCHEMA}", where=str(path), hint=f"measure again: {REPEAT}"
            )
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise ArtifactError(f"damaged: {error.errors()[0]['loc']}", where=str(path)) from error
