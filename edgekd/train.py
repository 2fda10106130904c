"""The one training loop: it heals whatever a compression step broke, and knows nothing about how.

Everything random in a step follows from (seed, epoch, step), so a checkpoint needs no random state, and a run that
was killed and started again ends with the same bits on a CPU as one that was not. With several processes each takes
its share of every batch; the first one judges and writes, and after every step all hold the same tensors.
"""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import nn

from . import checkpoint, ranks, tracking
from .checkpoint import CHECKPOINT
from .data import Dataset, Split, Stream, batches, joined
from .errors import Diverged, StageError, UsageError
from .learner import Learner
from .member import Member
from .models import outputs
from .optim import learning_rate
from .precision import keep_freed_memory, precision_of
from .recipe import Training
from .sharing import Shared
from .tasks import Task

__all__ = ["Fit", "Job", "fit", "predict"]

Event = dict[str, Any]


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
    ranks.join()
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # Accelerate's name for it
    # Accelerate keeps one precision per process; stages of one run may differ.
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = precision_of(job.settings)
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not torch.cuda.is_available(),
        device_placement=False,  # buffers that are placed twice are no longer those that others hold
        log_with=list(job.trackers) or None,
        project_dir=job.log_directory / job.name,
        # A student may have parts that its objectives do not reach, such as a classifier it does not use.
        # Buffers are shared after each step: a moving average of the student must not follow one process's.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
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
        # Of several processes Accelerate numbers the CPU, by which neither files nor tensors go.
        device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.learner = learner.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        source = self.learner.source
        followed = source if source is not None and hasattr(source, "follow") else None
        self.shared = Shared(self.learner)
        ranks.same([*self.learner.state_dict().values(), *(followed.state_dict().values() if followed else ())])
        triples = zip(learner.names, learner.students, learner.objectives, strict=True)
        self.members = [Member(name, network, objectives, job.settings) for name, network, objectives in triples]
        self.ranks = self.accelerator.num_processes
        if len(job.data.train) < self.ranks:
            raise UsageError(f"{len(job.data.train)} training images for {self.ranks} processes", where=job.name)
        self.batch = min(job.batch, len(job.data.train) // self.ranks)
        self.steps = len(job.data.train) // (self.batch * self.ranks)  # a smaller last batch is dropped
        # Not the optimizers: Accelerate's would take the scale from a fleet's gradients once per student, and look for
        # packages on disk in every step.
        self.forward = self.accelerator.prepare(self.learner)
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
        number = (self.job.seed * 1_000_003 + index * self.ranks + self.accelerator.process_index) % 2**63
        if self.device.type == "cpu":  # the other way asks every kind of device: half a millisecond
            torch.default_generator.manual_seed(number)
        else:
            torch.manual_seed(number)
        # The middle of the step: a schedule that ends at 0 wastes no step, not even the only one.
        rate = learning_rate(self.settings, (index + 0.5) / (self.settings.epochs * self.steps))
        if self.device.type != "cpu":
            batch = send_to_device(batch, self.device, non_blocking=True)
        losses = self.forward({**batch, "epoch": (index + 0.5) / self.steps, "epochs": self.settings.epochs})
        for member in self.members:
            member.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(losses["loss"])
        parts = self.shared.losses(losses)
        if not math.isfinite(parts["loss"]):
            self._diverged(f"the loss became {parts['loss']} in epoch {s.epoch + 1}, step {s.step + 1}")
        scaler = self.accelerator.scaler
        for member in self.members:
            member.step(rate, index, scaler)
        if scaler is not None:
            scaler.update()
        self.shared.buffers()
        self.learner.follow()
        for name, part in parts.items():
            s.sums[name] = s.sums.get(name, 0.0) + part

    def _check_weights(self) -> None:
        # A finite loss can have an infinite gradient: without this, the checkpoint would keep what it did.
        for member in self.members:
            if not member.finite():
                who = f" of {member.name}" if len(self.members) > 1 else ""
                at = f"epoch {self.state.epoch + 1}, step {self.state.step}"
                self._diverged(f"weights{who} became NaN or infinite in {at}")

    def _diverged(self, what: str) -> NoReturn:
        saved = (self.job.directory / CHECKPOINT).exists()
        raise Diverged(
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

        def judged() -> dict[str, float]:
            with self.accelerator.autocast():
                logits = predict(network, self.job.data.validation, self.job.data, 250, self.device)
            return self.job.task.metrics(logits, self.job.data.validation.labels.numpy())

        return ranks.from_first(judged)

    def finish(self) -> list[Fit]:
        done = [Fit(member.finish(), member.history) for member in self.members]
        # Accelerate wraps forward for autocast; whoever uses the network next must find it bare.
        self.accelerator.unwrap_model(self.forward, keep_fp32_wrapper=False)
        self.learner.to("cpu")  # where stages go on
        return done

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        source = self.learner.source
        content = {
            "state": self.state.__dict__,
            "rows": self.batch * self.ranks,
            "learner": self.learner.state_dict(),
            "members": [member.state() for member in self.members],
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "source": source.state_dict() if source is not None and hasattr(source, "follow") else None,
        }
        checkpoint.write(self.job.directory, content, [member.history for member in self.members])
        self.saved_at = time.monotonic()  # writing may have taken long

    def restore(self) -> None:
        # The first one may be through and delete the file before the others have looked.
        stored = ranks.from_first(partial(checkpoint.read, self.job.directory))
        if stored is None:
            return
        try:
            content = torch.load(io.BytesIO(stored), map_location=self.device, weights_only=True)
            self.state = self._moved(_State(**content["state"]), content["rows"])
            self.learner.load_state_dict(content["learner"])
            for member, state in zip(self.members, content["members"], strict=True):
                member.load(state)
            if self.accelerator.scaler is not None and content["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(content["scaler"])
            if content["source"] is not None and self.learner.source is not None:
                self.learner.source.load_state_dict(content["source"])
        except Exception as error:  # a damaged zip raises many kinds, one of another version of edgekd others
            raise StageError(
                f"the checkpoint is damaged, or of another version: {type(error).__name__}",
                where=str(self.job.directory / CHECKPOINT),
                hint="delete it and run the same command again: this stage starts from its beginning",
            ) from error
        self.job.emit({"event": "resume", "stage": self.job.name, "epoch": self.state.epoch, "step": self.state.step})

    def _moved(self, state: _State, rows: int) -> _State:
        """The same place in the epoch, where a step of the process that saved it took other `rows` than here."""
        mine = self.batch * self.ranks
        if rows == mine or state.step == 0:
            return state
        step = min(state.step * rows // mine, self.steps)
        sums = {name: total * step / state.step for name, total in state.sums.items()}
        return _State(state.epoch, step, sums if step else {}, state.seconds)


def _own(means: dict[str, float], name: str) -> dict[str, float]:
    """The loss parts of one student among several; all of them where there is one."""
    if not name:
        return means
    marks = f"loss.{name}."
    parts = {k.removeprefix(marks): v for k, v in means.items() if k.startswith(marks)}
    return {k if k == "loss" else f"loss.{k}": v for k, v in parts.items()}
