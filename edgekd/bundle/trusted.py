"""How far a results.json is believed: it may have been written by another program, or on a device that is not ours."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from .fed import LABELS
from .make import MANIFEST

__all__ = ["of_bundle", "out_of_range"]


def of_bundle(table: dict[str, Any], bundle: Path) -> str | None:
    """What keeps a runner's table from being the results of this bundle, made here; None: nothing does.

    Profile, networks, sizes, classes and labels are the bundle's, so they must stand in the results as they do in it.
    Raises ArtifactError where the bundle itself is damaged.
    """
    try:
        text = (bundle / MANIFEST).read_bytes()
        manifest = json.loads(text)
        with np.load(bundle / "inputs.npz") as arrays:
            labels = arrays[LABELS].tolist() if LABELS in arrays else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"damaged: {error}", where=str(bundle), hint="make the bundle again") from error
    if table.get("bundle") != hashlib.sha256(text).hexdigest():
        return "these are the results of another bundle"
    told = table.get("manifest")
    if not isinstance(told, dict):
        return "they have no manifest"
    if differs := sorted(key for key in {*manifest, *told} if manifest.get(key) != told.get(key)):
        return f"their manifest is not the bundle's: {', '.join(differs)} differ{'s' * (len(differs) == 1)}"
    if "labels" in table and table["labels"] != labels:  # without, nothing is judged
        return "their labels are not the bundle's"
    return None


def out_of_range(table: dict[str, Any]) -> str | None:
    """The first value of a runner's table that cannot be; None where all can. Raises KeyError, TypeError, ValueError.

    Networks are those of the manifest, latencies are positive, answers are classes, one for each label, and the
    accuracy is theirs.
    """
    names, classes = {n["name"] for n in table["manifest"]["networks"]}, len(table["manifest"]["classes"])
    labels = np.asarray(table.get("labels") or [])
    if unknown := {*table["networks"]} - names:
        return f"network {min(unknown)!r} is not in its manifest"
    if labels.size and not _classes(labels, classes):
        return f"labels are integers from 0 to {classes - 1}"
    for name, told in table["networks"].items():
        if "judged" in told and (why := _wrong(told["judged"], labels, classes)) is not None:
            return f"{name}: {why}"
    for number, one in enumerate(table["rounds"], 1):
        for name, block in one["networks"].items():
            times = np.asarray(block["ns"], np.float64)
            if times.ndim != 1 or not times.size or not np.isfinite(times).all() or times.min() <= 0:
                return f"{name}: latencies of round {number} must be positive and finite, in ns"
    return None


def _wrong(judged: dict[str, Any], labels: np.ndarray[Any, Any], classes: int) -> str | None:
    answers = np.asarray(judged["answers"])
    if answers.shape != labels.shape:
        return f"{answers.size} answers for {labels.size} labels"
    if answers.size and not _classes(answers, classes):
        return f"answers are integers from 0 to {classes - 1}"
    for key, highest in (("accuracy", 1.0), ("ece", 1.0), ("loss", np.finfo(np.float64).max)):
        if not 0 <= judged[key] <= highest + 1e-9:  # written so that NaN is wrong
            return f"{key} is {judged[key]}"
    right = float((answers == labels).mean()) if labels.size else judged["accuracy"]
    if abs(judged["accuracy"] - right) > 1e-6:
        return f"accuracy is {judged['accuracy']}, its answers have {right}"
    return None


def _classes(values: np.ndarray[Any, Any], classes: int) -> bool:
    return values.dtype.kind == "i" and values.ndim == 1 and values.min() >= 0 and values.max() < classes
