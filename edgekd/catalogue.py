"""What profiles there are, which of them this machine is, and what is wrong with a file of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from .bench import INSTRUCTION_SETS, environment, kernels_differ, not_here
from .errors import Problem, UsageError, nearest
from .gate import OWN_METRICS, parse_rules
from .jetpack import JETPACKS, closest, highest_opset
from .profile import Profile, examined, load_profile, profile_names
from .quant import SCHEMES, scheme_named
from .registry import resolve
from .report.columns import aligned

__all__ = ["Vetted", "catalogue", "catalogue_text", "vetted"]


class Vetted(NamedTuple):
    """A profile's file: what does not load or cannot run, and what is likely not meant."""

    file: str
    problems: list[Problem]
    warnings: list[Problem]


def catalogue(machine: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every shipped profile with what a choice hangs on; `here`: whether this machine is its device, or `why` not.

    `machine` describes another one (`edgekd.bench.environment`).
    """
    machine = environment() if machine is None else machine
    rows = []
    for name in profile_names():
        profile = load_profile(name)
        # Whether the runtime is installed takes seconds to find out, and does not make this another device.
        why = not_here(profile, machine, list) or kernels_differ(profile, machine)
        version = f" {profile.tensorrt.version}" if profile.tensorrt is not None else ""
        rows.append(
            {
                "name": name,
                "description": profile.description,
                "device": profile.device,
                "runtime": f"{profile.runtime}{version}",
                "precisions": profile.precisions,
                "scheme": profile.scheme,
                "here": why is None,
                "why": why,
            }
        )
    return rows


def catalogue_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    cells = [("profile", "device", "runtime", "precisions", "here?", "what it is")]
    cells += [
        (r["name"], r["device"], r["runtime"], ",".join(r["precisions"]), "yes" if r["here"] else "-", r["description"])
        for r in rows
    ]
    return "\n".join(aligned(cells))


def vetted(name: str) -> Vetted:
    """Everything that is wrong with a profile, given by file or shipped name, and everything that is odd."""
    try:
        profile, found = examined(name, "profiles check")
    except UsageError as error:
        return Vetted(name, list(error.problems), [])
    if profile is None:
        return Vetted(name, found, [])
    place = partial(_placed, name)
    return Vetted(name, [*found, *map(place, _problems(profile))], [*map(place, _warnings(profile))])


def _placed(file: str, problem: Problem) -> Problem:
    return Problem(f"profile {file}: {problem.where}", problem.what, problem.hint)


def _problems(profile: Profile) -> Iterator[Problem]:
    """What a run with it would refuse."""
    for key, check in (
        ("runtime", partial(resolve, "runtimes", profile.runtime)),
        ("scheme", partial(scheme_named, profile.scheme)),
    ):
        try:
            check("")
        except UsageError as error:
            yield Problem(key, error.problem.what, error.problem.hint)
    yield from parse_rules(profile.budgets, [profile.name], "budgets")[1]
    if profile.tensorrt is not None and profile.tensorrt.dla is not None and profile.tensorrt.dla_cores:
        from .trt import dla_problems  # here: with it come readers of ONNX files

        for found in dla_problems(profile, precision="fp16", dynamic_batch=False):
            yield Problem(found.where.rpartition(": ")[2], found.what, found.hint)


def _warnings(profile: Profile) -> Iterator[Problem]:
    for rule in parse_rules(profile.budgets, [profile.name])[0]:
        if rule.metric not in OWN_METRICS and not rule.metric.startswith(("latency.", "accuracy")):
            what = "no metric that edgekd itself measures: the task of the recipe must have it"
            yield Problem(f"budgets.{rule.metric}", what, nearest(rule.metric, ["latency", "accuracy", *OWN_METRICS]))
    for key in ("requires", "lacks"):
        for instructions in getattr(profile, key):
            if instructions not in INSTRUCTION_SETS:
                what = f"no instruction set that edgekd looks for, got {instructions!r}"
                yield Problem(key, what, nearest(instructions, INSTRUCTION_SETS))
    yield from _scheme_warnings(profile)
    yield from _tensorrt_warnings(profile)
    if profile.device == "jetson" and profile.power_mode is None:
        yield Problem("power_mode", "a Jetson's figures hold in one power mode", "see `nvpmodel -q` on the board")


def _scheme_warnings(profile: Profile) -> Iterator[Problem]:
    """Integers that the runtime runs as floats between conversions, or by slow kernels."""
    scheme = SCHEMES.get(profile.scheme)
    wanted = next((w for w in ("tensorrt", "onnxruntime") if w in profile.runtime), None)
    if scheme is None or wanted is None:  # a runtime that runs no integers, or somebody else's
        return
    foreign = {"x86-64": "arm-", "aarch64": "x86-"}.get(profile.architecture or "", "none")
    if scheme.placement != wanted or (wanted == "onnxruntime" and scheme.name.startswith(foreign)):
        own = [s.name for s in SCHEMES.values() if s.placement == wanted and not s.name.startswith(foreign)]
        on = f" on {profile.architecture}" if wanted == "onnxruntime" and profile.architecture else ""
        what = f"{profile.runtime}{on} does not fuse {scheme.name}: its int8 layers would run as floats, or slowly"
        yield Problem("scheme", what, f"{' or '.join(own)}")


def _tensorrt_warnings(profile: Profile) -> Iterator[Problem]:
    tensorrt = profile.tensorrt
    if tensorrt is None:
        if "tensorrt" in profile.runtime:
            yield Problem("tensorrt", "not said which: its version decides about opset and builds", "[tensorrt]")
        return
    highest = highest_opset(tensorrt.version)
    if highest is None:
        yield Problem("tensorrt.version", f"older than 8.5 was never looked at, got {tensorrt.version}")
    elif profile.opset > highest:
        what = f"TensorRT {tensorrt.version} takes ONNX up to opset {highest}, got {profile.opset}"
        yield Problem("opset", what, f"opset = {highest} or less")
    if tensorrt.strongly_typed and profile.opset < 19:
        what = f"TensorRT {tensorrt.version} takes types from the file, and fp16 scales are in ONNX from 19 on"
        yield Problem("opset", f"{what}, got {profile.opset}", "opset = 20")
    jetpack = tensorrt.jetpack
    if jetpack is not None and jetpack not in [p.version for p in JETPACKS]:
        what = f"JetPack {jetpack} is not known: whether it has TensorRT {tensorrt.version} was not checked"
        yield Problem("tensorrt.jetpack", what, f"the nearest that is known: {closest(jetpack)}")
