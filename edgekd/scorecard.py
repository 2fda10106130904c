"""Every variant of a run measured in one session, as one `Results` document."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import Artifact, write_atomically
from .bench import (
    Latency,
    Lineage,
    ProfileResults,
    Results,
    Samples,
    Variant,
    class_figures,
    confusion_matrix,
    disturbances,
    energy_counter,
    environment,
    evaluate,
    footprint_of,
    kernels_differ,
    layer_times,
    mcnemar,
    measure_latency,
    noise,
    not_here,
    offline,
    others_busy,
    packed,
    paired_drop,
    pinned,
    speedup,
    throughput,
    unsteadiness,
)
from .candidates import Candidate, arranged
from .data import Dataset
from .errors import StageError, UsageError
from .estimate import estimates_of
from .onnx_file import optimised_layers, stored_bytes, stored_precision
from .profile import Profile
from .runtimes import Feed, Session, open_for, open_session
from .stages.network import open_network
from .tasks import Task

__all__ = ["answers", "lineage_of", "measure"]

Array = np.ndarray[Any, Any]
#: How many the scenario `offline` has at once.
SET_IMAGES = 1024
#: A larger matrix of confusions would be most of results.json.
MAX_CONFUSION_CLASSES = 100


def lineage_of(artifact: Artifact, name: str) -> Lineage:
    """What the report says about where an artifact came from."""
    manifest = artifact.manifest
    history = []
    if "metrics.jsonl" in manifest.files:
        history = [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]
    return Lineage(
        stage=name,
        key=manifest.key,
        parents=manifest.parents,
        config=manifest.config,
        metrics=manifest.metrics,
        history=history,
    )


def measure(
    candidates: Sequence[Candidate],
    profiles: Sequence[Profile],
    *,
    data: Dataset | None,
    task: Task,
    name: str,
    command: str,
    seed: int | None = None,
    lineage: Sequence[Lineage] = (),
    emit: Callable[[dict[str, Any]], None] = lambda event: None,
    samples: Path | None = None,
    settled: Callable[[str, Samples], bool] | None = None,
    brief: bool = False,
) -> Results:
    """Accuracy on the whole test split, latency interleaved, throughput, memory and size of every candidate.

    The first candidate is the one that others are compared with. A profile whose device is not this machine gets what
    does not depend on it, and no time. Without `data` there is no accuracy, and inputs are
    random. `settled(profile, samples)` ends the rounds of a profile early (default: its protocol's precision); `brief`
    leaves out throughput and time per layer. Raises UsageError or StageError (a file that does not load, a runtime
    that fails).
    """
    surroundings = environment()
    orders = [arranged(candidates, profile) for profile in profiles]
    judged: dict[Path, Array] = {}
    for candidate in (c for ordered in orders for c in ordered):
        if data is not None and candidate.file not in judged:
            emit({"event": "accuracy", "variant": candidate.name, "images": len(data.test)})
            judged[candidate.file] = answers(candidate.file, data)
    rows, raw = [], {}
    for profile, ordered in zip(profiles, orders, strict=True):
        timed, elsewhere = _Timed(), not_here(profile, surroundings)
        if elsewhere is None:
            enough = partial(settled, profile.name) if settled is not None else None
            ordered, timed = _timed(ordered, profile, data, emit, enough, brief)
            raw[profile.name] = timed.samples
        else:
            emit({"event": "elsewhere", "profile": profile.name, "why": elsewhere})
        rows.append(_results(ordered, profile, timed, elsewhere, data, task, judged, surroundings))
    if samples is not None:
        write_atomically(samples, json.dumps({"unit": "ms", "profiles": _rounded(raw)}) + "\n")
    return Results(
        name=name,
        command=command,
        seed=seed,
        headline=task.headline,
        direction=task.direction,
        test_images=len(data.test) if data is not None else 0,
        data=data.fingerprint if data is not None else "",
        classes=data.classes if data is not None else [],
        profiles=rows,
        lineage=list(lineage),
        environment=surroundings,
    )


def answers(file: Path, data: Dataset) -> Array:
    """Logits float [N, K] of a model file on the N test images, in ONNX Runtime on all cores.

    Raises UsageError where K is not the number of classes, or as `evaluate` does; StageError as that does.
    """
    session = open_session(file, threads=os.cpu_count() or 1)
    try:
        logits = evaluate(session, data.test.images.numpy(), _normaliser(data))
    finally:
        session.close()
    if logits.shape[1] != len(data.classes):
        raise UsageError(
            f"gives {logits.shape[1]} logits and the data have {len(data.classes)} classes", where=str(file)
        )
    return logits


def _normaliser(data: Dataset) -> Callable[[Array], Array]:
    mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (data.mean, data.std))

    def apply(images: Array) -> Array:
        scaled = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
        return (scaled - mean) / std

    return apply


@dataclass(frozen=True)
class _Timed:
    """What a profile's session found, by the candidates' names; empty where there was none."""

    latencies: dict[str, Latency] = field(default_factory=dict)
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def _timed(
    candidates: Sequence[Candidate],
    profile: Profile,
    data: Dataset | None,
    emit: Callable[[dict[str, Any]], None],
    settled: Callable[[Samples], bool] | None,
    brief: bool,
) -> tuple[list[Candidate], _Timed]:
    """The candidates that this runtime runs, and their figures; only other profiles' files may be left out."""
    protocol, threads = profile.protocol, profile.threads
    surroundings = environment()

    def progress(done: int, total: int) -> None:
        emit({"event": "bench", "profile": profile.name, "done": done, "total": total})

    progress(0, protocol.rounds)
    with pinned(profile.affinity, f"profile {profile.name}: affinity"):
        sessions: dict[str, Session] = {}
        refused = []
        for candidate in candidates:
            try:
                sessions[candidate.name] = _opened(candidate, profile)
            except (UsageError, StageError) as error:
                if candidate.branch in ("", profile.scheme):
                    raise
                what = f"{candidate.name}, made for another profile, does not run in {profile.runtime} and is left out"
                refused.append(f"{what}: {error.problem.what}")
        candidates = [c for c in candidates if c.name in sessions]
        named = {c.name: c for c in candidates}
        feeds = {name: _feed(session, data, protocol.batch) for name, session in sessions.items()}
        others = others_busy()
        measured = measure_latency(
            sessions,
            feeds,
            protocol,
            threads,
            reopen=lambda name: _opened(named[name], profile),
            settled=settled,
            energy=energy_counter(),
            progress=progress,
        )
        busy = others()
        extras = {} if brief else _extras(sessions, profile, data)
        for session in sessions.values():
            session.close()
        for candidate in candidates if profile.runtime == "onnxruntime" else ():
            found = footprint_of(candidate.file, feeds[candidate.name], threads)
            extras.setdefault(candidate.name, {}).update(found._asdict())
            if not brief:
                extras[candidate.name]["layer_times"] = layer_times(candidate.file, feeds[candidate.name], threads)
    warnings = [*refused, *filter(None, [kernels_differ(profile, surroundings)])]
    warnings += [*disturbances(surroundings, busy or 0.0), *unsteadiness(measured.latencies, protocol)]
    return candidates, _Timed(measured.latencies, extras, measured.samples, warnings)


def _opened(candidate: Candidate, profile: Profile) -> Session:
    """PyTorch runs the network of an artifact; other runtimes run its file."""
    if profile.runtime == "torch" and candidate.artifact is not None:
        return open_network(candidate.artifact, profile)
    return open_for(candidate.file, profile)


def _results(
    candidates: Sequence[Candidate],
    profile: Profile,
    timed: _Timed,
    elsewhere: str | None,
    data: Dataset | None,
    task: Task,
    judged: dict[Path, Array],
    surroundings: dict[str, Any],
) -> ProfileResults:
    first, latencies = candidates[0], timed.latencies
    own = {c.name: c.file for c in candidates if elsewhere is not None and c.branch in ("", profile.scheme)}
    estimates, unknown = estimates_of(own, profile)
    variants = [
        Variant(
            name=candidate.name,
            key=candidate.key,
            file=str(candidate.file),
            scheme=candidate.scheme,
            **_judged(candidate, first, data, task, judged),
            latency=latencies.get(candidate.name),
            estimate=estimates.get(candidate.name),
            speedup=speedup(latencies[first.name], latencies[candidate.name]) if latencies else None,
            **_described(candidate, profile, elsewhere is None),
            **timed.extras.get(candidate.name, {}),
        )
        for candidate in candidates
    ]
    return ProfileResults(
        profile=profile.name,
        device=profile.description if elsewhere else _device(profile, surroundings),
        runtime=f"{profile.runtime} {surroundings['versions'].get(profile.runtime, '')}".strip(),
        settings=profile.model_dump(mode="json"),
        rounds=min((len(found.round_p50) for found in latencies.values()), default=0),
        variants=variants,
        warnings=[*timed.warnings, *unknown],
        elsewhere=elsewhere,
    )


def _device(profile: Profile, surroundings: dict[str, Any]) -> str:
    cards = surroundings.get("gpus", []) if profile.device != "cpu" else []
    return str(cards[0]["name"] if cards else surroundings.get("cpu", profile.description))


def _extras(sessions: dict[str, Session], profile: Profile, data: Dataset | None) -> dict[str, dict[str, Any]]:
    """Throughput of every variant, as far as the profile asks for it."""
    protocol = profile.protocol
    found: dict[str, dict[str, Any]] = {name: {} for name in sessions}
    if "batch" in protocol.scenarios:
        rates = throughput(
            sessions, lambda name, batch: _feed(sessions[name], data, batch), protocol.batches, protocol.block_s / 2
        )
        for name, rate in rates.items():
            found[name]["throughput"] = rate
    if "offline" in protocol.scenarios:
        batch = max(protocol.batches)
        sets = {name: [_feed(session, data, batch, start) for start in range(0, SET_IMAGES, batch)]
                for name, session in sessions.items()}  # fmt: skip
        for name, figure in offline(sessions, sets).items():
            found[name]["offline"] = figure
    return found


def _feed(session: Session, data: Dataset | None, batch: int, start: int = 0) -> Feed:
    """Real test images, those from `start` on, where there are any; random ones for somebody else's file."""
    feed = noise(session, batch)
    for info in session.inputs:
        shape = feed[info.name].shape
        if data is not None and list(shape[1:]) == data.size:
            chosen = np.arange(start, start + shape[0]) % len(data.test)
            images = data.test.images[chosen].numpy()
            feed[info.name] = images if info.dtype == "uint8" else _normaliser(data)(images).astype(info.dtype)
    return feed


def _judged(
    candidate: Candidate, first: Candidate, data: Dataset | None, task: Task, judged: dict[Path, Array]
) -> dict[str, Any]:
    if data is None:
        return {}
    labels = data.test.labels.numpy()
    own, reference = judged[candidate.file], judged[first.file]
    right = task.correct(own, labels)
    confusion = confusion_matrix(own.argmax(1), labels, len(data.classes))
    found: dict[str, Any] = {
        "metrics": task.metrics(own, labels),
        "classes": class_figures(confusion, data.classes),
        "confusion": confusion.tolist() if len(data.classes) <= MAX_CONFUSION_CLASSES else [],
        "correct": packed(right),
    }
    if candidate is not first:
        before = task.correct(reference, labels)
        found["drop"], found["mcnemar"] = paired_drop(before, right), mcnemar(before, right)
        found["agreement"] = float((own.argmax(1) == reference.argmax(1)).mean())
    return found


def _described(candidate: Candidate, profile: Profile, here: bool) -> dict[str, Any]:
    """What the file is. Which of its layers are fused is a matter of the device."""
    layers = optimised_layers(candidate.file)
    metrics = candidate.artifact.manifest.metrics if candidate.artifact else {}
    return {
        "precision": _precision(candidate.file, profile, layers["int8"]),
        "size_mb": stored_bytes(candidate.file) / 1e6,
        "parameters": metrics.get("parameters"),
        "macs": metrics.get("macs"),
        "layers": layers if here else {},
    }


def _precision(file: Path, profile: Profile, integers: int) -> str:
    """As the file says, but without integers where ONNX Runtime has no layer in them; PyTorch's is the profile's."""
    stored = stored_precision(file)
    if "int8" in stored:
        lost = profile.runtime == "onnxruntime" and not integers
        return stored if not lost else stored.partition("+")[2] or "fp32"
    return profile.precision if profile.runtime == "torch" else stored


def _rounded(raw: dict[str, dict[str, list[list[float]]]]) -> dict[str, Any]:
    return {p: {v: [[round(x, 5) for x in r] for r in rounds] for v, rounds in by.items()} for p, by in raw.items()}
