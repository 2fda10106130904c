"""edgekd's training step against a bare PyTorch loop that does the same arithmetic.

    python benchmarks/training_step.py

Both train the same ResNet-20 with the same online ResNet-56, loss, precision, memory format, threads and batches
(edgekd's own loader in both), alternating in one process; the ratio is taken round by round. Every block is a whole
training of its own (`edgekd.train.fit` over one short epoch), so what is compared is everything that the one training
loop adds: Accelerate, schedule, checks, metrics, events, and even its beginning and its last checkpoint.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from blocks import OBJECTIVES, SEED, by_hand, in_turn, network, noise, options_of, parsed, ratio, spread, watched
from torch import nn

from edgekd.data import Dataset
from edgekd.learner import Learner
from edgekd.precision import keep_freed_memory
from edgekd.recipe import Component, Training
from edgekd.tasks import make_task
from edgekd.train import Job, fit


def ours(student: nn.Module, teacher: nn.Module, data: Dataset, batch: int) -> Iterator[None]:
    """Whole trainings of one epoch: the first of an epoch's steps does it all, the others nothing."""
    settings = Training(epochs=1, lr=0.01, checkpoint_s=1e9)
    while True:
        pair = copy.deepcopy((student, teacher))
        learner = Learner.of(pair[0], objectives=OBJECTIVES, teacher=pair[1], example=torch.zeros(2, *data.size))
        with tempfile.TemporaryDirectory() as scratch:
            task = make_task(Component(use="classification"))
            fit(learner, Job("bench", data, task, settings, batch, [], SEED, Path(scratch)))
        yield from itertools.repeat(None, len(data.train) // batch)


def bare(student: nn.Module, teacher: nn.Module, data: Dataset, batch: int) -> Iterator[None]:
    """The same trainings by hand."""
    while True:
        yield from itertools.islice(by_hand(*copy.deepcopy((student, teacher)), data, batch), len(data.train) // batch)


def main() -> None:
    options = parsed(options_of(__doc__, rounds=16, count=20, out="training_step.json"))
    keep_freed_memory()  # for both: it belongs to the process
    write = watched()
    torch.manual_seed(SEED)
    pair = network(20), network(56)
    data = noise(options.steps * options.batch)
    contenders = {"edgekd": ours(*pair, data, options.batch), "bare": bare(*pair, data, options.batch)}
    taken = in_turn(contenders, options.rounds, options.steps)
    document = {
        "student": "ResNet-20",
        "teacher": "ResNet-56",
        "edgekd_over_bare": {**ratio(taken, "edgekd", "bare"), "target": 1.03},
        "ms_per_step": spread(taken),
    }
    write(options, document)


if __name__ == "__main__":
    main()
