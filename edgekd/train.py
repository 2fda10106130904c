"""The one training loop: it heals whatever a compression step broke, and knows nothing about how.

Everything random in a step follows from (seed, epoch, step), so a checkpoint needs no random state, and a run that
was killed and started again ends with the same bits on a CPU as one that was not.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from torch import Tensor, nn

from . import tracking
from .artifact import write_atomically
from .data import Dataset, Split, batches
from .errors import StageError, UsageError
from .learner import Learner
from .models import outputs
from .optim import Averaged, learning_rate, make_optimizer
from .recipe import Training
from .tasks import Task

__all__ = ["Fit", "Job", "autocast", "fit", "keep_freed_memory", "precision_of", "predict"]

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
    trackers: Sequence[str] = ()
    project: str = "edgekd"
    log_directory: Path = field(default=Path("trackers"), metadata={"doc": "where trackers write"})


@dataclass(frozen=True)
class Fit:
    """How a training run ended: the metrics of the weights that remain, and one record per epoch."""

    metrics: dict[str, float]
    history: list[dict[str, Any]]


@dataclass
class _State:
    """The position and memory of a run: all that a checkpoint holds beside tensors."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = -1
    seconds: float = 0.0


def precision_of(settings: Training) -> str:
    """`bf16` where the GPU or this CPU's instruction set has it, else `fp32`; or what the settings ask for.

    Raises UsageError for fp16 without a GPU.
    """
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("fp16 trains on GPUs only", where="precision", hint="use 'auto', 'bf16' or 'fp32'")
    if settings.precision != "auto":
        return settings.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def autocast(settings: Training) -> torch.autocast:
    """The mixed precision that training by these settings uses, as a context."""
    precision = precision_of(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=precision != "fp32")


def keep_freed_memory() -> None:
    """Let glibc keep big blocks that are freed: page faults of fresh ones cost a tenth of a training step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, (2 << 30) - 1)


def _accelerator(job: Job) -> Accelerator:
    # Accelerate keeps one precision per process; stages of one run may differ.
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = precision_of(job.settings)
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not torch.cuda.is_available(),
        log_with=list(job.trackers) or None,
        project_dir=job.log_directory / job.name,
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


def fit(learner: Learner, job: Job) -> Fit:
    """Train `learner` and leave the kept weights in `learner.student`.

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
        self.optimizer = make_optimizer(self.learner, self.settings)
        self.average = Averaged(self.learner.student, self.settings.ema) if self.settings.ema else None
        self.kept: dict[str, Tensor] | None = None
        self.batch = min(job.batch, len(job.data.train))
        self.steps = len(job.data.train) // self.batch  # a smaller last batch is dropped
        self.forward, self.stepper = self.accelerator.prepare(self.learner, self.optimizer)
        self.saved_at = self.told_at = self.logged_at = time.monotonic()

    def ended(self) -> bool:
        s = self.state
        waited = s.epoch - 1 - s.best_epoch
        stopped = self.settings.patience is not None and s.best_epoch >= 0 and waited >= self.settings.patience
        return s.epoch >= self.settings.epochs or stopped

    def epoch(self) -> None:
        s, job = self.state, self.job
        self.learner.train()
        if job.on_epoch is not None:
            job.on_epoch(s.epoch, self.learner)
        first, began, loading = s.step, time.monotonic(), 0.0
        stream = iter(
            batches(
                job.data.train,
                batch=self.batch,
                mean=job.data.mean,
                std=job.data.std,
                seed=job.seed,
                epoch=s.epoch,
                augment=job.augment,
                classes=len(job.data.classes),
                view=self._view(s.epoch),
                start=s.step,
                drop_last=True,
                channels_last=True,
            )
        )
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
        self._close_epoch(time.monotonic() - began, loading, (self.steps - first) * self.batch)

    def _view(self, epoch: int) -> int:
        views = getattr(self.learner.source, "views", None)
        return epoch % views if views else epoch

    def _step(self, batch: dict[str, Any]) -> None:
        s = self.state
        index = s.epoch * self.steps + s.step
        torch.manual_seed((self.job.seed * 1_000_003 + index) % 2**63)  # dropout and the like
        # The middle of the step: a schedule that ends at 0 wastes no step, not even the only one.
        rate = learning_rate(self.settings, (index + 0.5) / (self.settings.epochs * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.device.type != "cpu":
            batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        losses = self.forward(batch)
        value = float(losses["loss"].detach())
        if not math.isfinite(value):
            self._diverged(f"the loss became {value} in epoch {s.epoch + 1}, step {s.step + 1}")
        self.stepper.zero_grad(set_to_none=True)
        self.accelerator.backward(losses["loss"])
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.learner.parameters(), self.settings.clip_norm)
        self.stepper.step()
        if self.average is not None:
            self.average.update(index)
        for name, part in losses.items():
            s.sums[name] = s.sums.get(name, 0.0) + (value if name == "loss" else float(part))

    def _check_weights(self) -> None:
        # A finite loss can have an infinite gradient: without this, the checkpoint would keep what it did.
        if not all(bool(p.isfinite().all()) for p in self.learner.parameters()):
            self._diverged(f"weights became NaN or infinite in epoch {self.state.epoch + 1}, step {self.state.step}")

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
        images = (s.step - first) * self.batch
        if now - self.logged_at >= 1.0:
            self.logged_at = now
            means = {n if n == "loss" else f"loss.{n}": total / s.step for n, total in s.sums.items()}
            rate = self.optimizer.param_groups[0]["lr"]
            tracking.log(self.accelerator, {**means, "lr": rate}, s.epoch * self.steps + s.step)
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

    def _close_epoch(self, seconds: float, loading: float, images: int) -> None:
        s, job = self.state, self.job
        record: dict[str, Any] = {
            "epoch": s.epoch,
            **{name if name == "loss" else f"loss.{name}": total / self.steps for name, total in s.sums.items()},
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": round(images / max(seconds, 1e-9), 1),
            "loader_images_per_s": round(images / max(loading, 1e-9), 1),
        }
        if self.average is not None:
            self.average.swap()
        if len(job.data.validation):
            found = self.validate()
            record |= {f"val.{name}": value for name, value in found.items()}
            score = found[job.task.headline] * (1 if job.task.direction == "max" else -1)
            if s.best is None or score > s.best:
                s.best, s.best_epoch = score, s.epoch
                if self.settings.keep == "best":
                    self.kept = _copied(self.learner.student)
        if self.kept is None or self.settings.keep == "last" or not len(job.data.validation):
            self.kept = _copied(self.learner.student)
        if self.average is not None:
            self.average.swap()
        s.history.append(record)
        tracking.log(self.accelerator, record, (s.epoch + 1) * self.steps)
        s.epoch, s.step, s.sums = s.epoch + 1, 0, {}
        s.seconds += seconds
        self.save()
        job.emit({"event": "epoch", "stage": job.name, "epochs": self.settings.epochs, **record})

    def validate(self) -> dict[str, float]:
        with self.accelerator.autocast():
            logits = predict(self.learner.student, self.job.data.validation, self.job.data, 250, self.device)
        return self.job.task.metrics(logits, self.job.data.validation.labels.numpy())

    def finish(self) -> Fit:
        if self.kept is not None:
            self.learner.student.load_state_dict(self.kept)
        # Accelerate wraps forward for autocast; whoever uses the network next must find it bare.
        self.accelerator.unwrap_model(self.forward, keep_fp32_wrapper=False)
        history = self.state.history
        row = history[self.state.best_epoch if self.settings.keep == "best" else -1] if history else {}
        metrics = {k.removeprefix("val."): v for k, v in row.items() if k.startswith("val.")}
        return Fit(metrics, history)

    def save(self) -> None:
        content = {
            "state": self.state.__dict__,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.tensors if self.average else None,
            "kept": self.kept,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            self.job.directory.mkdir(parents=True, exist_ok=True)
            # metrics.jsonl first: restoring writes it anew from the checkpoint, so it may only be ahead.
            lines = "".join(json.dumps(record) + "\n" for record in self.state.history)
            write_atomically(self.job.directory / METRICS, lines)
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
            self.optimizer.load_state_dict(content["optimizer"])
            if self.average is not None:
                self.average.load(content["average"])
            self.kept = content["kept"]
        except Exception as error:  # a damaged zip raises many kinds, one of another version of edgekd others
            raise StageError(
                f"the checkpoint is damaged, or of another version: {type(error).__name__}",
                where=str(file),
                hint="delete it and run the same command again: this stage starts from its beginning",
            ) from error
        self.job.emit({"event": "resume", "stage": self.job.name, "epoch": self.state.epoch, "step": self.state.step})


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
