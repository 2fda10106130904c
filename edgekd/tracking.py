"""Experiment trackers through Accelerate: TensorBoard, Weights & Biases and MLflow, local unless the user says else.

A tracker that fails is told once and left; the training goes on.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .errors import Problem

__all__ = ["begin", "end", "log", "missing_trackers"]


def missing_trackers(names: Sequence[str]) -> Iterator[Problem]:
    """A problem for each tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            yield Problem("trackers", f"{name} is not installed", 'pip install "edgekd[track]"')


def begin(accelerator: Accelerator, project: str, stage: str, directory: Path, settings: Mapping[str, Any]) -> None:
    """Open the accelerator's trackers: one run of `project` a stage, files under `directory`.

    Weights & Biases is offline and MLflow writes files, where the environment does not say something else.
    """
    if not accelerator.log_with:
        return
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    store = directory / "mlruns"
    os.environ.setdefault("MLFLOW_TRACKING_URI", store.resolve().as_uri())
    config = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(
            project,
            config=config,
            init_kwargs={
                "wandb": {"name": stage, "dir": str(directory)},
                "mlflow": {"run_name": stage},
            },
        )
    except Exception as error:  # whatever a tracker does, the training matters more
        _give_up(accelerator, error)


def log(accelerator: Accelerator, values: Mapping[str, Any], step: int) -> None:
    """Numbers for every tracker, at a training step."""
    if not accelerator.trackers:
        return
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    try:
        accelerator.log(numbers, step=step)
    except Exception as error:
        _give_up(accelerator, error)


def end(accelerator: Accelerator) -> None:
    """Close the trackers, and not the process group: further stages train in this process."""
    trackers, accelerator.trackers = accelerator.trackers, []
    for tracker in trackers:
        try:
            tracker.finish()
        except Exception as error:
            _give_up(accelerator, error)


def _give_up(accelerator: Accelerator, error: Exception) -> None:
    warnings.warn(f"a tracker failed and is left: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)
    accelerator.trackers = []
