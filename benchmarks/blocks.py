"""What the benchmarks of training have in common: blocks of steps, taken in turn within one process."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.artifact import ModelSpec, write_atomically
from edgekd.bench import disturbances, environment, others_busy, paired_ratio
from edgekd.data import Dataset, Split, batches
from edgekd.learner import Learner
from edgekd.models import build
from edgekd.precision import autocast
from edgekd.recipe import Component, Training
from edgekd.tasks import make_task
from edgekd.train import Job, _Run

SEED = 0
OBJECTIVES = [{"use": "ce", "weight": 0.1}, {"use": "kl", "weight": 0.9, "tau": 4.0}]
#: A training that goes on for as long as it is watched.
ENDLESS = Training(epochs=1_000_000, lr=0.01, warmup=0.0, schedule="constant", checkpoint_s=1e9)


def network(depth: int) -> nn.Module:
    """A ResNet for CIFAR-10 with fresh weights."""
    return build(ModelSpec(use="cifar-resnet", args={"depth": depth, "num_classes": 10, "in_channels": 3}))


def noise(images: int) -> Dataset:
    """Random images of CIFAR-10's size: what a step takes does not depend on what it shows."""
    drawn = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=drawn)
    split = Split(pixels, torch.randint(0, 10, (images,), generator=drawn))
    none = Split(pixels[:0], split.labels[:0])
    return Dataset(split, none, none, [str(i) for i in range(10)], [0.5] * 3, [0.25] * 3, "synthetic")


def steps(
    learner: Learner, data: Dataset, batch: int, augment: Sequence[Any] = (), settings: Training = ENDLESS
) -> Iterator[None]:
    """Every `next` is one step of edgekd's training loop, without end: batch, losses, optimizers, checks, events.

    What happens once per epoch (validation, checkpoint) is left out, since it costs every contender the same. The
    loop's own methods are called, not a copy of them: hence the private names.
    """
    task = make_task(Component(use="classification"))
    run = _Run(learner, Job("bench", data, task, settings, batch, augment, SEED, Path("unused")))
    learner.train()
    while True:
        began = time.monotonic()
        for shown in run._batches():
            run._step(shown)
            run.state.step += 1
            run._tell(began, 0, 0.0)
            yield
        run.state.epoch, run.state.step, run.state.sums = run.state.epoch + 1, 0, {}


def loss_of(logits: Tensor, taught: Tensor, label: Tensor) -> Tensor:
    """OBJECTIVES, written down by hand: logits [N, K] of student and teacher, labels [N] -> scalar."""
    log_q, log_p = F.log_softmax(logits / 4.0, dim=1), F.log_softmax(taught / 4.0, dim=1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * 16.0
    return 0.1 * F.cross_entropy(logits, label) + 0.9 * soft


def by_hand(student: nn.Module, teacher: nn.Module, data: Dataset, batch: int) -> Iterator[None]:
    """The same training as a bare PyTorch loop, with edgekd's loader; every `next` is a step, without end."""
    student = student.to(memory_format=torch.channels_last).train()
    teacher = teacher.to(memory_format=torch.channels_last).eval()
    optimizer = sgd(student.parameters(), lr=ENDLESS.lr)
    for shown in shuffled(data, batch):
        with autocast(ENDLESS):
            logits = student(shown["image"])
            with torch.no_grad():
                taught = teacher(shown["image"])
        loss = loss_of(logits.float(), taught.float(), shown["label"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield


def shuffled(data: Dataset, batch: int) -> Iterator[dict[str, Any]]:
    """The batches that the loop shows without augmentation, epoch after epoch, without end."""
    for epoch in itertools.count():
        yield from batches(
            data.train,
            batch=batch,
            mean=data.mean,
            std=data.std,
            seed=SEED,
            epoch=epoch,
            drop_last=True,
            channels_last=True,
        )


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.SGD:
    """What `Training` asks for: Nesterov, weight decay on matrices and kernels only."""
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": ENDLESS.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=ENDLESS.momentum, nesterov=True)


def in_turn(contenders: Mapping[str, Iterator[Any]], rounds: int, count: int) -> dict[str, list[float]]:
    """Milliseconds per step of each contender, round by round: a block of `count` steps each, in changing order.

    A first round, which is not counted, warms up.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in _order(list(contenders), number):
            start = time.perf_counter()
            for _ in itertools.islice(contenders[name], count):
                pass
            if number:
                taken[name].append((time.perf_counter() - start) / count * 1000)
        if number:
            print(f"round {number}: " + ", ".join(f"{n} {t[-1]:.1f} ms" for n, t in taken.items()), flush=True)
    return taken


def _order(names: list[str], number: int) -> list[str]:
    """Everyone is first, and before everyone else, equally often."""
    turned = names[number % len(names) :] + names[: number % len(names)]
    return turned if (number // len(names)) % 2 == 0 else turned[::-1]


def ratio(taken: Mapping[str, Sequence[float]], name: str, base: str) -> dict[str, Any]:
    """How many times as long a step of `name` takes as one of `base`: the median over rounds, and its 95 % interval."""
    found = paired_ratio(taken[name], taken[base])
    print(f"{name} / {base}: {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]")
    return {"value": round(found.value, 4), "interval": [round(found.low, 4), round(found.high, 4)]}


def spread(taken: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Of each contender: all rounds, their median, and (largest - smallest) / median."""
    return {
        name: {
            "median": round(statistics.median(rounds), 2),
            "spread": round((max(rounds) - min(rounds)) / statistics.median(rounds), 4),
            "rounds": [round(r, 2) for r in rounds],
        }
        for name, rounds in taken.items()
    }


def options_of(text: str | None, *, rounds: int, count: int, out: str) -> argparse.ArgumentParser:
    """The options that all of them take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=count, help="of each contender per round")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--quick", action="store_const", const=2, help="2 rounds of 2 steps: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / out)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, after `--quick` has had its say."""
    options = parser.parse_args()
    options.rounds, options.steps = options.quick or options.rounds, options.quick or options.steps
    return options


def watched() -> Callable[[argparse.Namespace, dict[str, Any]], None]:
    """Begin to watch the machine; the function writes the document with what it was and who else used it."""
    before, others = environment(), others_busy()
    print(*disturbances(before), sep="\n")

    def write(options: argparse.Namespace, document: dict[str, Any]) -> None:
        busy = others()
        whole = {
            "command": " ".join(["python", *sys.argv]),
            "environment": before,
            "others_busy_cores": None if busy is None else round(busy, 2),
            "threads": torch.get_num_threads(),
            "seed": SEED,
            "batch": options.batch,
            "rounds": options.rounds,
            "steps_per_block": options.steps,
            **document,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(whole, indent=1) + "\n")

    return write
