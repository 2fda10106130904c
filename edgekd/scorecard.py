"""Every variant of a run measured in one session, as one `Results` document."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import Artifact, write_atomically
from .bench import (
    Lineage,
    ProfileResults,
    Results,
    Variant,
    environment,
    evaluate,
    measure_latency,
    paired_drop,
    peak_memory_mb,
    speedup,
    throughput,
)
from .data import Dataset
from .errors import UsageError
from .onnx_file import optimised_layers
from .profile import Profile
from .runtimes import Feed, Session, open_session
from .stages.export import write_onnx
from .tasks import Task

__all__ = ["Candidate", "candidate_of", "lineage_of", "measure"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Candidate:
    """A model file to measure, and the artifact it comes from (None: somebody else's file)."""

    name: str
    file: Path
    artifact: Artifact | None

    @property
    def key(self) -> str:
        return self.artifact.key if self.artifact else ""


def candidate_of(artifact: Artifact, name: str, data: Dataset, opset: int, cache: Path) -> Candidate:
    """The file of an `export` artifact, or an export of any other one (kept in `cache` by its key)."""
    if artifact.manifest.kind == "export":
        return Candidate(name, artifact.file("model.onnx"), artifact)
    file = cache / f"{name}-{artifact.key[:12]}-opset{opset}.onnx"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            write_onnx(artifact, temporary, data, opset=opset)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    return Candidate(name, file, artifact)


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
) -> Results:
    """Accuracy on the whole test split, latency interleaved, throughput, memory and size of every candidate.

    The first candidate is the one that others are compared with. Without `data` there is no accuracy, and inputs are
    random. Raises UsageError or StageError (a file that does not load, a runtime that fails).
    """
    surroundings = environment()
    judged = {c.name: _accuracy(c, data, emit) for c in candidates} if data is not None else {}
    rows, raw = [], {}
    for profile in profiles:
        emit({"event": "bench", "profile": profile.name, "done": 0, "total": profile.protocol.rounds})
        found, raw[profile.name] = _on_profile(candidates, profile, data, task, judged, emit)
        rows.append(found)
    if samples is not None:
        write_atomically(samples, json.dumps({"unit": "ms", "profiles": _rounded(raw)}) + "\n")
    return Results(
        name=name,
        command=command,
        seed=seed,
        headline=task.headline,
        direction=task.direction,
        test_images=len(data.test) if data is not None else 0,
        classes=data.classes if data is not None else [],
        profiles=rows,
        lineage=list(lineage),
        environment=surroundings,
    )


def _accuracy(candidate: Candidate, data: Dataset, emit: Callable[[dict[str, Any]], None]) -> Array:
    emit({"event": "accuracy", "variant": candidate.name, "images": len(data.test)})
    session = open_session(candidate.file, threads=os.cpu_count() or 1)
    try:
        logits = evaluate(session, data.test.images.numpy(), _normaliser(data))
    finally:
        session.close()
    if logits.shape[1] != len(data.classes):
        raise UsageError(
            f"gives {logits.shape[1]} logits and the data have {len(data.classes)} classes", where=str(candidate.file)
        )
    return logits


def _normaliser(data: Dataset) -> Callable[[Array], Array]:
    mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (data.mean, data.std))

    def apply(images: Array) -> Array:
        scaled = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
        return (scaled - mean) / std

    return apply


def _on_profile(
    candidates: Sequence[Candidate],
    profile: Profile,
    data: Dataset | None,
    task: Task,
    judged: dict[str, Array],
    emit: Callable[[dict[str, Any]], None],
) -> tuple[ProfileResults, dict[str, list[list[float]]]]:
    protocol = profile.protocol
    sessions = {c.name: open_session(c.file, runtime=profile.runtime, threads=profile.threads) for c in candidates}
    feeds = {name: _feed(session, data, protocol.batch) for name, session in sessions.items()}

    def progress(done: int, total: int) -> None:
        emit({"event": "bench", "profile": profile.name, "done": done, "total": total})

    latencies, raw = measure_latency(sessions, feeds, protocol, profile.threads, progress=progress)
    variants = []
    first = candidates[0]
    for candidate in candidates:
        session = sessions[candidate.name]
        variants.append(
            Variant(
                name=candidate.name,
                key=candidate.key,
                file=str(candidate.file),
                **_judged(candidate, first, data, task, judged),
                latency=latencies[candidate.name],
                speedup=speedup(latencies[first.name], latencies[candidate.name]),
                throughput=throughput(session, partial(_feed, session, data), protocol.batches, 0.3),
                **_described(candidate),
                peak_memory_mb=peak_memory_mb(candidate.file, feeds[candidate.name], profile.threads),
            )
        )
    for session in sessions.values():
        session.close()
    rounds = min((len(found.round_p50) for found in latencies.values()), default=0)
    results = ProfileResults(
        profile=profile.name,
        device=str(environment().get("cpu", profile.description)),
        runtime=f"{profile.runtime} {environment()['versions'].get(profile.runtime, '')}".strip(),
        settings=profile.model_dump(mode="json"),
        rounds=rounds,
        variants=variants,
    )
    return results, raw


def _feed(session: Session, data: Dataset | None, batch: int) -> Feed:
    """Real test images where there are any; random ones for somebody else's file."""
    feed = {}
    for info in session.inputs:
        axes = [axis if isinstance(axis, int) else (batch if i == 0 else 1) for i, axis in enumerate(info.axes)]
        if data is not None and axes[1:] == data.size:
            images = np.resize(data.test.images[:batch].numpy(), (axes[0], *axes[1:]))
            feed[info.name] = images if info.dtype == "uint8" else _normaliser(data)(images).astype(info.dtype)
        else:
            noise = np.random.default_rng(0).random(axes)
            feed[info.name] = (noise * 255 if info.dtype in ("uint8", "int64", "int32") else noise).astype(info.dtype)
    return feed


def _judged(
    candidate: Candidate, first: Candidate, data: Dataset | None, task: Task, judged: dict[str, Array]
) -> dict[str, Any]:
    if data is None:
        return {}
    labels = data.test.labels.numpy()
    own, reference = judged[candidate.name], judged[first.name]
    found: dict[str, Any] = {"metrics": task.metrics(own, labels)}
    if candidate is not first:
        found["drop"] = paired_drop(task.correct(reference, labels), task.correct(own, labels))
        found["agreement"] = float((own.argmax(1) == reference.argmax(1)).mean())
    return found


def _described(candidate: Candidate) -> dict[str, Any]:
    layers = optimised_layers(candidate.file)
    metrics = candidate.artifact.manifest.metrics if candidate.artifact else {}
    return {
        "precision": "int8" if layers["int8"] else "fp32",
        "size_mb": candidate.file.stat().st_size / 1e6,
        "parameters": metrics.get("parameters"),
        "macs": metrics.get("macs"),
        "layers": layers,
    }


def _rounded(raw: dict[str, dict[str, list[list[float]]]]) -> dict[str, Any]:
    return {p: {v: [[round(x, 5) for x in r] for r in rounds] for v, rounds in by.items()} for p, by in raw.items()}
