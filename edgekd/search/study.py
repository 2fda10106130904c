"""The study behind a search: Optuna's storage, who works at which trial, and what a trial's values are.

A trial belongs to whoever holds its lock file. When that process dies, the lock is free and the trial is taken over as
it stands, with its values and its checkpoint; so a search that was killed goes on as if it had not been. Workers that
share the storage but no disk are watched by Optuna's heartbeat instead: what they leave is failed, and made up for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ..artifact import write_atomically
from ..errors import StageError, UsageError
from ..recipe import Axis
from .space import Space

__all__ = ["Claimed", "alone", "beating", "busy", "claim", "open_study", "quiet", "values_of"]

OWNER = "edgekd:owner"
BEAT_S, GRACE_S = 30, 120


class Numbered(BaseSampler):
    """Draws a trial's values from (seed, number of the trial) and the trials before it.

    So two workers never draw the same, and a search that was resumed goes on as it would have without the break.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.inner = self._made(0)

    def _made(self, number: int) -> BaseSampler:
        seed = (self.seed * 1_000_003 + number) % 2**32
        return TPESampler(seed=seed) if self.kind == "tpe" else RandomSampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner = self._made(trial.number)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


@dataclass(frozen=True)
class Claimed:
    """A trial that this process works at, as long as `lock` is open."""

    trial: optuna.Trial
    directory: Path
    lock: IO[str]
    resumed: bool


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing of its own: what it would say is shown by us, or is about its own future."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(space: Space, url: str | None) -> optuna.Study:
    """The study of this search, begun or continued. Raises UsageError where the storage cannot be reached."""
    from sqlalchemy.exc import SQLAlchemyError

    default = f"sqlite:///{space.directory / 'study.db'}"
    heart = {} if url is None else {"heartbeat_interval": BEAT_S, "grace_period": GRACE_S}
    engine = {"connect_args": {"timeout": 60}} if (url or default).startswith("sqlite") else {"pool_pre_ping": True}
    epochs = space.epochs
    median = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=epochs // 4)
    try:
        with alone(space.directory):
            storage = optuna.storages.RDBStorage(url or default, engine_kwargs=engine, **heart)  # type: ignore[arg-type]
            return optuna.create_study(
                storage=storage,
                study_name=f"{space.recipe.name}-{space.key[:12]}",
                direction="maximize" if space.direction == "max" else "minimize",
                sampler=Numbered(space.search.sampler, space.recipe.seed),
                pruner=median if space.search.pruner == "median" else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        said = str(error.__cause__ or error).partition("\n")[0]
        hint = "for example sqlite:///study.db or postgresql://host/name; its driver must be installed"
        raise UsageError(f"the storage cannot be used: {said}", where="--storage", hint=hint) from error


@contextlib.contextmanager
def alone(directory: Path, name: str = ".claims", wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock of the search's directory; who comes second is told and waits. Raises StageError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / name).open("a")
    except OSError as error:
        hint = "choose another directory with -o DIR"
        raise StageError(f"cannot write to {directory}: {error.strerror}", hint=hint) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def claim(space: Space, study: optuna.Study) -> Claimed | None:
    """A trial to work at: one that a dead process left, or a new one; None where all are taken."""
    with alone(space.directory):
        owner = _owner(space.directory)
        for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            found = _taken_over(space, study, left, owner)
            if found is not None:
                return found
        optuna.storages.fail_stale_trials(study)
        if _spent(study) >= space.search.trials and not study.get_trials(states=(TrialState.WAITING,)):
            return None
        trial = study.ask({path: _distribution(axis) for path, axis in space.search.fields.items()})
        trial.set_user_attr(OWNER, owner)
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        if sum(t.state != TrialState.FAIL for t in before) >= space.search.trials:
            study.tell(trial, state=TrialState.FAIL)  # a worker elsewhere was faster
            return None
        directory = _directory(space, trial.number)
        lock = _locked(directory)
        assert lock is not None, "nobody else knows this number"
        return Claimed(trial, directory, lock, resumed=False)


def _taken_over(space: Space, study: optuna.Study, left: FrozenTrial, owner: str) -> Claimed | None:
    theirs = left.user_attrs.get(OWNER)
    if theirs is None:
        # Killed between two statements, unless it is being made elsewhere at this moment.
        if left.datetime_start is not None and datetime.now() - left.datetime_start > timedelta(seconds=BEAT_S):
            study.tell(left.number, state=TrialState.FAIL)
        return None
    if theirs != owner:
        return None
    directory = _directory(space, left.number)
    lock = _locked(directory)
    if lock is None:
        return None
    now = study.get_trials(deepcopy=False)[left.number]
    if now.state != TrialState.RUNNING:  # it ended between our two looks
        lock.close()
        return None
    return Claimed(optuna.Trial(study, now._trial_id), directory, lock, resumed=True)


def busy(study: optuna.Study) -> int:
    """How many trials other workers are at."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def _spent(study: optuna.Study) -> int:
    return sum(t.state != TrialState.FAIL for t in study.get_trials(deepcopy=False))


def _directory(space: Space, number: int) -> Path:
    return space.trials / f"{number:04d}"


def _locked(directory: Path) -> IO[str] | None:
    """The open lock of a trial; None where a living process holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    stream = (directory / ".claim").open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


def _owner(directory: Path) -> str:
    """What tells the workers that share this directory, and so its locks, from those on other disks."""
    file = directory / ".owner"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8")


@contextlib.contextmanager
def beating(trial: optuna.Trial) -> Iterator[None]:
    """Tell the storage of this trial that its worker lives, where workers elsewhere may want to know."""
    storage: Any = trial.storage
    if storage.get_heartbeat_interval() is None:
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(Exception):  # the next one may get through
                storage.record_heartbeat(trial._trial_id)
            if over.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _distribution(axis: Axis) -> BaseDistribution:
    low, high, step = axis.low, axis.high, axis.step
    if axis.choices is not None:
        return CategoricalDistribution([_label(choice) for choice in axis.choices])
    assert low is not None
    assert high is not None
    if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
        return IntDistribution(low, high, log=axis.log, step=step or 1)
    return FloatDistribution(low, high, log=axis.log, step=step)


def _label(choice: Any) -> Any:
    """Optuna stores scalars; lists and tables go by their JSON."""
    return choice if isinstance(choice, str | int | float) else json.dumps(choice, sort_keys=True)


def values_of(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values as a recipe takes them, by the paths of the fields."""
    values = {}
    for path, axis in space.search.fields.items():
        value = params[path]
        choices = {json.dumps(_label(choice)): choice for choice in axis.choices or []}
        values[path] = choices.get(json.dumps(value), value)
    return values
