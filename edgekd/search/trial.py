"""One trial: the recipe with its values, run up to the judged stage, watched and pruned by its epochs."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from ..errors import Diverged, StageError, UsageError
from ..events import recording
from ..pipeline import Plan, run_steps
from .space import Space, planned_with
from .study import Claimed, alone, values_of

__all__ = ["share", "work"]

Emit = Callable[[dict[str, Any]], None]
#: What a worker shows of a trial; its other events are in the trial's own events.jsonl.
SHOWN = ("step", "epoch", "cache", "resume")


def share(space: Space, emit: Emit) -> None:
    """Make what all trials have in common, once, in the search's own directory. Raises StageError."""
    if space.shared is None:
        return
    planned = planned_with(space, {}, space.directory)
    with alone(space.directory, ".shared", lambda: emit({"event": "waiting", "for": "what the trials share"})):
        run_steps(planned, emit, until=space.shared)


def work(space: Space, study: optuna.Study, claimed: Claimed, emit: Emit, command: str) -> None:
    """Carry out a trial and tell the study how it ended.

    Values that cannot be trained with (the loss becomes NaN, the memory does not suffice, the recipe does not fit
    together, whether that is found by its check or by a stage) end the trial as failed and nothing else. Any other
    error ends the search and leaves the trial out.
    """
    trial = claimed.trial
    if set(trial.params) != set(space.search.fields):  # killed while its values were drawn
        study.tell(trial, state=TrialState.FAIL)
        return
    clock = _Clock(trial)
    try:
        value = _carried_out(space, claimed, emit, command, clock)
    except (Diverged, UsageError, torch.OutOfMemoryError) as error:
        # For the sampler it is as bad as a pruned one, so that it looks elsewhere.
        trial.set_user_attr("error", str(error).partition("\n")[0])
        value = None
    except Exception:
        study.tell(trial, state=TrialState.FAIL)
        raise
    clock.note()
    if value is None:
        _clean(claimed.directory)
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    else:
        study.tell(trial, value, skip_if_finished=True)


def _carried_out(space: Space, claimed: Claimed, emit: Emit, command: str, clock: _Clock) -> float | None:
    """The metric of the judged stage's result on the validation split; None for a trial that was pruned."""
    trial, directory = claimed.trial, claimed.directory
    planned = planned_with(space, values_of(space, trial.params), directory)
    _link(space, planned)

    def shown(event: dict[str, Any]) -> None:
        if event["event"] in SHOWN:
            emit(event)

    with recording(directory, command, shown) as record:

        def watch(event: dict[str, Any]) -> None:
            record(event)
            if event["event"] == "epoch" and event["stage"] == space.group and space.watched in event:
                clock.note()
                _judge(trial, event, event[space.watched])

        try:
            run_steps(planned, watch, until=space.stage)
        except optuna.TrialPruned:
            record.write({"event": "end", "exit_code": 0, "error": None, "pruned": True})
            return None
        value = planned.artifact(space.stage).manifest.metrics.get(space.metric)
        if value is None:
            what = f"the stage {space.stage!r} was not judged on the validation split"
            raise StageError(what, where="search.stage", hint="give it epochs, or name the stage before it")
        record.write({"event": "end", "exit_code": 0, "error": None})
    if not math.isfinite(value):
        raise Diverged(f"{space.metric} became {value}")
    return float(value)


def _judge(trial: optuna.Trial, event: dict[str, Any], value: float) -> None:
    """Raises TrialPruned, but not after the last epoch: what is paid for is kept."""
    if math.isfinite(value):
        trial.report(value, event["epoch"])
    if event["epoch"] + 1 < event["epochs"] and trial.should_prune():
        raise optuna.TrialPruned


def _link(space: Space, planned: Plan) -> None:
    """Show the trial what is there already: shared stages, equal ones of other trials, and the teacher's cache."""
    planned.directory.mkdir(parents=True, exist_ok=True)
    for step in planned.steps:
        here = planned.directory / step.directory.name
        if here.is_symlink() and not here.exists():
            here.unlink()  # what it led to was deleted
        if here.exists():
            continue
        trials = space.directory.glob(f"trials-*/*/{here.name}")
        for there in (space.directory / here.name, *trials):
            if (there / "manifest.json").is_file() and not there.is_symlink():
                here.symlink_to(_relative(there, planned.directory, space.directory))
                break
    cache = planned.directory / ".cache"
    if not cache.exists():
        (space.directory / ".cache").mkdir(exist_ok=True)
        cache.symlink_to(_relative(space.directory / ".cache", planned.directory, space.directory))


def _relative(there: Path, directory: Path, root: Path) -> Path:
    """A path from a trial's directory, so that the whole search may be moved."""
    up = len(directory.relative_to(root).parts)
    return Path(*[".."] * up, there.relative_to(root))


def _clean(directory: Path) -> None:
    """What was begun is not wanted any more; what is complete may serve another trial."""
    shutil.rmtree(directory / ".partial", ignore_errors=True)


class _Clock:
    """The seconds of a trial, those before it was taken over included."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial
        self.before = float(trial.user_attrs.get("seconds", 0.0))
        self.began = time.monotonic()

    def note(self) -> None:
        self.trial.set_user_attr("seconds", round(self.before + time.monotonic() - self.began, 3))
