"""Hardware profiles: data about a device that drives pruning, quantization, export, measurement and the gate."""

from __future__ import annotations

import contextlib
import errno
import tomllib
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import Problem, RecipeError, UsageError, nearest
from .jetpack import JETPACKS, of_tensorrt, same_line
from .profile_parts import Datasheet, Protocol, TensorRT
from .registry import validation_problems
from .shipped import shipped
from .toml_text import pairs

__all__ = [
    "Datasheet",
    "Profile",
    "Protocol",
    "TensorRT",
    "examined",
    "load_profile",
    "lowest_opset",
    "profile_names",
    "profile_toml",
]


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
    product: str | None = Field(
        None, description="words in the name that the GPU or board gives itself: others are not the device; None: any"
    )
    tensorrt: TensorRT | None = Field(None, description="where the runtime is TensorRT")
    memory_mb: int | None = Field(None, gt=0, description="that a network may use, in 10^6 bytes")
    power_mode: str | None = Field(None, description="as `nvpmodel -q` names it; figures hold in this mode only")
    datasheet: Datasheet | None = Field(None, description="peak figures that estimates stand on")
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="what the runtime torch computes in; other runtimes do as the file says"
    )
    cuda_graphs: bool = Field(True, description="on an NVIDIA GPU, whether the network is launched as one graph")
    threads: int = Field(1, gt=0)
    affinity: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="CPU cores that measuring is pinned to; empty: where the system puts it"
    )
    protocol: Protocol = Protocol()
    budgets: dict[str, Any] = Field(default_factory=dict, description="gate rules that hold for this device")

    @property
    def runtime_options(self) -> dict[str, Any]:
        """What a session is opened with beside its file and threads, as far as its runtime takes it."""
        device = "cpu" if self.device == "cpu" else "cuda"
        return {
            "device": device,
            "precision": self.precision,
            "cuda_graphs": self.cuda_graphs,
            "engines": f"engines-{self.name}",
        }


def lowest_opset(profiles: Iterable[Profile]) -> int:
    """The opset that all of these take; without any, the lowest that edgekd writes."""
    return min((p.opset for p in profiles), default=18)


def profile_names() -> list[str]:
    """The shipped profiles."""
    return sorted(p.stem for p in shipped("profiles").glob("*.toml"))


def load_profile(name: str, where: str = "profiles") -> Profile:
    """A profile by shipped name or path; `extends = "other"` starts from another one. Raises UsageError."""
    profile, problems = examined(name, where)
    if problems or profile is None:
        raise RecipeError(problems)
    return profile


def examined(name: str, where: str = "profiles") -> tuple[Profile | None, list[Problem]]:
    """A profile, and everything that is wrong with it; where keys are, it is the profile without them, or None.

    Raises UsageError where there is no file, or no TOML in it.
    """
    table = _table(name, where, ())
    profile, found = None, []
    try:
        profile = Profile.model_validate(table)
    except ValidationError as error:
        found = validation_problems(error, "", Profile)
        with contextlib.suppress(ValidationError):
            profile = Profile.model_validate(_without(table, error))
    found += _contradictions(profile) if profile is not None else []
    return profile, [Problem(f"profile {name}: {p.where}", p.what, p.hint) for p in found]


def profile_toml(profile: Profile) -> str:
    """A profile as TOML, without what it leaves open: what `load_profile` reads back to an equal profile."""
    table = profile.model_dump(mode="json", exclude_none=True)
    tables = {key: table.pop(key) for key in ("tensorrt", "datasheet", "protocol", "budgets") if key in table}
    blocks = [pairs(table), *(f"[{key}]\n{pairs(value)}" for key, value in tables.items() if value)]
    return "\n\n".join(blocks) + "\n"


def _without(table: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """A copy without the keys that are wrong, so that the others can be looked at together."""
    rest = deepcopy(table)
    for e in error.errors():
        current, path = rest, list[Any](e["loc"])
        while len(path) > 1 and isinstance(current.get(path[0]), dict):
            current = current[path.pop(0)]
        current.pop(path[0], None)
    return rest


def _contradictions(profile: Profile) -> Iterator[Problem]:
    """What is right by itself, and cannot be together."""
    tensorrt = profile.tensorrt
    if tensorrt is None:
        return
    jetpack = next((p for p in JETPACKS if p.version == tensorrt.jetpack), None)
    if jetpack is not None:
        board = profile.compute_capability
        if not same_line(tensorrt.version, (jetpack.tensorrt, *jetpack.also)):
            beside = f" ({' or '.join(jetpack.also)} may be installed on it)" if jetpack.also else ""
            what = f"JetPack {jetpack.version} has TensorRT {jetpack.tensorrt}{beside}, got {tensorrt.version}"
            other = of_tensorrt(tensorrt.version, board)
            hint = f"TensorRT {tensorrt.version} goes with JetPack {other.version}" if other is not None else None
            yield Problem("tensorrt.version", what, hint)
        if board is not None and board not in jetpack.boards:
            known = " and ".join(jetpack.boards)
            what = f"JetPack {jetpack.version} is for boards of compute capability {known}, got {board}"
            fitting = [p.version for p in JETPACKS if board in p.boards]
            yield Problem("tensorrt.jetpack", what, f"for {board}: {', '.join(fitting)}" if fitting else None)
    if tensorrt.dla is not None and tensorrt.dla >= tensorrt.dla_cores:
        what = f"no such accelerator: the device has {tensorrt.dla_cores}, counted from 0, got {tensorrt.dla}"
        yield Problem("tensorrt.dla", what, "leave it out to build for the GPU")


def _unknown(name: str, where: str) -> UsageError:
    """What is said of a name that nothing is found by: it may have been meant as a file's, or as a shipped one."""
    if Path(name).is_file():
        hint = "edgekd profiles detect -o mine.toml writes one"
        return UsageError(f"{name!r} is no profile: its file ends in .toml", where=where, hint=hint)
    if "/" in name or Path(name).suffix[1:].isalpha():
        hint = "shipped profiles are named without an ending: edgekd profiles list"
        return UsageError(f"no such file: {name!r}", where=where, hint=hint)
    return UsageError(f"no profile {name!r}", where=where, hint=nearest(name, profile_names()))


def _table(name: str, where: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        circle = " -> ".join((*seen, name))
        hint = "one of them must extend a profile that edgekd ships, or nothing"
        raise UsageError(f"profiles extend each other in a circle: {circle}", where=where, hint=hint)
    file = Path(name) if name.endswith(".toml") else shipped("profiles") / f"{name}.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise UsageError(f"no profile {name!r}", where=where, hint=f"{file}: {error.strerror}") from error
        raise _unknown(name, where) from error
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
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(parent.get(key), dict):
            merged[key] = {**parent[key], **value}
    return merged
