"""The one training loop: it heals whatever a compression step broke, and knows nothing about how.

Everything random in a step follows from (seed, epoch, step), so a checkpoint needs no random state, and a run that
was killed and started again ends with the same bits on a CPU as one that was not. With several processes each takes
its share of every batch; the first one judges and writes.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, send_to_device
from numpy.typing import NDArray
from torch import nn

from . import tracking
from .artifact import write_atomically
from .data import Dataset, Split, Stream, batches, joined
from .errors import StageError
from .learner import Learner
from .member import Member
from .models import outputs
from .optim import learning_rate
from .precision import keep_freed_memory, precision_of
from .recipe import Training
from .tasks import Task

__all__ = ["Fit", "Job", "fit", "predict"]

Event = dict[str, Any]
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """What a training run needs beside the learner."""

    name: str
    data: Dataset
    task: Task
    settings: Training
    batch: int
    augment: Sequence[Any]
    seed: int
    directory: Path = field(metadata={"doc": "where checkpoint and metrics.jsonl live while the run is not complete"})
    emit: Callable[[Event], None] = lambda event: None
    on_epoch: Callable[[int, Learner], None] | None = None
    streams: Sequence[Stream] = ()
    trackers: Sequence[str] = ()
    project: str = "edgekd"
    log_directory: Path = field(default=Path("trackers"), metadata={"doc": "where trackers write"})


@dataclass(frozen=True)
class Fit:
    """How a student's training ended: the metrics of the weights that remain, and one record per epoch."""

    metrics: dict[str, float]
    history: list[dict[str, Any]]


@dataclass
class _State:
    """The position of a run, and what it has summed up in the epoch at hand."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def _accelerator(job: Job) -> Accelerator:
    # Accelerate keeps one precision per process; stages of one run may differ.
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = precision_of(job.settings)
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not torch.cuda.is_available(),
        log_with=list(job.trackers) or None,
        project_dir=job.log_directory / job.name,
        # A student may have parts that its objectives do not reach, such as a classifier it does not use.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def predict(
    network: nn.Module, split: Split, data: Dataset, batch: int, device: torch.device | str = "cpu"
) -> NDArray[Any]:
    """Logits [N, K] of a whole split, in evaluation mode."""
    training = network.training
    network.eval()
    parts = []
    with torch.no_grad():
        for b in batches(
            split, batch=batch, mean=data.mean, std=data.std, seed=0, epoch=0, shuffle=False, channels_last=True
        ):
            parts.append(outputs(network(b["image"].to(device)))["logits"].float().cpu())
    network.train(training)
    return torch.cat(parts).numpy()


def fit(learner: Learner, job: Job) -> list[Fit]:
    """Train `learner` and leave the kept weights in its students; one result per student.

    Resumes from a checkpoint in `job.directory`; the caller removes that directory when it has stored the result.
    Raises StageError when the loss or a weight is no longer finite: the last good checkpoint stays.
    """
    keep_freed_memory()
    run = _Run(learner, job)
    tracking.begin(run.accelerator, job.project, job.name, job.log_directory, job.settings.model_dump(mode="json"))
    try:
        run.restore()
        while not run.ended():
            run.epoch()
        return run.finish()
    finally:
        tracking.end(run.accelerator)


class _Run:
    def __init__(self, learner: Learner, job: Job) -> None:
        self.job, self.settings, self.state = job, job.settings, _State()
        self.accelerator = _accelerator(job)
        self.device = self.accelerator.device
        self.learner = learner.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        triples = zip(learner.names, learner.students, learner.objectives, strict=True)
        self.members = [Member(name, network, objectives, job.settings) for name, network, objectives in triples]
        self.ranks = self.accelerator.num_processes
        self.batch = min(job.batch, len(job.data.train) // self.ranks)
        self.steps = len(job.data.train) // (self.batch * self.ranks)  # a smaller last batch is dropped
        prepared = self.accelerator.prepare(self.learner, *(m.optimizer for m in self.members))
        self.forward, self.steppers = prepared[0], prepared[1:]
        self.saved_at = self.told_at = self.logged_at = time.monotonic()

    def ended(self) -> bool:
        epoch = self.state.epoch
        return epoch >= self.settings.epochs or all(m.stopped(epoch) for m in self.members)

    def epoch(self) -> None:
        s, job = self.state, self.job
        self.learner.train()
        if job.on_epoch is not None:
            job.on_epoch(s.epoch, self.learner)
        first, began, loading = s.step, time.monotonic(), 0.0
        stream = self._batches()
        while s.step < self.steps:
            mark = time.monotonic()
            batch = next(stream)
            loading += time.monotonic() - mark
            self._step(batch)
            s.step += 1
            self._tell(began, first, loading)
            if time.monotonic() - self.saved_at > self.settings.checkpoint_s and s.step < self.steps:
                self._check_weights()
                self.save()
        self._check_weights()
        self._close_epoch(time.monotonic() - began, loading, (self.steps - first) * self.batch * self.ranks)

    def _batches(self) -> Any:
        s, job = self.state, self.job
        views = getattr(self.learner.source, "views", None)
        share = (self.accelerator.process_index, self.ranks)
        main = batches(
            job.data.train,
            batch=self.batch * self.ranks,
            mean=job.data.mean,
            std=job.data.std,
            seed=job.seed,
            epoch=s.epoch,
            augment=job.augment,
            classes=len(job.data.classes),
            view=s.epoch % views if views else s.epoch,
            start=s.step,
            drop_last=True,
            channels_last=True,
            share=share,
        )
        at = s.epoch * self.steps + s.step
        return (
            joined(main, job.streams, at=at, seed=job.seed, augment=job.augment, share=share) if job.streams else main
        )

    def _step(self, batch: dict[str, Any]) -> None:
        s = self.state
        index = s.epoch * self.steps + s.step
        # Dropout and the like: other numbers on every process.
        torch.manual_seed((self.job.seed * 1_000_003 + index * self.ranks + self.accelerator.process_index) % 2**63)
        # The middle of the step: a schedule that ends at 0 wastes no step, not even the only one.
        rate = learning_rate(self.settings, (index + 0.5) / (self.settings.epochs * self.steps))
        if self.device.type != "cpu":
            batch = send_to_device(batch, self.device, non_blocking=True)
        losses = self.forward({**batch, "epoch": (index + 0.5) / self.steps, "epochs": self.settings.epochs})
        value = float(losses["loss"].detach())
        if not math.isfinite(value):
            self._diverged(f"the loss became {value} in epoch {s.epoch + 1}, step {s.step + 1}")
        for stepper in self.steppers:
            stepper.zero_grad(set_to_none=True)
        self.accelerator.backward(losses["loss"])
        for member, stepper in zip(self.members, self.steppers, strict=True):
            for group in member.optimizer.param_groups:
                group["lr"] = rate
            if self.settings.clip_norm is not None:
                self.accelerator.clip_grad_norm_(member.trained.parameters(), self.settings.clip_norm)
            stepper.step()
            if member.average is not None:
                member.average.update(index)
        self.learner.follow()
        for name, part in losses.items():
            s.sums[name] = s.sums.get(name, 0.0) + (value if name == "loss" else float(part))

    def _check_weights(self) -> None:
        # A finite loss can have an infinite gradient: without this, the checkpoint would keep what it did.
        for member in self.members:
            if not member.finite():
                who = f" of {member.name}" if len(self.members) > 1 else ""
                at = f"epoch {self.state.epoch + 1}, step {self.state.step}"
                self._diverged(f"weights{who} became NaN or infinite in {at}")

    def _diverged(self, what: str) -> NoReturn:
        saved = (self.job.directory / CHECKPOINT).exists()
        raise StageError(
            what,
            where=self.job.name,
            hint=f"try a lower lr (now {self.settings.lr:g}), clip_norm = 1.0, or precision = 'fp32'"
            + (f"; the last good checkpoint is in {self.job.directory}" if saved else ""),
        )

    def _tell(self, began: float, first: int, loading: float) -> None:
        now, s = time.monotonic(), self.state
        if now - self.told_at < 0.2 and s.step < self.steps:
            return
        self.told_at = now
        images = (s.step - first) * self.batch * self.ranks
        if now - self.logged_at >= 1.0:
            self.logged_at = now
            tracking.log(self.accelerator, {**self._means(s.step), "lr": self._rate()}, s.epoch * self.steps + s.step)
        self.job.emit(
            {
                "event": "step",
                "stage": self.job.name,
                "epoch": s.epoch,
                "epochs": self.settings.epochs,
                "done": s.epoch * self.steps + s.step,
                "total": self.settings.epochs * self.steps,
                "loss": {name: total / s.step for name, total in s.sums.items()},
                "images_per_s": images / max(now - began, 1e-9),
                "loader_images_per_s": images / max(loading, 1e-9),
            }
        )

    def _rate(self) -> float:
        return float(self.members[0].optimizer.param_groups[0]["lr"])

    def _means(self, steps: int) -> dict[str, float]:
        return {n if n == "loss" else f"loss.{n}": total / steps for n, total in self.state.sums.items()}

    def _close_epoch(self, seconds: float, loading: float, images: int) -> None:
        s, job = self.state, self.job
        common = {
            "lr": self._rate(),
            "images_per_s": round(images / max(seconds, 1e-9), 1),
            "loader_images_per_s": round(images / max(loading, 1e-9), 1),
        }
        means = self._means(self.steps)
        validated: dict[str, float] = {}
        for member in self.members:
            member.swap()
            found = self.validate(member.network) if len(job.data.validation) else None
            judged = {f"val.{name}": value for name, value in (found or {}).items()}
            own = _own(means, member.name if len(self.members) > 1 else "")
            sign = 1 if job.task.direction == "max" else -1
            score = sign * found[job.task.headline] if found is not None else None
            member.close({"epoch": s.epoch, **own, **common, **judged}, score)
            member.swap()
            mark = "" if len(self.members) == 1 else f"{member.name}."
            validated |= {f"val.{mark}{name}": value for name, value in (found or {}).items()}
        record = {"epoch": s.epoch, **means, **common, **validated}
        tracking.log(self.accelerator, record, (s.epoch + 1) * self.steps)
        s.epoch, s.step, s.sums = s.epoch + 1, 0, {}
        s.seconds += seconds
        self.save()
        job.emit({"event": "epoch", "stage": job.name, "epochs": self.settings.epochs, **record})

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Judged by the first process for all, so that they keep and stop alike."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                logits = predict(network, self.job.data.validation, self.job.data, 250, self.device)
            found = [self.job.task.metrics(logits, self.job.data.validation.labels.numpy())]
        return broadcast_object_list(found)[0] if self.ranks > 1 else found[0]  # type: ignore[no-any-return]

    def finish(self) -> list[Fit]:
        done = [Fit(member.finish(), member.history) for member in self.members]
        # Accelerate wraps forward for autocast; whoever uses the network next must find it bare.
        self.accelerator.unwrap_model(self.forward, keep_fp32_wrapper=False)
        return done

    def save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        source = self.learner.source
        content = {
            "state": self.state.__dict__,
            "learner": self.learner.state_dict(),
            "members": [member.state() for member in self.members],
            "source": source.state_dict() if source is not None and hasattr(source, "follow") else None,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            self.job.directory.mkdir(parents=True, exist_ok=True)
            # metrics.jsonl first: restoring writes it anew from the checkpoint, so it may only be ahead.
            for i, member in enumerate(self.members):
                lines = "".join(json.dumps(record) + "\n" for record in member.history)
                write_atomically(self.job.directory / metrics_file(i), lines)
            write_atomically(self.job.directory / CHECKPOINT, buffer.getvalue())
        except OSError as error:
            raise StageError(
                f"cannot save a checkpoint: {error.strerror or error}",
                where=str(self.job.directory),
                hint="is the disk full?",
            ) from error
        self.saved_at = time.monotonic()

    def restore(self) -> None:
        file = self.job.directory / CHECKPOINT
        if not file.exists():
            return
        try:
            content = torch.load(file, map_location=self.device, weights_only=True)
            self.state = _State(**content["state"])
            self.learner.load_state_dict(content["learner"])
            for member, state in zip(self.members, content["members"], strict=True):
                member.load(state)
            if content["source"] is not None and self.learner.source is not None:
                self.learner.source.load_state_dict(content["source"])
        except Exception as error:  # a damaged zip raises many kinds, one of another version of edgekd others
            raise StageError(
                f"the checkpoint is damaged, or of another version: {type(error).__name__}",
                where=str(file),
                hint="delete it and run the same command again: this stage starts from its beginning",
            ) from error
        self.job.emit({"event": "resume", "stage": self.job.name, "epoch": self.state.epoch, "step": self.state.step})


def metrics_file(member: int) -> str:
    """Where the history of a student lies in the job's directory."""
    return METRICS if member == 0 else f"metrics-{member}.jsonl"


def _own(means: dict[str, float], name: str) -> dict[str, float]:
    """The loss parts of one student among several; all of them where there is one."""
    if not name:
        return means
    marks = f"loss.{name}."
    parts = {k.removeprefix(marks): v for k, v in means.items() if k.startswith(marks)}
    return {k if k == "loss" else f"loss.{k}": v for k, v in parts.items()}
