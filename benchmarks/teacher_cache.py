"""What a teacher costs: not at all (labels alone), from the cache, and online.

    python benchmarks/teacher_cache.py --data data --teacher data/resnet56.th

A ResNet-20 on CIFAR-10 in edgekd's training loop, three times in one process: on labels, on labels and `kl` with
`source = "cached"`, and with `source = "frozen"`, a trained ResNet-56. The three see the same batches and load and
augment (crop, flip) each their own, since an epoch includes that. They take turns by blocks of steps; ratios are taken
round by round. The cache is built beforehand for one view of all 50,000 images: its time and its size are told.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from blocks import OBJECTIVES, SEED, in_turn, network, options_of, parsed, ratio, spread, steps, watched
from torch import nn

from edgekd.data import Dataset, augmentations, batches, load
from edgekd.learner import Learner
from edgekd.models import load_weights, outputs
from edgekd.precision import autocast, keep_freed_memory
from edgekd.recipe import Component, DataSpec, Training
from edgekd.teachers import source_of
from edgekd.teachers.cached import cache_bytes

#: The views per image that `source = "cached"` keeps by default.
VIEWS = 8


def learner_of(student: nn.Module, teacher: nn.Module, data: Dataset, source: Component | None) -> Learner:
    """A copy of the student, taught by labels alone where there is no source."""
    example = torch.zeros(2, *data.size)
    if source is None:
        return Learner.of(copy.deepcopy(student), objectives=["ce"], example=example)
    return Learner.of(
        copy.deepcopy(student),
        objectives=OBJECTIVES,
        teacher=copy.deepcopy(teacher),
        example=example,
        source=source_of(source, "source"),
        images=len(data.train),
    )


def built(learner: Learner, data: Dataset, augment: Any, batch: int, directory: Path) -> dict[str, Any]:
    """Fill the learner's cache as a run does, and tell what that took."""

    def stream(view: int) -> Iterator[dict[str, Any]]:
        return batches(
            data.train,
            batch=batch,
            mean=data.mean,
            std=data.std,
            seed=SEED,
            epoch=0,
            view=view,
            augment=augment,
            shuffle=False,
            channels_last=True,
        )

    images = len(data.train)
    start = time.perf_counter()
    with autocast(Training()):
        learner.source.to(memory_format=torch.channels_last)
        learner.source.fill(directory, stream, images, lambda done, total: None, {"benchmark": "one view"})
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in directory.iterdir())
    return {
        "images": images,
        "build_s_per_view": round(seconds, 1),
        "build_images_per_s": round(images / seconds, 1),
        "bytes_on_disk_per_view": size,
        f"bytes_of_{VIEWS}_views": cache_bytes(images, len(data.classes), VIEWS, None),
    }


def disagreement(learner: Learner, teacher: nn.Module, data: Dataset, augment: Any, batch: int) -> float:
    """The largest distance between what the cache says to a shuffled batch and what the teacher says, over the
    largest logit: that what is timed also teaches."""
    shown = next(
        batches(
            data.train,
            batch=batch,
            mean=data.mean,
            std=data.std,
            seed=SEED,
            epoch=3,
            view=0,
            augment=augment,
            channels_last=True,
        )
    )
    with torch.no_grad(), autocast(Training()):
        live = outputs(teacher(shown["image"]))["logits"].float()
        kept = learner.source(shown, [{}])[0]["logits"].float()
    return float((live - kept).abs().max() / live.abs().max())


def main() -> None:
    parser = options_of(__doc__, rounds=16, count=20, out="teacher_cache.json")
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds cifar-10-batches-bin")
    parser.add_argument("--teacher", type=Path, default=Path("data/resnet56.th"))
    options = parsed(parser)
    keep_freed_memory()
    write = watched()
    spec = DataSpec.model_validate(
        {"use": "cifar10", "root": str(options.data), "augment": ["crop-flip"], "validation": 0.0}
        | {"normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    )
    data, augment = load(spec, SEED), augmentations(spec)
    torch.manual_seed(SEED)
    student, teacher = network(20), network(56).to(memory_format=torch.channels_last).eval()
    load_weights(teacher, options.teacher)
    learners = {
        "labels": learner_of(student, teacher, data, None),
        "cached": learner_of(student, teacher, data, Component(use="cached", views=1)),
        "online": learner_of(student, teacher, data, Component(use="frozen")),
    }
    with tempfile.TemporaryDirectory() as scratch:
        cache = built(learners["cached"], data, augment, options.batch, Path(scratch) / "cache")
        print(cache)
        apart = disagreement(learners["cached"], teacher, data, augment, options.batch)
        contenders = {name: steps(learner, data, options.batch, augment) for name, learner in learners.items()}
        taken = in_turn(contenders, options.rounds, options.steps)
    median = {name: statistics.median(rounds) for name, rounds in taken.items()}
    epoch_s = {name: ms * (len(data.train) // options.batch) / 1000 for name, ms in median.items()}
    document = {
        "student": "ResNet-20",
        "teacher": "ResNet-56",
        "cached_over_labels": {**ratio(taken, "cached", "labels"), "target": 1.08},
        "online_over_labels": ratio(taken, "online", "labels"),
        "cached_over_online": ratio(taken, "cached", "online"),
        "images_per_s": {name: round(options.batch / ms * 1000, 1) for name, ms in median.items()},
        "epoch_s": {name: round(s, 1) for name, s in epoch_s.items()},
        "cache": {
            **cache,
            "largest_difference_to_the_teacher": round(apart, 5),
            "epochs_that_pay_for_a_view": round(cache["build_s_per_view"] / (epoch_s["online"] - epoch_s["cached"]), 2),
        },
        "ms_per_step": spread(taken),
    }
    write(options, document)


if __name__ == "__main__":
    main()
