"""A runner's results.json as edgekd's `Results`, so that reports, comparisons and gates take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ..bench import (
    Latency,
    ProfileResults,
    Results,
    Variant,
    class_figures,
    confusion_matrix,
    disturbances,
    mcnemar,
    not_here,
    packed,
    paired_drop,
    speedup,
    unsteadiness,
)
from ..bench.stats import summarize
from ..errors import ArtifactError, UsageError
from ..profile import Profile
from ..runtimes import RuntimeStatus
from .trusted import of_bundle, out_of_range

__all__ = ["is_runners", "read_results"]

#: As the runner writes them.
KIND, FORMAT = "edgekd bundle results", 1
#: A larger matrix of confusions would be most of the document.
MAX_CONFUSION_CLASSES = 100
AGAIN = "run the bundle again: python3 run.py --again"


def is_runners(path: Path) -> bool:
    """Whether a JSON file is a runner's; other files, damaged ones too, are not."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("kind") == KIND)
    except (OSError, ValueError, AttributeError):
        return False


def read_results(path: Path, name: str | None = None, *, bundle: Path | None = None) -> Results:
    """The measurements of a bundle on its device. `name` is the results' own; default: the bundle's.

    bundle: the bundle's directory here; what results say of profile, networks and labels must be what it says.

    A network that did not run, or whose outputs were wrong, has no figures, and a warning. Where the machine is not
    the profile's device, or the runtime not the profile's, nothing counts as timed. Raises UsageError (no such file)
    or ArtifactError (damaged, another format, of something else, or with values that cannot be).
    """
    table = _read(path)
    try:
        why = (of_bundle(table, bundle) if bundle is not None else None) or out_of_range(table)
        if why is not None:
            raise ArtifactError(why, where=str(path), hint=AGAIN)
        return _results(table, name)
    except ValidationError as error:
        raise ArtifactError(f"damaged: {error.errors()[0]['loc']}", where=str(path), hint=AGAIN) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"damaged: {type(error).__name__} {error}".rstrip()
        raise ArtifactError(what, where=str(path), hint=AGAIN) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"no results at {path}", hint="python3 run.py on the device writes them") from error
    except ValueError as error:
        raise ArtifactError(f"not JSON: {error}", where=str(path), hint=AGAIN) from error
    if not isinstance(table, dict) or table.get("kind") != KIND:
        raise ArtifactError("not a bundle's results", where=str(path), hint="expected what a bundle's run.py wrote")
    if table.get("format") != FORMAT:
        what = f"bundle results format {table.get('format')}, expected {FORMAT}"
        raise ArtifactError(what, where=str(path), hint="make the bundle again with this edgekd")
    return table


def _results(table: dict[str, Any], name: str | None) -> Results:
    manifest, device, rounds = table["manifest"], table["device"], table["rounds"]
    profile = Profile.model_validate(manifest["profile"])
    elsewhere = _elsewhere(profile, table)
    latencies = _latencies(table, profile) if elsewhere is None else {}
    labels = np.asarray(table["labels"], np.int64) if table.get("labels") else None
    networks = manifest["networks"]
    variants = [_variant(n, networks[0], table, labels, latencies) for n in networks]
    problems = [f"{n}: {told['problem']}" for n, told in table["networks"].items() if told["problem"]]
    warnings = [*problems, *table["warnings"], *_differs(profile, table)]
    warnings += [*disturbances(device), *unsteadiness(latencies, profile.protocol)]
    if not table["complete"]:
        warnings.append(f"the run on the device is not complete: {len(rounds)} rounds; start it again to go on")
    runtime = table["runtime"]
    return Results(
        name=name or manifest["name"],
        command="python3 run.py",
        headline="accuracy",
        test_images=len(labels) if labels is not None else 0,
        data=manifest["data"],
        classes=manifest["classes"],
        profiles=[
            ProfileResults(
                profile=profile.name,
                device=profile.description if elsewhere else device.get("board") or device["cpu"],
                runtime=f"{runtime['name']} {runtime['version']}",
                settings=profile.model_dump(mode="json"),
                rounds=min((len(found.round_p50) for found in latencies.values()), default=0),
                variants=variants,
                warnings=warnings,
                elsewhere=elsewhere,
            )
        ],
        environment={**device, "timed": runtime["timed"], "bundle": table["bundle"], "sensors": _sensors(rounds)},
    )


def _sensors(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the rounds: the highest temperatures, and means of power and of the GPU's clock."""
    seen = [r["sensors"] for r in rounds if r.get("sensors")]
    found: dict[str, Any] = {}
    for key, merge in (("temperatures", max), ("power_mw", _mean)):
        names = sorted({name for one in seen for name in one.get(key, {})})
        found[key] = {name: merge([one[key][name] for one in seen if name in one.get(key, {})]) for name in names}
    clocks = [one["gpu_mhz"] for one in seen if "gpu_mhz" in one]
    return {**{key: value for key, value in found.items() if value}, **({"gpu_mhz": _mean(clocks)} if clocks else {})}


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 1)


def _elsewhere(profile: Profile, table: dict[str, Any]) -> str | None:
    """Why the figures are not those of the profile's device; None where they are."""
    used = {"trtexec": "tensorrt"}.get(table["runtime"]["name"], table["runtime"]["name"])
    if used != profile.runtime:
        return f"{profile.name} runs on {profile.runtime}, the bundle was run in {used}"
    there = [RuntimeStatus(name=profile.runtime, available=True)]
    why = not_here(profile, table["device"], lambda: there)
    found = table["device"].get("compute_capability")
    if why is None and None not in (profile.compute_capability, found) and found != profile.compute_capability:
        why = f"{profile.name} has a GPU of compute capability {profile.compute_capability}, this machine {found}"
    return why and why.replace("this machine", "the machine that ran it")


def _differs(profile: Profile, table: dict[str, Any]) -> list[str]:
    """What of the device is other than the profile says, and changes the figures."""
    found = []
    mode = table["device"].get("power_mode")
    if profile.power_mode is not None and mode is not None and mode != profile.power_mode:
        found.append(f"power mode {mode}, the profile is about {profile.power_mode}: figures hold in that mode only")
    version = table["runtime"]["version"]
    if profile.tensorrt is not None and table["runtime"]["name"] != "onnxruntime":
        wanted = profile.tensorrt.version
        if version.split(".")[: len(wanted.split("."))] != wanted.split("."):
            found.append(f"TensorRT {version}, the profile is about {wanted}")
    return found


def _latencies(table: dict[str, Any], profile: Profile) -> dict[str, Latency]:
    """Summaries by network, in the manifest's order; of rounds that have all of them."""
    rounds, batches = table["rounds"], {n["name"]: n["batch"] for n in table["manifest"]["networks"]}
    found = {}
    for name, told in table["networks"].items():
        if told["problem"] is not None or not rounds:
            continue
        warm = [s["warm_up"][name] for s in table["sessions"] if name in s["warm_up"]]
        found[name] = summarize(
            [[ns / 1e6 for ns in r["networks"][name]["ns"]] for r in rounds],
            batch=batches[name],
            threads=profile.threads,
            warmup_s=max((w["seconds"] for w in warm), default=0.0),
            steady=all(w["steady"] for w in warm),
            parts=_parts([r["networks"][name] for r in rounds]),
        )
    return {n["name"]: found[n["name"]] for n in table["manifest"]["networks"] if n["name"] in found}


def _parts(blocks: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """What calls are made of on a GPU, by round: the runner keeps their medians."""
    known = ("compute", "transfers")
    return {name: [[b[f"{name}_p50"]] for b in blocks] for name in known if all(f"{name}_p50" in b for b in blocks)}


def _variant(
    network: dict[str, Any],
    first: dict[str, Any],
    table: dict[str, Any],
    labels: np.ndarray[Any, Any] | None,
    latencies: dict[str, Latency],
) -> Variant:
    name, reference = network["name"], first["name"]
    timed = name in latencies and reference in latencies
    return Variant(
        name=name,
        key=network["key"],
        file=network["file"],
        precision=_precision(network),
        scheme=network["scheme"],
        latency=latencies.get(name),
        speedup=speedup(latencies[reference], latencies[name]) if timed else None,
        size_mb=table["manifest"]["files"][network["file"]][1] / 1e6,
        parameters=network["parameters"],
        macs=network["macs"],
        **_judged(name, reference, table, labels),
    )


def _precision(network: dict[str, Any]) -> str:
    """As variants have it."""
    stored = str(network["precision"])
    return f"{stored}+fp16" if stored == "int8" and network["typed_half"] else stored


def _judged(name: str, first: str, table: dict[str, Any], labels: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    judged = table["networks"].get(name, {}).get("judged")
    if judged is None or labels is None:
        return {}
    classes = table["manifest"]["classes"]
    answers = np.asarray(judged["answers"], np.int64)
    right = answers == labels
    confusion = confusion_matrix(answers, labels, len(classes))
    found: dict[str, Any] = {
        "metrics": {key: judged[key] for key in ("accuracy", "loss", "ece")},
        "classes": class_figures(confusion, classes),
        "confusion": confusion.tolist() if len(classes) <= MAX_CONFUSION_CLASSES else [],
        "correct": packed(right),
    }
    reference = table["networks"].get(first, {}).get("judged")
    if name != first and reference is not None:
        other = np.asarray(reference["answers"], np.int64)
        found["drop"], found["mcnemar"] = paired_drop(other == labels, right), mcnemar(other == labels, right)
        found["agreement"] = float((answers == other).mean())
    return found
