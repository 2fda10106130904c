"""Hardware profiles: data about a device that drives pruning, quantization, export, measurement and the gate."""

from __future__ import annotations

import errno
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import Problem, RecipeError, UsageError, nearest
from .registry import validation_problems
from .shipped import shipped

__all__ = ["Datasheet", "Profile", "Protocol", "TensorRT", "load_profile", "lowest_opset", "profile_names"]


class Protocol(BaseModel):
    """How latency is measured on this device."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch: int = Field(1, gt=0)
    rounds: int = Field(12, ge=3, description="at least; each variant is measured once per round, in random order")
    precision: float = Field(
        0.01, gt=0, description="rounds go on until every median and ratio is known within this share of it"
    )
    block_s: float = Field(0.15, gt=0, description="seconds of consecutive calls per variant and round")
    warmup_s: float = Field(0.3, ge=0, description="at least so many seconds of calls, and then until they are steady")
    cap_s: float = Field(60.0, gt=0, description="no further round is begun after so many seconds")
    scenarios: list[Literal["single-stream", "batch", "offline"]] = Field(
        default=["single-stream", "batch"],
        description="latency of single calls is always measured; throughput per batch size; a whole set at once",
    )
    batches: list[Annotated[int, Field(gt=0)]] = Field(
        default=[1, 8, 32], min_length=1, description="batch sizes of the scenarios batch and offline"
    )


class TensorRT(BaseModel):
    """The TensorRT that a device has, and how engines are built with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str = Field(pattern=r"^\d+\.\d+(\.\d+)*$", description="as on the device: 8.6, 10.3, 11.0")
    jetpack: str | None = Field(None, description="the JetPack that brings it, on a Jetson")
    dla_cores: int = Field(0, ge=0, description="deep learning accelerators beside the GPU")
    optimization_level: int = Field(3, ge=0, le=5, description="how long the builder searches for kernels")
    workspace_mb: int | None = Field(None, gt=0, description="memory the builder may use; none: as much as there is")

    @property
    def strongly_typed(self) -> bool:
        """Whether it takes types from the file only: version 11 has no other builds."""
        return int(self.version.partition(".")[0]) >= 11


class Datasheet(BaseModel):
    """A device's peak figures, dense (no structured sparsity), as its maker gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    int8_tops: float | None = Field(None, gt=0)
    fp16_tflops: float | None = Field(None, gt=0)
    bf16_tflops: float | None = Field(None, gt=0)
    fp32_tflops: float | None = Field(None, gt=0)
    bandwidth_gb_s: float = Field(gt=0, description="of the memory, in 10^9 bytes a second")
    source: str = Field(description="where the figures stand")


class Profile(BaseModel):
    """A device, its runtime, and what that runtime rewards."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str
    device: Literal["cpu", "gpu", "jetson"] = "cpu"
    architecture: Literal["x86-64", "aarch64"] | None = Field(
        None, description="of the device's processor: a machine with another one does not measure for it; None: any"
    )
    requires: list[str] = Field(
        default=[],
        description="instruction sets without which a machine is not the device, as `edgekd doctor` has them",
    )
    lacks: list[str] = Field(
        default=[], description="instruction sets that the device does not have: a machine that has them warns"
    )
    runtime: str = "onnxruntime"
    precisions: list[Literal["fp32", "fp16", "bf16", "int8"]] = ["fp32", "int8"]
    scheme: str = Field("x86-u8s8", description="the quantization scheme that this runtime fuses")
    channel_multiple: int = Field(1, gt=0, description="channel counts that the kernels like are multiples of this")
    opset: int = Field(18, ge=17, description="the highest ONNX opset the runtime takes")
    compute_capability: str | None = Field(None, pattern=r"^\d+\.\d$", description="of the GPU")
    tensorrt: TensorRT | None = Field(None, description="where the runtime is TensorRT")
    memory_mb: int | None = Field(None, gt=0, description="that a network may use, in 10^6 bytes")
    power_mode: str | None = Field(None, description="as `nvpmodel -q` names it; figures hold in this mode only")
    datasheet: Datasheet | None = Field(None, description="peak figures that estimates stand on")
    threads: int = Field(1, gt=0)
    affinity: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="CPU cores that measuring is pinned to; empty: where the system puts it"
    )
    protocol: Protocol = Protocol()
    budgets: dict[str, Any] = Field(default_factory=dict, description="gate rules that hold for this device")


def lowest_opset(profiles: Iterable[Profile]) -> int:
    """The opset that all of these take; without any, the lowest that edgekd writes."""
    return min((p.opset for p in profiles), default=18)


def profile_names() -> list[str]:
    """The shipped profiles."""
    return sorted(p.stem for p in shipped("profiles").glob("*.toml"))


def load_profile(name: str, where: str = "profiles") -> Profile:
    """A profile by shipped name or path; `extends = "other"` starts from another one. Raises UsageError."""
    table = _table(name, where, ())
    try:
        return Profile.model_validate(table)
    except ValidationError as error:
        found = validation_problems(error, "", Profile)
        raise RecipeError([Problem(f"profile {name}: {p.where}", p.what, p.hint) for p in found]) from error


def _table(name: str, where: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        circle = " -> ".join((*seen, name))
        hint = "one of them must extend a profile that edgekd ships, or nothing"
        raise UsageError(f"profiles extend each other in a circle: {circle}", where=where, hint=hint)
    file = Path(name) if name.endswith(".toml") else shipped("profiles") / f"{name}.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        why = nearest(name, profile_names()) if error.errno == errno.ENOENT else f"{file}: {error.strerror}"
        raise UsageError(f"no profile {name!r}", where=where, hint=why) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "texts need quotes, tables need { } and lists need [ ]"
        raise UsageError(f"not valid TOML: {error}", where=str(file), hint=hint) from error
    base = table.pop("extends", None)
    if base is None:
        return {"name": file.stem, **table}
    if not isinstance(base, str):
        raise UsageError(f"extends must name a profile, got {base!r}", where=str(file), hint='extends = "cpu-x86"')
    parent = _table(base, str(file), (*seen, name))
    merged = {**parent, "name": file.stem, **table}
    if isinstance(parent.get("protocol"), dict) and isinstance(table.get("protocol"), dict):
        merged["protocol"] = {**parent["protocol"], **table["protocol"]}
    return merged
