"""The bundle: its manifest, its files' hashes, what is fed to a network and what must come out."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from .errors import Failed

__all__ = ["Arrays", "answered", "compared", "feed", "load_arrays", "read_manifest", "verify", "write_json"]

FORMAT = 1
MANIFEST = "bundle.json"
#: What a manifest of this format has, and as what.
NEEDED = {"edgekd": str, "files": dict, "networks": list, "profile": dict, "rows": int}
AGAIN = "copy the whole bundle again"

Arrays = Dict[str, "np.ndarray[Any, Any]"]


def read_manifest(directory: str) -> Tuple[Dict[str, Any], str]:
    """The manifest and its own sha256, which is the bundle's identity."""
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise Failed("no %s in %s: %s" % (MANIFEST, directory, error.strerror), AGAIN)
    try:
        manifest = json.loads(content.decode("utf-8"))
        version = manifest["format"]
    except (ValueError, TypeError, KeyError):
        raise Failed("%s is damaged: not a bundle's manifest" % MANIFEST, AGAIN)
    if version != FORMAT:
        raise Failed("bundle format %s, this runner reads %d" % (version, FORMAT), "use the run.py of that bundle")
    for key, kind in NEEDED.items():
        if not isinstance(manifest.get(key), kind):
            raise Failed("%s is damaged: `%s` is missing or wrong" % (MANIFEST, key), AGAIN)
    if not isinstance(manifest["profile"].get("protocol"), dict):
        raise Failed("%s is damaged: `profile` has no protocol" % MANIFEST, AGAIN)
    return manifest, hashlib.sha256(content).hexdigest()


def verify(directory: str, manifest: Dict[str, Any]) -> None:
    """Compare every file with its size and sha256; the first that differs is named."""
    for name, (sha256, size) in sorted(manifest["files"].items()):
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            raise Failed("%s is missing" % name, AGAIN)
        if os.path.getsize(path) != size or file_sha256(path) != sha256:
            raise Failed("%s is corrupted (sha256 does not match)" % name, AGAIN)


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def load_arrays(directory: str, name: str) -> Arrays:
    """The arrays of one .npz file."""
    try:
        with np.load(os.path.join(directory, name), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise Failed("%s cannot be read: %s" % (name, error), AGAIN)


def feed(network: Dict[str, Any], arrays: Arrays, start: int, count: int) -> Arrays:
    """What `count` rows from `start` on are as the network's inputs; past the end it goes on with the first row.

    Images are stored as they were in the data set, and made float, scaled and normalised here.
    """
    fed = {}
    for info in network["inputs"]:
        stored = arrays[info["array"]]
        if info["rows"]:
            stored = stored[np.arange(start, start + count) % len(stored)]
        normalise = info.get("normalise")
        if normalise is not None:
            mean, std = (np.asarray(normalise[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
            scaled = stored.astype(np.float32)
            if normalise["divide"] != 1:
                scaled = scaled / np.float32(normalise["divide"])
            stored = (scaled - mean) / std
        fed[info["name"]] = np.ascontiguousarray(stored.astype(info["dtype"], copy=False))
    return fed


def compared(network: Dict[str, Any], found: Arrays, expected: Arrays, tolerance: Dict[str, float]) -> Dict[str, Any]:
    """Outputs [N, ...] against those of ONNX Runtime on the same rows; `problem` says what is wrong, or is None."""
    worst: Dict[str, Any] = {"rows": 0, "max_abs_difference": 0.0, "rms_ratio": 0.0, "agreement": None}
    problem: Optional[str] = None
    for info in network["outputs"]:
        name = info["name"]
        own, reference = found[name].astype(np.float64), expected[name].astype(np.float64)
        worst["rows"] = len(own) if own.ndim else 1
        if own.shape != reference.shape:
            shapes = (name, list(own.shape), list(reference.shape))
            return dict(worst, problem="output %s has shape %s, expected %s" % shapes)
        wrong = ~np.isfinite(own) & np.isfinite(reference)
        if wrong.any():
            problem = problem or "output %s: %d of %d values are NaN or infinite" % (name, wrong.sum(), wrong.size)
            continue
        if not own.any() and reference.any():
            problem = problem or "output %s is zero everywhere" % name
        with np.errstate(invalid="ignore"):
            difference = np.nan_to_num(own - reference)
        worst["max_abs_difference"] = max(worst["max_abs_difference"], float(np.abs(difference).max(initial=0.0)))
        size = float(np.sqrt(np.mean(np.nan_to_num(reference) ** 2))) if reference.size else 0.0
        error = float(np.sqrt(np.mean(difference**2))) if difference.size else 0.0
        worst["rms_ratio"] = max(worst["rms_ratio"], error / max(size, 1e-30) if error else 0.0)
        if name == network["logits"]:
            worst["agreement"] = float((own.argmax(1) == reference.argmax(1)).mean())
    if problem is None and worst["rms_ratio"] > tolerance["rms_ratio"]:
        values = (worst["rms_ratio"], tolerance["rms_ratio"])
        problem = "outputs differ from ONNX Runtime's by %.1e of their root mean square, allowed is %.1e" % values
    # One image may always be a tie that rounding decides.
    agreement = worst["agreement"]
    allowed = max(1.0, (1 - tolerance["agreement"]) * worst["rows"])
    if problem is None and agreement is not None and round((1 - agreement) * worst["rows"]) > allowed:
        values = (agreement * 100, tolerance["agreement"] * 100)
        problem = "%.1f %% of the answers are ONNX Runtime's, expected at least %.1f %%" % values
    return dict(worst, problem=problem)


def answered(logits: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]") -> Dict[str, Any]:
    """Accuracy, cross-entropy in nats, expected calibration error and the answers of logits [N, K] on labels [N]."""
    values = logits.astype(np.float64)
    shifted = values - values.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    answers = values.argmax(axis=1)
    right = answers == labels
    confidence = np.exp(-log_sum)
    bins = np.minimum((np.ceil(confidence * 15) - 1).astype(int), 14)
    gaps = [abs(float((right[bins == b] - confidence[bins == b]).sum())) for b in range(15)]
    return {
        "accuracy": float(right.mean()),
        "loss": float((log_sum - shifted[np.arange(len(labels)), labels]).mean()),
        "ece": sum(gaps) / len(labels),
        "answers": [int(a) for a in answers],
    }


def write_json(path: str, document: Dict[str, Any]) -> None:
    """Write so that a reader, or a power cut, sees the old document or the new one."""
    temporary = "%s.%d.tmp" % (path, os.getpid())
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(document, stream, separators=(",", ":"), sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Failed(
            "cannot write %s: %s" % (path, error.strerror),
            "is the disk full, or the directory read-only? --out DIR writes elsewhere; what was written before stays",
        )
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def batches(rows: int, size: int) -> List[int]:
    """Where batches of `size` begin that cover `rows` rows."""
    return list(range(0, rows, size))
