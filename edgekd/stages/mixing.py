"""What a quantize stage decides by measuring: which layers stay float, and whether int8 is handed out at all."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from .. import ranks
from ..artifact import Artifact, write_atomically
from ..data import Split
from ..errors import Problem
from ..models import build
from ..quant.mixed import PrecisionRecord
from .paying import Pricing, judged, measuring_profile, priced, recorded
from .teaching import Context
from .workspace import Workspace, calibration

__all__ = ["DOCUMENT", "calibration_problems", "decided", "matching", "precision_problems", "save_float", "verdict"]

#: Of the artifact; and, until it is complete, of the partial directory, so that a resumed run decides nothing anew.
DOCUMENT = "precision.json"


def precision_problems(stage: Any, context: Context) -> Iterator[Problem]:
    """Patterns that match nothing, wishes about time where none can be measured, and what needs training or none."""
    where = context.where
    if stage.heal.epochs == 0:
        for name in ("learned", "warmup"):
            if getattr(stage, name):
                yield Problem(f"{where}.{name}", "is about healing, and heal.epochs is 0", "heal = { epochs = 3 }")
    elif stage.warmup and (stage.heal.epochs - 1) / stage.heal.epochs < stage.warmup:
        what = f"{stage.warmup:g} of {stage.heal.epochs} epochs leaves none with int8 activations"
        yield Problem(f"{where}.warmup", what, "heal = { epochs = 3 } or more, or leave warmup out")
    for i, name in enumerate(stage.corrections):
        place = f"{where}.corrections[{i}]"
        if stage.heal.epochs and name != "equalise":
            what = f"{name!r} mends a network that is not trained, and heal.epochs is {stage.heal.epochs}"
            yield Problem(place, what, "heal = { epochs = 0 }, or leave it out: training does more")
        if name in stage.corrections[:i]:
            yield Problem(place, f"{name!r} stands there twice")
    if context.source is not None and stage.float_layers:
        paths = [path for path, _ in build(context.source).named_modules() if path]
        for i, pattern in enumerate(stage.float_layers):
            if not fnmatch.filter(paths, pattern):
                close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5)
                hint = f"near it: {', '.join(close)}" if close else f"module paths are like {paths[-1]!r}"
                yield Problem(f"{where}.float_layers[{i}]", f"{pattern!r} matches no module", hint)
    if stage.mixed is not None and stage.mixed.max_drop is None:
        profile, why = measuring_profile(context.profiles)
        if profile is None:
            yield Problem(f"{where}.mixed", f"no latency can be measured: {why}", "mixed = { max_drop = 0.005 }")


def calibration_problems(stage: Any, context: Context) -> Iterator[Problem]:
    """Calibration images of one class only: ranges of the others would be guessed."""
    data = context.data
    if stage.mode != "static" or len(data.classes) < 2:
        return
    labels = Split(data.train.images[..., :1, :1], data.train.labels)  # which are drawn is all that is asked
    drawn = calibration(labels, data, context.recipe.seed, stage.calibration)
    seen = {label for batch in drawn for label in batch["label"].tolist()}
    if len(seen) == 1 and seen != {-1}:
        what = f"all {stage.calibration} calibration images are of class {data.classes[seen.pop()]!r}"
        yield Problem(f"{context.where}.calibration", what, "ranges of the other classes would be guessed")


def matching(patterns: Sequence[str], network: nn.Module) -> list[str]:
    """The module paths that fnmatch patterns stand for."""
    paths = [path for path, _ in network.named_modules() if path]
    return sorted({path for pattern in patterns for path in fnmatch.filter(paths, pattern)})


def decided(stage: Any, pricing: Pricing, floats: Collection[str]) -> PrecisionRecord:
    """What is to be int8, measured once: a run that was killed while healing goes on with what it had decided."""
    return ranks.from_first(lambda: _decided(stage, pricing, floats))


def _decided(stage: Any, pricing: Pricing, floats: Collection[str]) -> PrecisionRecord:
    workspace = pricing.workspace
    stored = workspace.partial / DOCUMENT
    if stored.is_file():
        return PrecisionRecord.model_validate_json(stored.read_text(encoding="utf-8"))
    if not stage.keep_float and stage.mixed is None:
        record = recorded(pricing.quantized(floats), stage.scheme, floats)
        record = record.model_copy(update={"not_measured": "keep_float = false"})
    else:
        record = priced(pricing, stage.scheme, wanted=stage.mixed, floats=floats)
    training = stage.heal.epochs > 0
    if stage.keep_float and record.measured is not None and record.measured.speedup.high < 1 and training:
        record = _kept(record, _slower(record) + "; healing would not change that")
    if training:
        workspace.partial.mkdir(parents=True, exist_ok=True)
        write_atomically(stored, json.dumps(record.model_dump(mode="json")))
    return record


def verdict(record: PrecisionRecord, workspace: Workspace, network: nn.Module, quantized: nn.Module) -> PrecisionRecord:
    """The record with the accuracies of both networks; `kept_float` where int8 is slower and less accurate."""
    measured = record.measured
    if measured is None:
        return record
    task = workspace.task
    sign = 1 if task.direction == "max" else -1
    (before, images, split), (after, _, _) = (judged(workspace, n) for n in (network, quantized))
    update = {"metric": task.headline, "float_metric": before, "own_metric": after, "images": images, "split": split}
    record = record.model_copy(update={"measured": measured.model_copy(update=update)})
    if measured.speedup.high >= 1 or sign * (after - before) >= 0:
        return record
    why = f"{_slower(record)}, and less accurate: {task.headline} {after:.4f}, float {before:.4f}"
    return _kept(record, why)


def save_float(workspace: Workspace, network: nn.Module, record: PrecisionRecord) -> Artifact:
    """The float network as the stage's result: what follows works on it as on any other."""
    workspace.emit({"event": "float", "stage": workspace.name, "why": record.kept_float})
    spec = workspace.parents["source"].manifest.model
    documents = {DOCUMENT: record.model_dump(mode="json")}
    return workspace.save(network, spec, metrics={"kept_float": record.kept_float}, documents=documents)


def _kept(record: PrecisionRecord, why: str) -> PrecisionRecord:
    """The same with every layer in float."""
    update = {"precision": "float", "reason": "the whole network stays float"}
    layers = [layer.model_copy(update=update) if layer.precision == "int8" else layer for layer in record.layers]
    return record.model_copy(update={"kept_float": why, "layers": layers})


def _slower(record: PrecisionRecord) -> str:
    assert record.measured is not None
    ratio = record.measured.speedup
    hint = "" if record.tried or not record.layers else " (mixed = 'latency' looks for layers where it is not)"
    return f"int8 is slower on {record.measured.profile}{hint}: {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
