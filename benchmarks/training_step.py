"""edgekd's training step against a bare PyTorch loop that does the same arithmetic.

    python benchmarks/training_step.py --out benchmarks/results/training_step.json

Both train the same student with the same teacher, loss, precision, memory format, threads and batches (edgekd's own
loader in both), alternating in one process; the ratio is taken pair by pair. What is compared is everything that the
one training loop adds: Accelerate, schedule, checks, metrics, events.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgekd.artifact import ModelSpec, write_atomically
from edgekd.bench import environment, paired_ratio
from edgekd.data import Dataset, Split, batches
from edgekd.learner import Learner
from edgekd.models import build
from edgekd.precision import autocast, keep_freed_memory
from edgekd.recipe import Component, Training
from edgekd.tasks import make_task
from edgekd.train import Job, fit

OBJECTIVES = [{"use": "ce", "weight": 0.1}, {"use": "kl", "weight": 0.9, "tau": 4.0}]


def network(depth: int) -> nn.Module:
    return build(ModelSpec(use="cifar-resnet", args={"depth": depth, "num_classes": 10, "in_channels": 3}))


def bare(student: nn.Module, teacher: nn.Module, data: Dataset, settings: Training, batch: int) -> None:
    student = student.to(memory_format=torch.channels_last).train()
    teacher = teacher.to(memory_format=torch.channels_last).eval()
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=True)
    stream = batches(
        data.train, batch=batch, mean=data.mean, std=data.std, seed=0, epoch=0, drop_last=True, channels_last=True
    )
    for b in stream:
        with autocast(settings):
            logits = student(b["image"])
            with torch.no_grad():
                target = teacher(b["image"])
        logits, target = logits.float(), target.float()
        log_q, log_p = F.log_softmax(logits / 4.0, dim=1), F.log_softmax(target / 4.0, dim=1)
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * 16.0
        loss = 0.1 * F.cross_entropy(logits, b["label"]) + 0.9 * soft
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def ours(student: nn.Module, teacher: nn.Module, data: Dataset, settings: Training, batch: int, at: Path) -> None:
    example = torch.zeros(2, *data.size)
    learner = Learner.of(student, objectives=OBJECTIVES, teacher=teacher, example=example)
    fit(learner, Job("bench", data, make_task(Component(use="classification")), settings, batch, [], 0, at))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keep_freed_memory()  # for both: it belongs to the process
    torch.manual_seed(0)
    images = torch.randint(0, 256, (options.steps * options.batch, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (len(images),)))
    none = Split(images[:0], split.labels[:0])
    data = Dataset(split, none, none, [str(i) for i in range(10)], [0.5] * 3, [0.25] * 3, "synthetic")
    settings = Training(epochs=1, lr=0.01, checkpoint_s=1e9)
    student, teacher = network(20), network(56)
    taken: dict[str, list[list[float]]] = {"edgekd": [], "bare": []}
    for pair in range(options.pairs + 1):
        for name in ("edgekd", "bare") if pair % 2 else ("bare", "edgekd"):
            copies = copy.deepcopy(student), copy.deepcopy(teacher)
            with tempfile.TemporaryDirectory() as scratch:
                start = time.perf_counter()
                if name == "edgekd":
                    ours(*copies, data, settings, options.batch, Path(scratch))
                else:
                    bare(*copies, data, settings, options.batch)
                seconds = time.perf_counter() - start
            if pair:  # the first pair warms up
                taken[name].append([seconds / options.steps * 1000])
        if pair:
            print(
                f"pair {pair}: edgekd {taken['edgekd'][-1][0]:.1f} ms, bare {taken['bare'][-1][0]:.1f} ms", flush=True
            )
    ratios = [e[0] / b[0] for e, b in zip(taken["edgekd"], taken["bare"], strict=True)]
    interval = paired_ratio([e[0] for e in taken["edgekd"]], [b[0] for b in taken["bare"]])
    document = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "batch": options.batch,
        "steps_per_block": options.steps,
        "ms_per_step": {name: [round(r[0], 2) for r in rows] for name, rows in taken.items()},
        "ratio_median_of_pairs": round(float(np.median(ratios)), 4),
        "ratio_interval": [round(interval.low, 4), round(interval.high, 4)],
        "target": 1.03,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    print(f"edgekd / bare: {document['ratio_median_of_pairs']} {document['ratio_interval']}")


if __name__ == "__main__":
    main()
