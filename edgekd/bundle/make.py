"""Write a bundle: a directory, or the same directory packed as .tar.zst or .tar.gz."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .. import __version__
from ..artifact import Artifact, file_sha256, write_atomically
from ..data import Dataset
from ..errors import StageError, UsageError
from ..forks import made_for
from ..onnx_edit import opset_of
from ..onnx_file import read, read_metadata, stored_precision
from ..profile import Profile
from ..runtimes import open_session
from ..trt.files import FORMS, suited
from .fed import Fed, expected_of, fed_of
from .packing import ENDINGS, packed
from .single_file import runner_source

__all__ = ["FORMAT", "BundleFile", "bundle_of", "make_bundle"]

#: Of the manifest; raised when its meaning changes. The runner has it too.
FORMAT = 1
MANIFEST = "bundle.json"
#: Of the test split, drawn without replacement: enough for a percent, and a minute of a slow device.
IMAGES = 1000
#: What a file's outputs on the device may differ from ONNX Runtime's here, by precision: `rms_ratio` is the root mean
#: square of the difference over that of the outputs, `agreement` the share of equal answers. TensorRT computes fp32 in
#: TF32 where it is faster (10 bits of mantissa, as fp16), and rounds int8 where its own fusions end.
TOLERANCE = {
    "fp32": {"rms_ratio": 0.01, "agreement": 0.995},
    "fp16": {"rms_ratio": 0.05, "agreement": 0.99},
    "bf16": {"rms_ratio": 0.2, "agreement": 0.98},
    "int8": {"rms_ratio": 0.25, "agreement": 0.98},
}

README = """\
{name}, for {profile}: made by edgekd {version}

Copy this directory to the device, and there:

    cd {directory}
    python3 run.py
    cat results.json

run.py needs Python 3.8, NumPy and {runtime}.
It checks this directory's files, builds, compares the outputs with those of ONNX Runtime, measures, and writes
results.json after every round: killed, it goes on where it was. Back where edgekd is:

    edgekd report results.json --format text
"""
NEEDED = {"tensorrt": "TensorRT (its Python package, or trtexec)", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True)
class BundleFile:
    """One network of a bundle: an ONNX file under the name that results give it."""

    name: str
    path: Path
    key: str = ""
    scheme: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def bundle_of(artifact: Artifact, profile: Profile, path: Path, data: Dataset | None) -> Path:
    """The bundle of an `export` artifact: of its files for the profile's TensorRT where it has any and that is the
    runtime, else of model.onnx. `path` is a directory, or ends in .tar.zst or .tar.gz; returned is what was written.

    Raises UsageError or StageError as `make_bundle` does.
    """
    if artifact.manifest.kind != "export":
        raise UsageError(f"a bundle is made of an export, this is {artifact.manifest.kind}", where=str(artifact.path))
    found = {name.split(".")[1]: artifact.path / name for name in artifact.manifest.files if _typed(name)}
    if profile.tensorrt is not None:
        found = suited(found, profile.tensorrt)
    if profile.runtime != "tensorrt" or not found:
        found = {"model": artifact.file("model.onnx")}
    scheme, metrics = made_for(artifact), artifact.manifest.metrics
    names = [*(n for n in FORMS if n in found), *sorted(set(found) - set(FORMS))]
    schemes = {n: scheme if n == "model" or "int8" in n else None for n in names}
    files = [BundleFile(n, found[n], artifact.key, schemes[n], metrics) for n in names]
    return make_bundle(files, path, profile, data)


def _typed(name: str) -> bool:
    return name.startswith("model.") and name.endswith(".onnx") and name.count(".") == 2


def make_bundle(
    files: Sequence[BundleFile | Path],
    destination: Path,
    profile: Profile,
    data: Dataset | None,
    *,
    images: int = IMAGES,
) -> Path:
    """Write a bundle of ONNX files, the first of which the others are compared with, the last the one that matters.

    Inputs are `images` test images with labels, drawn by a fixed seed, or, without `data`, random ones. Reference
    outputs are those of ONNX Runtime here. The same arguments give the same bytes. Raises UsageError (a file that is
    no ONNX or does not fit the data, a destination that is something else, a profile for a DLA) or StageError
    (outputs that are not finite, a disk that refuses).
    """
    networks = [f if isinstance(f, BundleFile) else BundleFile(Path(f).stem, Path(f)) for f in files]
    _check(networks, destination)
    if profile.tensorrt is not None and profile.tensorrt.dla is not None:
        what = f"{profile.name} asks for DLA {profile.tensorrt.dla}, run.py builds for the GPU only"
        raise UsageError(what, where="bundle", hint="leave tensorrt.dla out of the profile to measure the GPU")
    directory = _plain(destination)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _fill(temporary, networks, directory.name, profile, data, images)
        if destination != directory:
            packed(temporary, directory.name, destination)
        else:
            if directory.exists():
                shutil.rmtree(directory)
            os.rename(temporary, directory)
    except OSError as error:
        what = f"cannot write {destination}: {error.strerror or error}"
        raise StageError(what, hint="is the disk full, or the directory read-only?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return destination


def _plain(destination: Path) -> Path:
    """The directory's own name, without the ending of an archive."""
    ending = next((e for e in ENDINGS if destination.name.endswith(e)), "")
    return destination.with_name(destination.name.removesuffix(ending)) if ending else destination


def _check(networks: Sequence[BundleFile], destination: Path) -> None:
    names = [n.name for n in networks]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"a bundle needs networks of different names, got {names}", where="bundle")
    if destination == _plain(destination):
        if destination.suffix in {".tar", ".tgz", ".zst", ".gz", ".zip"}:
            raise UsageError(f"cannot write {destination.name}", where="bundle", hint=f"endings: {', '.join(ENDINGS)}")
        if destination.exists() and not (destination / MANIFEST).is_file() and not _empty(destination):
            hint = "name another directory, or empty this one"
            raise UsageError(f"{destination} exists and is no bundle", where="bundle", hint=hint)


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _fill(
    directory: Path, networks: Sequence[BundleFile], name: str, profile: Profile, data: Dataset | None, images: int
) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    expected: dict[str, np.ndarray[Any, Any]] = {}
    described, rows, fingerprint = [], None, ""
    for network in networks:
        model = read(network.path)
        file = _copied(network, directory)
        session = open_session(directory / file)
        try:
            fed = fed_of(session, profile, data, images, str(network.path))
            outputs = expected_of(session, fed, str(network.path))
        finally:
            session.close()
        _merge(arrays, fed, network.name)
        expected |= {f"{network.name}.{output}": value for output, value in outputs.items()}
        rows, fingerprint = fed.rows, fed.fingerprint
        described.append(_described(network, model, file, fed, directory))
    _save(directory / "inputs.npz", arrays)
    _save(directory / "expected.npz", expected)
    (directory / "run.py").write_text(runner_source(), encoding="utf-8")
    (directory / "run.py").chmod(0o755)
    needed = NEEDED.get(profile.runtime, profile.runtime)
    readme = README.format(name=name, profile=profile.name, version=__version__, directory=name, runtime=needed)
    (directory / "README.txt").write_text(readme, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "edgekd": __version__,
        "name": name,
        "profile": profile.model_dump(mode="json"),
        "networks": described,
        "rows": rows,
        "data": fingerprint,
        "classes": data.classes if data is not None else [],
        "files": {p.name: [file_sha256(p), p.stat().st_size] for p in sorted(directory.iterdir())},
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _copied(network: BundleFile, directory: Path) -> str:
    """Copy a network's file, and those beside it that hold its weights; returns its name in the bundle."""
    name = network.path.name
    if (directory / name).exists():
        name = f"{network.name}.onnx"
    graph = onnx.load(network.path, load_external_data=False).graph
    places = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    for place, target in [(network.path.name, name), *((p, p) for p in sorted(places))]:
        if "/" in target or (directory / target).exists():
            what = f"the weights in {target} cannot lie beside those of another file"
            raise UsageError(what, where=str(network.path), hint="save the network as one file")
        shutil.copyfile(network.path.parent / place, directory / target)
    return name


def _merge(arrays: dict[str, np.ndarray[Any, Any]], fed: Fed, name: str) -> None:
    for key, value in fed.arrays.items():
        if key in arrays and not np.array_equal(arrays[key], value):
            raise UsageError(f"{name} takes other inputs than the networks before it", where="bundle")
        arrays[key] = value


def _described(network: BundleFile, model: onnx.ModelProto, file: str, fed: Fed, directory: Path) -> dict[str, Any]:
    """What the runner and the reader of its results must know of one network."""
    stored = stored_precision(network.path)
    precision = stored.partition("+")[0]
    return {
        "name": network.name,
        "file": file,
        "sha256": file_sha256(directory / file),
        "precision": precision,
        "typed_half": "fp16" in stored,
        "scheme": network.scheme,
        "key": network.key,
        "opset": opset_of(model),
        "batch": fed.batch,
        "inputs": fed.inputs,
        "outputs": fed.outputs,
        "logits": fed.logits,
        "tolerance": TOLERANCE[precision],
        "metadata": read_metadata(network.path),
        "parameters": network.metrics.get("parameters"),
        "macs": network.metrics.get("macs"),
    }


def _save(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """NumPy dates its archives' members 1980, so the same arrays are the same bytes."""
    np.savez_compressed(path, **{name: arrays[name] for name in sorted(arrays)})  # type: ignore[arg-type]
