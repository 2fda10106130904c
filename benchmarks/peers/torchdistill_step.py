"""edgekd's training step against torchdistill's `DistillationBox` and against a bare PyTorch loop.

    python -m venv .venv-peers
    .venv-peers/bin/python -m pip install -c constraints.txt torch==2.13.0
    .venv-peers/bin/python -m pip install -c constraints.txt -e .
    .venv-peers/bin/python -m pip install --no-deps torchvision==0.28.0 torchdistill==1.1.5
    .venv-peers/bin/python benchmarks/peers/torchdistill_step.py

torchdistill is no dependency of edgekd: it belongs into an environment of its own. It imports torchvision, which does
not import beside a torch without its operators (`operator torchvision::nms does not exist`, as beside the CPU build);
its two operators of that kind are then declared here, which nothing calls.

All three train the same ResNet-20 with the same online ResNet-56 in one process: 0.1 `ce` + 0.9 `kl` (tau 4), SGD with
Nesterov momentum, batches of edgekd's loader, channels_last, bfloat16 where the CPU has it. torchdistill has no mixed
precision of its own on a CPU, so its forward process is called within `torch.autocast` and its networks give logits in
float32, as the others' do; the step is otherwise that of torchdistill's image classification example, without its
meters. That the three agree is checked first: the loss of one batch, and the weights after five steps.
"""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import blocks
from blocks import ENDLESS, SEED, shuffled

from edgekd.data import Dataset
from edgekd.learner import Learner
from edgekd.precision import autocast, keep_freed_memory, precision_of

#: How far weights may lie apart after five steps, as a share of how far those moved them.
APART = 0.02


def imported() -> Any:
    """torchdistill's `DistillationBox`, with the optimizer of the others registered for it."""
    try:
        importlib.metadata.version("torchdistill")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"torchdistill is not installed here: see the first lines of {__file__}")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    from torchdistill.core.distillation import DistillationBox
    from torchdistill.optim.registry import register_optimizer

    register_optimizer(blocks.sgd, key="same-sgd")
    return DistillationBox


class Float(nn.Module):
    """A network whose logits are float32 under autocast."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).float()


def boxed(student: nn.Module, teacher: nn.Module) -> Any:
    """Both networks in a `DistillationBox`."""
    logits = {
        f"{who}_module_{key}": value
        for who in ("student", "teacher")
        for key, value in (("path", "."), ("io", "output"))
    }
    kd = {
        "key": "KDLoss",
        "kwargs": {**logits, "temperature": 4.0, "alpha": 0.1, "beta": 0.9, "reduction": "batchmean"},
    }
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "same-sgd", "kwargs": {"lr": ENDLESS.lr}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }
    inside = [Float(n.to(memory_format=torch.channels_last)) for n in (teacher.eval(), student)]
    made = imported()(*inside, {}, config, torch.device("cpu"), None, False, 1)
    made.pre_epoch_process(epoch=0)
    return made


def in_a_box(student: nn.Module, teacher: nn.Module, data: Dataset, batch: int) -> Iterator[None]:
    """The training by torchdistill; every `next` is a step, without end."""
    box = boxed(student, teacher)
    for shown in shuffled(data, batch):
        with autocast(ENDLESS):
            loss = box.forward_process(shown["image"], shown["label"], {})
        box.post_forward_process(loss=loss)
        loss.item()
        if torch.isnan(loss) or torch.isinf(loss):
            raise ValueError(f"loss = {loss}")
        yield


def ours(student: nn.Module, teacher: nn.Module, data: Dataset, batch: int) -> Iterator[None]:
    """The training by edgekd; every `next` is a step, without end."""
    return blocks.steps(learner_of(student, teacher, data), data, batch)


def learner_of(student: nn.Module, teacher: nn.Module, data: Dataset) -> Learner:
    return Learner.of(student, objectives=blocks.OBJECTIVES, teacher=teacher, example=torch.zeros(2, *data.size))


def losses(student: nn.Module, teacher: nn.Module, data: Dataset, batch: int) -> dict[str, float]:
    """What each makes of the first batch, in float32: in bf16 edgekd's teacher, whose batch norms are folded, rounds
    otherwise. Ends the program when they differ."""
    shown = next(shuffled(data, batch))
    pairs = [copy.deepcopy((student, teacher)) for _ in range(3)]
    learner = learner_of(*pairs[0], data).to(memory_format=torch.channels_last).train()
    box = boxed(*pairs[1])
    inside = [n.to(memory_format=torch.channels_last) for n in pairs[2]]
    found = {
        "edgekd": learner(shown)["loss"].item(),
        "torchdistill": box.forward_process(shown["image"], shown["label"], {}).item(),
    }
    answers = [n.train(n is inside[0])(shown["image"]).float() for n in inside]
    found["bare"] = blocks.loss_of(*answers, shown["label"]).item()
    if max(found.values()) - min(found.values()) > 1e-4 * found["bare"]:
        sys.exit(f"the three losses differ: {found}")
    return found


def apart(contenders: dict[str, Callable[..., Iterator[None]]], student: nn.Module, *more: Any) -> dict[str, float]:
    """How far the weights after five steps lie from the bare loop's, as a share of how far that moved them.

    Ends the program when that is much: then they do not train alike.
    """
    ends = {}
    for name, begin in contenders.items():
        trained = copy.deepcopy(student)
        for _ in itertools.islice(begin(trained, *copy.deepcopy(more[:1]), *more[1:]), 5):
            pass
        ends[name] = torch.cat([p.detach().flatten() for p in trained.parameters()])
    start = torch.cat([p.detach().flatten() for p in student.parameters()])
    moved = (ends["bare"] - start).norm()
    found = {name: float((end - ends["bare"]).norm() / moved) for name, end in ends.items() if name != "bare"}
    if max(found.values()) > APART:
        sys.exit(f"the trainings differ: {found}")
    return found


def main() -> None:
    options = blocks.parsed(blocks.options_of(__doc__, rounds=18, count=20, out="torchdistill_step.json"))
    imported()
    keep_freed_memory()  # for all: it belongs to the process
    write = blocks.watched()
    data = blocks.noise(20 * options.batch)
    torch.manual_seed(SEED)
    student, teacher = blocks.network(20), blocks.network(56)
    how = {"edgekd": ours, "torchdistill": in_a_box, "bare": blocks.by_hand}
    agreed = losses(student, teacher, data, options.batch)
    difference = apart(how, student, teacher, data, options.batch)
    print(f"losses {agreed}, weights after five steps apart by {difference}")
    contenders = {n: begin(*copy.deepcopy((student, teacher)), data, options.batch) for n, begin in how.items()}
    taken = blocks.in_turn(contenders, options.rounds, options.steps)
    versions = {name: importlib.metadata.version(name) for name in ("torchdistill", "torchvision", "accelerate")}
    document = {
        "versions": versions,
        "precision": precision_of(ENDLESS),
        "student": "ResNet-20",
        "teacher": "ResNet-56",
        "edgekd_over_bare": {**blocks.ratio(taken, "edgekd", "bare"), "target": 1.03},
        "edgekd_over_torchdistill": {**blocks.ratio(taken, "edgekd", "torchdistill"), "target": 1.0},
        "torchdistill_over_bare": blocks.ratio(taken, "torchdistill", "bare"),
        "loss_of_one_batch": agreed,
        "weights_apart_after_5_steps": {name: round(value, 6) for name, value in difference.items()},
        "ms_per_step": blocks.spread(taken),
    }
    write(options, document)


if __name__ == "__main__":
    main()
