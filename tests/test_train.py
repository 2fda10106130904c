"""The training loop: against a loop written by hand, its choices, and that an interruption changes no bit."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd import checkpoint as checkpoints
from edgekd.data import Dataset, Split, augmentations, batches
from edgekd.errors import StageError, UsageError
from edgekd.learner import Learner
from edgekd.models.cifar_resnet import cifar_resnet
from edgekd.optim import learning_rate
from edgekd.precision import autocast, precision_of
from edgekd.recipe import DataSpec, Training
from edgekd.tasks import Classification
from edgekd.train import Fit, Job, predict
from edgekd.train import fit as fit_all

HINT = {"use": "hint", "student": "body", "teacher": "body"}
TAUGHT = ["ce", {"use": "kl", "tau": 2.0}, HINT]


def fit(made: Learner, task: Job) -> Fit:
    """The only student's result."""
    [done] = fit_all(made, task)
    return done


SPEEDS = ("images_per_s", "loader_images_per_s")


class Small(nn.Module):
    """Batch norm and dropout, which both make a step depend on more than the weights."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.drop(self.body(image).flatten(1)))


@cache
def data(images: int = 200, held_out: int = 100) -> Dataset:
    """Real digits [1, 8, 8]: the first `images` for training, the following ones for validation."""
    x, y = load_digits(return_X_y=True)
    pixels = torch.from_numpy(x * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(y).long()
    parts = [slice(0, images), slice(images, images + held_out), slice(-100, None)]
    splits = [Split(pixels[part], labels[part]) for part in parts]
    return Dataset(*splits, classes=[str(d) for d in range(10)], mean=[0.3], std=[0.35], fingerprint="digits")


def learner(objectives: list[Any] | None = None, seed: int = 0, student: Callable[[], nn.Module] = Small) -> Learner:
    """A student with fresh weights by `seed`, and a teacher that is the same each time."""
    torch.manual_seed(1)
    teacher = Small(8)
    torch.manual_seed(seed)
    example = torch.zeros(2, 1, 8, 8)
    return Learner.of(student(), objectives=objectives or ["ce"], teacher=teacher, example=example)


def job(directory: Path, dataset: Dataset | None = None, augment: tuple[str, ...] = (), **settings: Any) -> Job:
    defaults: dict[str, Any] = {"epochs": 2, "lr": 0.1, "precision": "fp32", "checkpoint_s": 0.0}
    extra = {key: settings.pop(key) for key in ("emit", "on_epoch", "batch", "seed") if key in settings}
    spec = DataSpec.model_validate({"use": "digits", "augment": [{"use": name} for name in augment]})
    return Job(
        name="distill",
        data=dataset or data(),
        task=Classification(),
        settings=Training(**{**defaults, **settings}),
        augment=augmentations(spec),
        directory=directory,
        **{"batch": 32, "seed": 0, **extra},
    )


class Interrupted(Exception):
    pass


def stop_after(module: nn.Module, steps: int) -> None:
    """Let the training forward pass number `steps` + 1 raise."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        if count == steps:
            raise Interrupted
        count += 1

    module.register_forward_pre_hook(hook)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def without_speeds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in history]


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# Against a loop of one's own


def by_hand(made: Learner, settings: Training, dataset: Dataset, batch: int) -> list[float]:
    """The same training in plain PyTorch; returns the loss of every step."""
    matrices = [p for p in made.parameters() if p.ndim > 1]
    vectors = [p for p in made.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=1.0)
        if settings.optimizer == "adamw"
        else torch.optim.SGD(groups, lr=1.0, momentum=settings.momentum, nesterov=True)
    )
    steps = len(dataset.train) // batch
    made.train()
    losses = []
    for epoch in range(settings.epochs):
        stream = batches(
            dataset.train, batch=batch, mean=dataset.mean, std=dataset.std, seed=0, epoch=epoch, drop_last=True
        )
        for step, drawn in enumerate(stream):
            torch.manual_seed(epoch * steps + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, (epoch * steps + step + 0.5) / (settings.epochs * steps))
            optimizer.zero_grad()
            loss = made(drawn)["loss"]
            loss.backward()
            if settings.clip_norm is not None:
                norm = torch.sqrt(sum((p.grad.square().sum() for p in made.parameters()), torch.zeros(())))  # type: ignore[union-attr]
                for p in made.parameters():
                    p.grad *= min(1.0, settings.clip_norm / float(norm))  # type: ignore[operator]
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.1},
        {"lr": 0.1, "schedule": "cosine", "warmup": 0.0, "clip_norm": 0.5},
        {"lr": 0.003, "optimizer": "adamw", "weight_decay": 0.05},
    ],
    ids=["sgd", "clipped", "adamw"],
)
@pytest.mark.parametrize("objectives", [["ce"], TAUGHT], ids=["labels", "taught"])
def test_it_computes_what_a_plain_loop_computes(
    tmp_path: Path, settings: dict[str, Any], objectives: list[Any]
) -> None:
    made, plain = learner(objectives), learner(objectives)
    task = job(tmp_path, keep="last", **settings)
    done = fit(made, task)
    losses = by_hand(plain, task.settings, task.data, task.batch)
    for name, value in plain.state_dict().items():
        assert torch.allclose(made.state_dict()[name], value, rtol=1e-4, atol=1e-5), name
    for epoch, row in enumerate(done.history):
        assert row["loss"] == pytest.approx(np.mean(losses[6 * epoch : 6 * epoch + 6]), rel=1e-4)


def test_a_small_resnet_learns_digits(tmp_path: Path) -> None:
    network = partial(cifar_resnet, depth=8, width=4, in_channels=1)
    done = fit(learner(student=network), job(tmp_path, data(400), epochs=5, lr=0.2))
    losses = [row["loss"] for row in done.history]
    assert losses[-1] < 0.5 * losses[0]
    assert done.metrics["accuracy"] > 0.6


def test_a_student_learns_what_it_is_told_to(tmp_path: Path) -> None:
    """The teacher takes every digit for the next one: its student does so too, that of the labels does not."""
    true = data()
    shifted = Split(true.train.images, (true.train.labels + 1) % 10)
    wrong = Dataset(shifted, true.validation.take(torch.arange(0)), true.test, true.classes, true.mean, true.std, "x")
    teacher = learner(seed=2, student=partial(Small, 8))
    fit(teacher, job(tmp_path / "teacher", wrong, epochs=6))
    agreement = {}
    for name in ("ce", "kl", "mse-logits"):
        torch.manual_seed(0)
        student = Small()
        example = torch.zeros(2, 1, 8, 8)
        made = Learner.of(student, objectives=[name], teacher=teacher.student.network, example=example)
        fit(made, job(tmp_path / name, epochs=6, keep="last"))
        answers = predict(student, true.validation, true, 50).argmax(1)
        agreement[name] = [float((answers == (true.validation.labels.numpy() + d) % 10).mean()) for d in (0, 1)]
    assert agreement["ce"][0] > 0.8
    assert agreement["ce"][1] < 0.1
    for name in ("kl", "mse-logits"):
        assert agreement[name][0] < 0.1
        assert agreement[name][1] > 0.8


# What stays, and when it stops


class Table(nn.Module):
    """A linear classifier whose answers a test can turn around, by the sign of `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.linear = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(image.flatten(1)) * self.scale


def plan(scales: list[float], good: dict[str, Tensor]) -> Callable[[int, Learner], None]:
    """Before each epoch, set the weights: a good network, or with a negative scale a bad one."""

    def set_weights(epoch: int, made: Learner) -> None:
        network = made.student.network
        assert isinstance(network, Table)
        with torch.no_grad():
            network.linear.weight.copy_(good["linear.weight"])
            network.linear.bias.copy_(good["linear.bias"])
            network.scale.fill_(scales[epoch])

    return set_weights


@cache
def good_table() -> dict[str, Tensor]:
    x, y = data().train.images.flatten(1).double() / 255, F.one_hot(data().train.labels, 10).double()
    solved = torch.linalg.lstsq(torch.cat([(x - 0.3) / 0.35, torch.ones(len(x), 1).double()], 1), y, driver="gelsd")
    return {"linear.weight": solved.solution[:-1].T.float(), "linear.bias": solved.solution[-1].float()}


def planned(directory: Path, scales: list[float], **settings: Any) -> tuple[Learner, Fit]:
    made = learner(student=Table)
    steps = plan(scales, good_table())
    defaults = {"epochs": len(scales), "lr": 1e-12, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    return made, fit(made, job(directory, on_epoch=steps, **{**defaults, **settings}))


@pytest.mark.parametrize(("keep", "epoch"), [("best", 1), ("last", 3)])
def test_the_best_or_the_last_weights_remain(tmp_path: Path, keep: str, epoch: int) -> None:
    scales = [-1.0, 2.0, 3.0, -1.0]
    made, done = planned(tmp_path, scales, keep=keep)
    assert made.student.network.scale.item() == pytest.approx(scales[epoch], abs=1e-6)  # type: ignore[union-attr]
    accuracies = [row["val.accuracy"] for row in done.history]
    assert accuracies[1] == accuracies[2] > 0.6  # the first of equals counts
    assert accuracies[3] < 0.05
    logits = predict(made.student, data().validation, data(), 100)
    measured = (logits.argmax(1) == data().validation.labels.numpy()).mean()
    assert done.metrics["accuracy"] == pytest.approx(measured) == pytest.approx(accuracies[epoch])
    exact = F.cross_entropy(torch.tensor(logits).double(), data().validation.labels).item()
    assert done.metrics["loss"] == pytest.approx(exact, rel=1e-5)


def test_patience_counts_epochs_without_a_better_score(tmp_path: Path) -> None:
    _, done = planned(tmp_path, [-1.0, 1.0, -1.0, -1.0, 1.0, 1.0], patience=2)
    assert len(done.history) == 4
    _, patient = planned(tmp_path / "more", [-1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0], patience=3)
    assert len(patient.history) == 6
    _, none = planned(tmp_path / "none", [1.0, -1.0, -1.0, -1.0])
    assert len(none.history) == 4


def test_without_validation_the_last_weights_remain(tmp_path: Path) -> None:
    made, done = learner(), fit(learner(), job(tmp_path, data(200, 0), patience=1))
    assert done.metrics == {}
    assert len(done.history) == 2
    assert "val.accuracy" not in done.history[0]
    last = learner()
    fit(last, job(tmp_path / "last", data(200, 0), keep="last"))
    fit(made, job(tmp_path / "best", data(200, 0), keep="best"))
    assert equal(weights(made), weights(last))


def test_the_averaged_weights_are_the_ones_that_are_judged_and_kept(tmp_path: Path) -> None:
    live: list[dict[str, Tensor]] = []
    plain = learner()
    plain.register_forward_pre_hook(lambda *_: live.append(weights(plain.student.network)))
    fit(plain, job(tmp_path / "plain", keep="last"))
    live.append(weights(plain.student.network))
    made = learner()
    done = fit(made, job(tmp_path / "averaged", keep="last", ema=0.5))
    names = [n for n, v in live[0].items() if v.is_floating_point()]
    expected = {n: live[0][n].double() for n in names}
    for step, state in enumerate(live[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * state[n].double() for n in names}
    for name in names:
        assert torch.allclose(made.student.network.state_dict()[name].double(), expected[name], atol=1e-5), name
    logits = predict(made.student, data().validation, data(), 100)
    assert done.metrics["accuracy"] == (logits.argmax(1) == data().validation.labels.numpy()).mean()
    assert done.metrics["loss"] != pytest.approx(fit(learner(), job(tmp_path / "x", keep="last")).metrics["loss"])


# What is written and told


def test_metrics_have_one_line_per_epoch(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    done = fit(learner(TAUGHT), job(tmp_path, epochs=3, emit=events.append, lr=0.05, warmup=0.5))
    assert lines(tmp_path) == done.history
    assert [row["epoch"] for row in done.history] == [0, 1, 2]
    keys = ["epoch", "loss", "loss.ce", "loss.kl", "loss.hint", "lr", *SPEEDS, "val.accuracy", "val.loss", "val.ece"]
    assert list(done.history[0]) == keys
    for row in done.history:
        assert row["loss"] == pytest.approx(row["loss.ce"] + row["loss.kl"] + row["loss.hint"], rel=1e-5)
        assert row["images_per_s"] > 0
    rates = [learning_rate(Training(lr=0.05, warmup=0.5), (6 * e + 5.5) / 18) for e in range(3)]
    assert [row["lr"] for row in done.history] == pytest.approx(rates)
    assert rates[-1] > 0
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [event["val.accuracy"] for event in epochs] == [row["val.accuracy"] for row in done.history]
    last = [event for event in events if event["event"] == "step"][-1]
    assert (last["done"], last["total"], last["epoch"], last["epochs"]) == (18, 18, 2, 3)
    assert last["loss"]["kl"] == done.history[-1]["loss.kl"]


def test_fewer_images_than_a_batch_make_one_step_that_learns(tmp_path: Path) -> None:
    few = data(20)
    made = learner()
    before = weights(made)
    done = fit(made, job(tmp_path, few, epochs=1, batch=64, lr=0.05, weight_decay=0.0))
    assert made.student.network.body[1].num_batches_tracked == 1  # type: ignore[index,union-attr]
    head = "students.0.network.head.weight"
    assert not torch.equal(before[head], made.state_dict()[head])
    assert done.history[0]["lr"] > 0


def test_a_clipped_step_has_the_norm_that_was_asked_for(tmp_path: Path) -> None:
    made = learner()
    before = weights(made)
    one = {"epochs": 1, "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    fit(made, job(tmp_path, data(32), clip_norm=1e-3, **one))
    moved = torch.cat([(p - before[name]).flatten() for name, p in made.named_parameters()])
    assert moved.double().norm().item() == pytest.approx(1e-3, rel=0.01)


def test_unlabelled_rows_learn_from_the_teacher_alone(tmp_path: Path) -> None:
    full = data()
    hidden = Split(full.train.images, torch.where(torch.arange(200) % 2 == 0, full.train.labels, -1))
    half = Dataset(hidden, full.validation, full.test, full.classes, full.mean, full.std, "half")
    done = fit(learner([{"use": "ce", "weight": 0.01}, "kl"]), job(tmp_path, half, augment=("mixup",), epochs=4))
    assert done.history[-1]["loss.kl"] < done.history[0]["loss.kl"]
    assert all(math.isfinite(row["loss"]) for row in done.history)


def test_predict_gives_logits_of_the_whole_split_in_order_and_leaves_the_mode() -> None:
    class Answer:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(Small):
        def forward(self, image: Tensor) -> Any:
            return Answer(super().forward(image))

    torch.manual_seed(0)
    network = Wrapped().train()
    found = predict(network, data().validation, data(), 33)
    assert network.training
    network.eval()
    images = (data().validation.images.float() / 255 - 0.3) / 0.35
    np.testing.assert_allclose(found, network(images).logits.detach(), atol=1e-5)


# Precision


def test_bf16_trains_fp32_weights_and_leaves_a_bare_network(tmp_path: Path) -> None:
    half, full = learner(TAUGHT), learner(TAUGHT)
    losses = [
        fit(made, job(tmp_path / name, precision=name, augment=("crop-flip",))).history
        for name, made in (("bf16", half), ("fp32", full))
    ]
    assert losses[0][0]["loss"] != losses[1][0]["loss"]
    assert losses[0][-1]["loss"] == pytest.approx(losses[1][-1]["loss"], rel=0.05)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    fresh = Small()
    fresh.load_state_dict(half.student.network.state_dict())  # type: ignore[union-attr]
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(half.student.eval()(images)["logits"], fresh.eval()(images))
    assert half({"image": images, "label": torch.zeros(4, dtype=torch.int64)})["loss"].dtype == torch.float32


def test_auto_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_of(Training(precision="fp32")) == "fp32"
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has: has)
        assert precision_of(Training()) == expected
        with autocast(Training()):
            found = torch.zeros(2, 2) @ torch.zeros(2, 2)
        assert found.dtype == (torch.bfloat16 if has else torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 trains on GPUs only"):
        fit(learner(), job(tmp_path, precision="fp16"))


# Interruption


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.9, "optimizer": "adamw", "lr": 0.003, "augment": ("crop-flip", "mixup")},
        {"precision": "bf16", "augment": ("crop-flip", "random-erasing")},
        {"precision": "bf16", "ema": 0.9, "keep": "last", "clip_norm": 1.0, "seed": 2**62},
    ],
    ids=["fp32", "fp32-ema-adamw-mixup", "bf16", "bf16-ema-last-clip"],
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = learner(TAUGHT)
    expected = fit(whole, job(tmp_path / "whole", epochs=3, **settings))
    directory = tmp_path / "cut"
    for seed, steps in enumerate((2, 5, 3, 4), start=10):  # within epochs 1, 2 (twice) and 3
        cut = learner(TAUGHT, seed)  # other weights, adapter and dropout: all must come from the checkpoint
        if seed == 10:
            cut.load_state_dict(learner(TAUGHT).state_dict())
        stop_after(cut, steps)
        with pytest.raises(Interrupted):
            fit(cut, job(directory, epochs=3, **settings))
    events: list[dict[str, Any]] = []
    last = learner(TAUGHT, 99)
    done = fit(last, job(directory, epochs=3, emit=events.append, **settings))
    assert events[0] == {"event": "resume", "stage": "distill", "epoch": 2, "step": 2}
    assert equal(weights(last), weights(whole))
    assert done.metrics == expected.metrics
    assert without_speeds(done.history) == without_speeds(expected.history)
    assert without_speeds(lines(directory)) == without_speeds(lines(tmp_path / "whole"))


def test_a_run_cut_between_epochs_goes_on_at_the_next(tmp_path: Path) -> None:
    whole = learner()
    fit(whole, job(tmp_path / "whole", epochs=3, patience=2))

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 1:
            raise Interrupted

    cut = learner()
    with pytest.raises(Interrupted):
        fit(cut, job(tmp_path / "cut", epochs=3, patience=2, emit=emit))
    assert len(lines(tmp_path / "cut")) == 2
    last = learner(seed=5)
    fit(last, job(tmp_path / "cut", epochs=3, patience=2))
    assert equal(weights(last), weights(whole))


def test_a_run_that_is_complete_computes_nothing_again(tmp_path: Path) -> None:
    first = learner()
    done = fit(first, job(tmp_path))
    again = learner(seed=5)
    stop_after(again, 0)
    assert fit(again, job(tmp_path)) == done
    assert equal(weights(again.student), weights(first.student))


def test_without_the_time_for_a_checkpoint_the_epoch_starts_again(tmp_path: Path) -> None:
    whole = learner()
    fit(whole, job(tmp_path / "whole", checkpoint_s=1000))
    cut = learner()
    stop_after(cut, 9)
    with pytest.raises(Interrupted):
        fit(cut, job(tmp_path / "cut", checkpoint_s=1000))
    events: list[dict[str, Any]] = []
    last = learner(seed=5)
    fit(last, job(tmp_path / "cut", checkpoint_s=1000, emit=events.append))
    assert (events[0]["epoch"], events[0]["step"]) == (1, 0)
    assert equal(weights(last), weights(whole))


KILLED: dict[str, Any] = {"epochs": 3, "precision": "bf16", "ema": 0.9, "augment": ("crop-flip",)}


def run_until_killed(directory: str) -> None:
    """What the process of the next test does: it tells every step, and never ends by itself."""
    torch.set_num_threads(1)
    made = learner(TAUGHT)
    count = 0

    def tell(*_: Any) -> None:
        nonlocal count
        print(count, flush=True)  # noqa: T201
        count += 1

    made.register_forward_pre_hook(tell)
    fit(made, job(Path(directory), **KILLED))
    signal.pause()


def test_a_process_that_is_killed_and_started_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = learner(TAUGHT)
        fit(whole, job(tmp_path / "whole", **KILLED))
        code = f"import test_train; test_train.run_until_killed({str(tmp_path / 'cut')!r})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == b"8":
                    break
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        last = learner(TAUGHT, 99)
        events: list[dict[str, Any]] = []
        fit(last, job(tmp_path / "cut", emit=events.append, **KILLED))
        assert events[0]["event"] == "resume"
        assert equal(weights(last), weights(whole))
    finally:
        torch.set_num_threads(threads)


# What goes wrong


class Spoiled(Small):
    """From training step `at` on: logits that are NaN, or finite ones whose gradient is not."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self.spoiler = nn.Parameter(torch.zeros(()))
        self.at, self.what, self.seen = at, what, 0

    def forward(self, image: Tensor) -> Tensor:
        logits = super().forward(image)
        self.seen += self.training
        if self.training and self.seen > self.at:
            return logits + (self.spoiler.abs().sqrt() if self.what == "gradient" else math.nan)
        return logits


def checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    ("what", "told"),
    [("loss", "the loss became nan in epoch 2, step 3"), ("gradient", "became NaN or infinite in epoch 2, step 3")],
)
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, what: str, told: str
) -> None:
    spoiled = learner(student=partial(Spoiled, 8, what))
    with pytest.raises(StageError) as raised:
        fit(spoiled, job(tmp_path))
    problem = raised.value.problem
    assert problem.where == "distill"
    assert told in problem.what
    for advice in ("lower lr (now 0.1)", "clip_norm = 1.0", "precision = 'fp32'", str(tmp_path)):
        assert advice in (problem.hint or "")
    assert raised.value.exit_code == 3
    stored = checkpoint(tmp_path)
    assert (stored["state"]["epoch"], stored["state"]["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in stored["learner"].values())
    sound = partial(Spoiled, 99, what)
    whole, healthy = learner(student=sound), learner(seed=5, student=sound)
    fit(whole, job(tmp_path / "whole"))
    fit(healthy, job(tmp_path))
    assert equal(weights(healthy), weights(whole))


def test_weights_that_burst_in_the_last_step_are_told_too(tmp_path: Path) -> None:
    spoiled = learner(student=partial(Spoiled, 11, "gradient"))
    with pytest.raises(StageError, match="weights became NaN or infinite in epoch 2, step 6"):
        fit(spoiled, job(tmp_path))
    assert len(lines(tmp_path)) == 1


def test_a_burst_at_once_names_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the loss became nan in epoch 1, step 1") as raised:
        fit(learner(student=partial(Spoiled, 0, "loss")), job(tmp_path))
    assert "checkpoint" not in (raised.value.problem.hint or "")


def test_a_learning_rate_that_is_much_too_high_ends_in_that_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"became (nan|inf|NaN or infinite)"):
        fit(learner(["mse-logits"]), job(tmp_path, lr=1e12, warmup=0.0, epochs=4))


@pytest.mark.parametrize("damage", ["cut", "emptied", "noise", "other"])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, damage: str) -> None:
    cut = learner()
    stop_after(cut, 3)
    with pytest.raises(Interrupted):
        fit(cut, job(tmp_path))
    file = tmp_path / "checkpoint.pt"
    content = file.read_bytes()
    if damage == "other":
        torch.save({"state": {"colour": 1}}, file)
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "noise": b"\x00noise" * 99}[damage])
    with pytest.raises(StageError) as raised:
        fit(learner(), job(tmp_path))
    assert raised.value.problem.where == str(file)
    assert "damaged" in raised.value.problem.what
    assert "delete it" in (raised.value.problem.hint or "")


def test_a_checkpoint_of_another_network_is_told(tmp_path: Path) -> None:
    fit(learner(), job(tmp_path))
    with pytest.raises(StageError, match="of another version"):
        fit(learner(student=partial(Small, 7)), job(tmp_path))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(StageError, match="damaged"):
        fit(learner(), job(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_told_and_the_older_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = learner()
    stop_after(cut, 3)
    with pytest.raises(Interrupted):
        fit(cut, job(tmp_path))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_atomically", refuse)
    with pytest.raises(StageError, match="cannot save a checkpoint: No space left on device") as raised:
        fit(learner(), job(tmp_path))
    assert raised.value.problem.hint == "is the disk full?"
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
