"""From a recipe's `data` table to a checked data set with disjoint splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import EdgekdError, Problem, RecipeError, UsageError
from ..recipe import DataSpec
from ..registry import bind
from .arrays import check_range
from .own import materialise
from .source import Dataset, Source, Split, stratified

__all__ = ["load"]


def load(spec: DataSpec, seed: int, labelled: bool = True) -> Dataset:
    """The data set of a recipe; `seed` decides which training images become validation images.

    Of a pool that need not be `labelled`, labels may be -1 throughout.
    Where the source brings no validation split, the share `spec.validation` of the training images is held out,
    stratified by class. Raises RecipeError (arguments, places such as `data.root`) and UsageError (the data itself).
    """
    component, arguments, problems = bind("data", spec.use, spec.args, "data")
    if problems:
        raise RecipeError(problems)
    try:
        result = component(**arguments)
    except EdgekdError:
        raise
    except OSError as error:  # a folder without read permission, a disk that fails
        raise UsageError(f"cannot be read: {error}", where=f"data ({spec.use})") from error
    except Exception as error:
        if component.__module__.startswith("edgekd."):
            raise
        what = f"{spec.use} failed: {type(error).__name__}: {error}"
        raise UsageError(what, where="data", hint="call the function by itself to see where") from error
    source = materialise(spec.use, result)
    where = f"data ({spec.use})"
    _check(source, where, labelled)
    train, validation = _with_validation(source, spec.validation, seed, where)
    mean, std = _normalization(spec, source, train, where)
    splits = {"train": train, "validation": validation, "test": source.test}
    return Dataset(**splits, classes=source.classes, mean=mean, std=std, fingerprint=_digest(splits, source.classes))


def _check(source: Source, where: str, labelled: bool) -> None:
    if not source.classes or len(set(source.classes)) != len(source.classes):
        raise UsageError(f"class names must be given and differ, got {source.classes}", where=where)
    _check_split("train", source.train, source, where, labelled)
    _check_split("test", source.test, source, where, labelled)
    if source.validation is not None:
        _check_split("validation", source.validation, source, where, labelled)
    if not labelled:
        return
    trained = set(source.train.labels.unique().tolist())
    for name, split in (("test", source.test), ("validation", source.validation)):
        unseen = [] if split is None else sorted(set(split.labels.unique().tolist()) - trained)
        if unseen:
            raise UsageError(
                f"the {name} split has {_names(source.classes, unseen)}, which training never saw",
                where=where,
                hint=f"add training images of it, or take it out of {name}",
            )


def _check_split(name: str, split: Split, source: Source, where: str, labelled: bool) -> None:
    images, labels = getattr(split, "images", None), getattr(split, "labels", None)
    if (
        not (isinstance(images, Tensor) and isinstance(labels, Tensor))
        or (images.ndim, labels.ndim, labels.dtype) != (4, 1, torch.int64)
        or images.dtype not in (torch.uint8, torch.float32)
    ):
        found = ", ".join(
            f"{getattr(v, 'dtype', type(v).__name__)} {list(getattr(v, 'shape', []))}" for v in (images, labels)
        )
        raise UsageError(
            f"{name} must be a Split of images uint8 or float32 [N, C, H, W] and labels int64 [N], got {found}",
            where=where,
        )
    if len(images) != len(labels):
        raise UsageError(
            f"{name} has {len(images)} images and {len(labels)} labels", where=where, hint="one label per image"
        )
    _check_targets(name, split, where)
    if len(split) == 0:
        if name == "validation":  # a source may say explicitly that there is none
            return
        raise UsageError(f"the {name} split is empty", where=where, hint=f"put images into {name}")
    if images.shape[1:] != source.train.images.shape[1:] or images.dtype != source.train.images.dtype:
        raise UsageError(
            f"{name} images are {images.dtype} {list(images.shape[1:])} and training images "
            f"{source.train.images.dtype} {list(source.train.images.shape[1:])}",
            where=where,
            hint="all splits need the same size, channels and type",
        )
    check_range(images, f"{where}, {name}")
    lowest = -1 if name == "train" or not labelled else 0  # unlabelled images can be learnt from, not measured on
    wrong = ((labels < lowest) | (labels >= len(source.classes))).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise UsageError(
            f"{name} label {int(labels[row])} of image {row} is not in 0..{len(source.classes) - 1}",
            where=where,
            hint=f"labels number the {len(source.classes)} classes from 0; {len(wrong)} of {len(split)} are outside",
        )
    if labelled and name == "train" and bool((labels < 0).all()):
        raise UsageError("no training image has a label", where=where, hint="unlabelled rows (-1) need labelled ones")


def _check_targets(name: str, split: Split, where: str) -> None:
    targets = getattr(split, "targets", None)
    if not isinstance(targets, Mapping):
        what = f"{name}.targets must be a dict from heads to labels, got {type(targets).__name__}"
        raise UsageError(what, where=where, hint='targets = {"NAME": labels}, or leave them out')
    for head, labels in targets.items():
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != split.labels.shape:
            found = f"{getattr(labels, 'dtype', type(labels).__name__)} {list(getattr(labels, 'shape', []))}"
            raise UsageError(
                f"{name}.targets[{head!r}] must be int64 [{len(split)}], got {found}",
                where=where,
                hint="one label per image, -1 where there is none",
            )


def _names(classes: list[str], rows: list[int]) -> str:
    shown = ", ".join(repr(classes[r]) for r in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return f"the class {shown}" if len(rows) == 1 else f"{len(rows)} classes ({shown})"


def _with_validation(source: Source, share: float, seed: int, where: str) -> tuple[Split, Split]:
    if source.validation is not None:
        return source.train, source.validation
    if share == 0:
        return source.train, source.train.take(torch.empty(0, dtype=torch.int64))
    kept, held = stratified(source.train.labels, share, torch.Generator().manual_seed(seed % 2**63))
    if len(held) == 0:
        raise UsageError(
            "too few training images to hold any out for validation: every class has one",
            where=where,
            hint="add images, or set data.validation = 0",
        )
    return source.train.take(kept), source.train.take(held)


def _normalization(spec: DataSpec, source: Source, train: Split, where: str) -> tuple[list[float], list[float]]:
    channels = train.images.shape[1]
    if spec.normalize is not None:
        given = {"mean": spec.normalize.mean, "std": spec.normalize.std}
        problems = [
            Problem(f"data.normalize.{key}", f"expected {channels} numbers, one per channel, got {len(values)}")
            for key, values in given.items()
            if len(values) != channels
        ]
        if problems:
            raise RecipeError(problems)
        return given["mean"], given["std"]
    if source.mean is None and source.std is None:
        return _mean_std(train.images)
    mean, std = source.mean or [], source.std or []
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UsageError(
            f"its mean {mean} and standard deviation {std} do not fit {channels} channels",
            where=where,
            hint="one number per channel, deviations above 0; or None for both: then they are computed",
        )
    return mean, std


def _mean_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of images scaled to [0, 1]; 1 for the deviation of a constant channel."""
    channels = images.shape[1]
    total, squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for chunk in images.split(1024):  # float64 is eight times as large as the images: a part at a time
        values = chunk.to(torch.float64)
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() / channels
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    scale = 255 if images.dtype == torch.uint8 else 1
    return (mean / scale).tolist(), torch.where(std > 1e-9, std / scale, 1.0).tolist()


def _digest(splits: dict[str, Split], classes: list[str]) -> str:
    sha256 = hashlib.sha256(json.dumps(classes).encode())
    for name, split in splits.items():
        sha256.update(f"{name} {split.images.dtype} {list(split.images.shape)}".encode())
        heads = sorted(split.targets)
        sha256.update(json.dumps(heads).encode() if heads else b"")
        for tensor in (split.images, split.labels, *(split.targets[head] for head in heads)):
            sha256.update(tensor.contiguous().numpy().data)
    return sha256.hexdigest()
