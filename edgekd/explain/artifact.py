"""A quantize artifact, layer by layer and by module path."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..artifact import MANIFEST, Artifact
from ..candidates import candidate_of
from ..data import Dataset, load
from ..onnx_file import export_onnx
from ..profile import Profile
from ..recipe import Recipe
from ..stages.export import exportable
from .document import Explanation, LayerRow
from .file import Examined, examine, explain
from .network import LayerError, errors_of
from .reasons import BY_CHOICE, NOT_QUANTIZED

__all__ = ["explain_artifact"]

OPSET = 18
#: What exports hold, and what other tools quantized.
FILE = "model.onnx"


def explain_artifact(artifact: Artifact, profile: Profile, recipe: Recipe | None) -> Explanation:
    """Every matrix layer of a `quantize` artifact, or of its export: precision, range, errors, times, and why float.

    The recipe names the data that the errors of outputs are measured on; without one they stay unknown. Int8 and
    float network are exported beside the artifact as `edgekd bench` does, and timed by ONNX Runtime's profiler.
    Raises UsageError, StageError or ArtifactError.
    """
    data = load(recipe.data, recipe.seed) if recipe is not None else None
    quantized = artifact if artifact.manifest.kind == "quantize" else beside(artifact, "quantize")
    parent = beside(quantized, "float") if quantized is not None else None
    with _file(artifact, data) as own:
        examined = examine(own, profile)
        if parent is None:
            explanation = explain(examined)
        else:
            with _file(parent, data) as other:
                explanation = explain(examined, examine(other, profile))
        notes = list(explanation.notes)
        if data is None:
            notes.append("no recipe names the data: errors of outputs are unknown; give --recipe FILE")
        if parent is None:
            notes.append("the float network that it came from is not beside it: its times are unknown")
        rows = explanation.layers
        if quantized is not None and FILE not in quantized.manifest.files and quantized.manifest.quantization:
            rows = _with_errors(examined, rows, errors_of(quantized, data), _weights_kept(quantized))
    return explanation.model_copy(
        update={
            "file": str(artifact.path),
            "layers": rows,
            "notes": notes,
            "against": str(parent.path) if parent else None,
        }
    )


def beside(artifact: Artifact, what: str) -> Artifact | None:
    """Of what an artifact in the same run was made from: the nearest `quantize` one, or the nearest `float` network."""
    keys = {key for role, key in artifact.manifest.parents.items() if role == "source"}
    for manifest in sorted(artifact.path.parent.glob(f"*/{MANIFEST}")):
        found = Artifact.open(manifest.parent, verify=False)
        if found.key not in keys or found.path == artifact.path:
            continue
        fits = found.manifest.kind == what or (what == "float" and found.manifest.quantization is None)
        return Artifact.open(found.path) if fits else beside(found, what)
    return None


@contextlib.contextmanager
def _file(artifact: Artifact, data: Dataset | None) -> Iterator[Path]:
    """The artifact as an ONNX file: kept beside it where data are there to compare it with the network."""
    if FILE in artifact.manifest.files:
        yield artifact.file(FILE)
        return
    if data is not None:
        yield candidate_of(artifact, artifact.manifest.kind, data, OPSET, artifact.path.parent / ".onnx").file
        return
    manifest = artifact.manifest
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / f"{manifest.kind}.onnx"
        export_onnx(
            exportable(artifact),
            file,
            size=manifest.preprocessing.size,
            opset=OPSET,
            classes=manifest.classes,
            preprocessing=manifest.preprocessing,
        )
        yield file


def _weights_kept(quantized: Artifact) -> bool:
    """Whether the weights are the float network's but for their rounding, which `round` hides in the weights."""
    config = quantized.manifest.config
    return not config["heal"]["epochs"] and "equalise" not in config.get("corrections", [])


def _with_errors(examined: Examined, rows: list[LayerRow], found: list[LayerError], kept: bool) -> list[LayerRow]:
    """Rows with module paths and errors, matched in the order of execution, weighted layers and bare products apart.

    `kept`: the float network's weights are the reference, where it was found.
    """
    matched: dict[int, LayerError] = {}
    for weighted in (True, False):
        ours = [i for i, layer in enumerate(examined.layers) if bool(layer.weight_shape) == weighted]
        theirs = [e for e in found if e.weighted == weighted for _ in range(e.products)]
        if len(ours) == len(theirs):
            matched |= dict(zip(ours, theirs, strict=True))
    return [_completed(row, matched[i], kept) if i in matched else row for i, row in enumerate(rows)]


def _completed(row: LayerRow, e: LayerError, kept: bool) -> LayerRow:
    why = [e.reason if text in (NOT_QUANTIZED, BY_CHOICE) and e.reason else text for text in row.why_float]
    update: dict[str, Any] = {"name": e.path or row.name, "path": e.path or None, "why_float": why}
    update["output_sqnr_db"] = e.output_sqnr_db
    if row.weight_sqnr_db is None or not kept:
        update["weight_sqnr_db"] = e.weight_sqnr_db
    return row.model_copy(update=update)
