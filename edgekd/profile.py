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

__all__ = ["Profile", "Protocol", "load_profile", "lowest_opset", "profile_names"]


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
    opset: int = Field(18, ge=18, description="the highest ONNX opset the runtime takes; edgekd writes 18 and later")
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
