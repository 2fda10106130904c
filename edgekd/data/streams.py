"""More rows for every batch: an unlabelled pool, or further data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..errors import EdgekdError, Problem, RecipeError, UsageError
from ..recipe import Component, DataSpec
from .augment import Augmentation
from .dataset import load
from .loader import batches
from .source import Dataset

__all__ = ["Mixed", "Stream", "Unlabelled", "forget_streams", "joined", "loaded", "open_stream"]

#: A network is trained with one normalisation, that of the main data, and every batch is augmented alike.
OF_ALL = ("augment", "normalize")


class Unlabelled(Component):
    """Images whose labels, if there are any, are not looked at: only teachers' objectives use them."""

    batch: int = Field(128, gt=0, description="rows beside each labelled batch")
    threshold: float = Field(
        0.0, ge=0, lt=1, description="rows count where the teacher's largest probability reaches this (FixMatch 2020)"
    )


class Mixed(Component):
    """A further labelled data set, of the same classes or for a head of its own."""

    batch: int = Field(64, gt=0, description="rows beside each batch of the main data: its weight in the mix")
    on: str = Field("logits", description="the head that its labels are for")


@dataclass(frozen=True)
class Stream:
    """A data set that adds `batch` rows to every step. `number` tells its rows from others', the main data's are 0;
    `offset` is added to its rows' `index`."""

    data: Dataset
    batch: int
    number: int
    offset: int
    head: str = "logits"
    labelled: bool = True
    threshold: float = 0.0


def loaded(spec: Unlabelled | Mixed) -> Dataset:
    """A stream's data set, read once until `forget_streams`. Raises UsageError or RecipeError."""
    table = {"use": spec.use, "validation": 0, **spec.args}
    return _loaded(DataSpec.model_validate(table).model_dump_json(), isinstance(spec, Mixed))


@cache
def _loaded(text: str, labelled: bool) -> Dataset:
    return load(DataSpec.model_validate_json(text), 0, labelled)


def forget_streams() -> None:
    """Read streams anew from here on: their files may have changed."""
    _loaded.cache_clear()


def open_stream(spec: Unlabelled | Mixed, main: Dataset, number: int, offset: int, where: str) -> Stream:
    """The stream of a recipe entry. Raises UsageError or RecipeError: what cannot be loaded, images of another size,
    images of the test split (or labelled ones of the validation split), other classes on the same head, and what is
    said of the main data for all."""
    common = [
        Problem(f"{where}.{key}", "is that of the main data", f"data.{key}") for key in OF_ALL if key in spec.args
    ]
    if common:
        raise RecipeError(common)
    try:
        data = loaded(spec)
    except EdgekdError as error:
        raise RecipeError([_within(problem, where) for problem in error.problems]) from error
    if data.size != main.size or data.train.images.dtype != main.train.images.dtype:
        sizes = " and ".join("x".join(map(str, d.size)) + f" {d.train.images.dtype}" for d in (data, main))
        raise UsageError(f"images differ from the main data's: {sizes}", where=where, hint="resize one of them")
    shared = _shared(data.train.images, main.test.images)
    if shared:
        raise UsageError(
            f"{shared} of its images are in the test split",
            where=where,
            hint="take them out: figures would mean nothing",
        )
    held_out = _shared(data.train.images, main.validation.images) if isinstance(spec, Mixed) else 0
    if held_out:
        what = f"{held_out} of its images are in the validation split, by which weights are chosen"
        raise UsageError(what, where=where, hint="take them out, or bring a validation split of your own")
    classes = data.classes
    data = replace(data, mean=main.mean, std=main.std)
    if isinstance(spec, Unlabelled):
        return Stream(data, spec.batch, number, offset, labelled=False, threshold=spec.threshold)
    if spec.on == "logits" and classes != main.classes:
        what = f"has {len(classes)} classes ({', '.join(classes[:3])}, ...), the main data other ones"
        raise UsageError(what, where=where, hint='give it a head of its own: on = "NAME"')
    return Stream(data, spec.batch, number, offset, head=spec.on)


def _within(problem: Problem, where: str) -> Problem:
    """A problem of a stream's data at the stream's own place: `data.root` is `stage[0].unlabelled.root`."""
    own = problem.where
    place = where + own.removeprefix("data") if own.startswith("data") else f"{where} ({own})" if own else where
    return Problem(place, problem.what, problem.hint)


def _shared(images: Tensor, test: Tensor) -> int:
    """How many images are also in the test split, pixel by pixel."""
    seen = {image.numpy().tobytes() for image in test}
    return sum(image.numpy().tobytes() in seen for image in images)


def joined(
    main: Iterator[dict[str, Any]],
    streams: Sequence[Stream],
    *,
    at: int,
    seed: int,
    augment: Sequence[Augmentation],
    share: tuple[int, int],
) -> Iterator[dict[str, Any]]:
    """The main batches with every stream's rows behind them, from step `at` of the whole training on.

    Further keys: `source` int64 [N] (the stream's number), `of` {head: which rows its objectives look at}, `labels`
    {head: labels} for other heads than `logits`, `threshold` [N] for teachers' confidence.
    """
    others = [_endless(stream, at, seed, augment, share) for stream in streams]
    for batch in main:
        yield _concatenated([batch, *(next(other) for other in others)], streams)


def _endless(
    stream: Stream, at: int, seed: int, augment: Sequence[Augmentation], share: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    data = stream.data
    batch = min(stream.batch * share[1], len(data.train))
    steps = len(data.train) // batch
    epoch, start = divmod(at, steps)
    while True:
        yield from batches(
            data.train,
            batch=batch,
            mean=data.mean,
            std=data.std,
            seed=seed + 7919 * stream.number,  # another order than the main data's
            epoch=epoch,
            augment=augment,
            classes=len(data.classes),
            start=start,
            drop_last=True,
            channels_last=True,
            share=share,
        )
        epoch, start = epoch + 1, 0


def _concatenated(parts: list[dict[str, Any]], streams: Sequence[Stream]) -> dict[str, Any]:
    counts = [len(p["label"]) for p in parts]
    own_heads = {*parts[0].get("labels", {}), "logits"}

    def labels_of(position: int, head: str) -> Tensor:
        part, nothing = parts[position], torch.full((counts[position],), -1)
        if position == 0:
            return part["label"] if head == "logits" else part.get("labels", {}).get(head, nothing)
        stream = streams[position - 1]
        return part["label"] if stream.labelled and stream.head == head else nothing

    def target_of(position: int) -> Tensor:
        # A pool, or what is for another head, may have been mixed among other classes.
        ours = position == 0 or (streams[position - 1].labelled and streams[position - 1].head == "logits")
        main: Tensor = parts[0]["target"]
        return parts[position]["target"] if ours else main.new_zeros(counts[position], main.shape[1])

    def looks(position: int, head: str) -> bool:
        return head in own_heads if position == 0 else streams[position - 1].head == head

    def rows(values: Sequence[Any]) -> Tensor:
        return torch.cat([torch.full((count,), value) for count, value in zip(counts, values, strict=True)])

    def labelled(head: str) -> Tensor:
        return torch.cat([labels_of(i, head) for i in range(len(parts))])

    heads = list(dict.fromkeys([*own_heads, *(s.head for s in streams)]))
    offsets = [0, *(s.offset for s in streams)]
    made: dict[str, Any] = {
        "image": torch.cat([p["image"] for p in parts]).contiguous(memory_format=torch.channels_last),
        "label": labelled("logits"),
        "labels": {head: labelled(head) for head in heads if head != "logits"},
        "index": torch.cat([p["index"] + offset for p, offset in zip(parts, offsets, strict=True)]),
        "source": rows([0, *(s.number for s in streams)]),
        "threshold": rows([0.0, *(s.threshold for s in streams)]),
        "of": {head: rows([looks(i, head) for i in range(len(parts))]) for head in heads},
        "view": parts[0]["view"],
    }
    if "target" in parts[0]:
        made["target"] = torch.cat([target_of(i) for i in range(len(parts))])
    return made
