"""How much every group of channels, every block, and every layer in int8 does to a network's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from ..data import Dataset, batches
from ..errors import UsageError, nearest
from ..pipeline import plan
from ..pruning import Importance
from ..runs import find_source
from ..single import recipe_beside
from ..stages.teaching import load_network
from .network import sweep

__all__ = ["sensitivity", "sweep"]

#: Stages that leave a float network.
FLOAT = ("teacher", "distill", "prune", "fuse", "average")
BATCH = 128


def sensitivity(
    source: str,
    *,
    profile: str | None = None,
    images: int = 256,
    importance: Importance = "magnitude",
    data: str | None = None,
    emit: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Sweep the float network of a run, RUN:stage or artifact on images that it was not trained on.

    They are of the validation split, or of the training images where there is none, never of the test split; ranges of
    int8 activations and the importances' own figures come from as many training images. `profile` (default: the
    recipe's first) says the channel multiple and the quantization scheme.
    Returns what `edgekd sensitivity --json` prints; `sweep` says what is in it. Raises UsageError, RecipeError,
    ArtifactError or StageError.
    """
    if importance not in get_args(Importance):
        hint = nearest(importance, get_args(Importance))
        raise UsageError(f"no importance {importance!r}", where="--importance", hint=hint)
    found = find_source(source, FLOAT)
    manifest = found.artifact.manifest
    if manifest.quantization is not None or manifest.kind == "export":
        hint = f"name one that a stage {', '.join(FLOAT[:-1])} or {FLOAT[-1]} left"
        raise UsageError(f"a {manifest.kind} artifact holds no float network", where=source, hint=hint)
    network = load_network(found.artifact)
    recipe = recipe_beside(found, source, data, [] if profile is None else [f'profiles=["{profile}"]'])
    planned = plan(recipe.model_copy(update={"stage": []}), found.artifact.path.parent, source=found.artifact)
    device, used = planned.profiles[0], manifest.preprocessing
    split = "validation" if len(planned.data.validation) else "train"

    def drawn(name: str) -> list[dict[str, Any]]:
        return _drawn(planned.data, name, images, used.mean, used.std, recipe.seed)

    measured = drawn(split)
    document = sweep(
        network,
        measured,
        calibration=drawn("train"),
        channel_multiple=device.channel_multiple,
        scheme=device.scheme,
        importance=importance,
        keep_outputs=len(planned.data.classes),
        emit=emit,
    )
    shown = {"source": str(found.artifact.path), "stage": found.name, "profile": device.name, "split": split}
    return {**shown, "images": sum(len(batch["image"]) for batch in measured), **document}


def _drawn(
    data: Dataset, split: str, images: int, mean: Sequence[float], std: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    rows = getattr(data, split)
    kept = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:images].sort().values)
    return list(batches(kept, batch=BATCH, mean=mean, std=std, seed=seed, epoch=0, shuffle=False))
