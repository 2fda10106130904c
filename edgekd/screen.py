"""What the user sees while it works: progress bars on a terminal, plain lines elsewhere, or one JSON event a line.

Everything here goes to stderr, except JSON events: stdout carries data only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import ranks
from .errors import EdgekdError

__all__ = ["note", "show_error", "watching"]

Event = dict[str, Any]


def note(text: str) -> None:
    """One line for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def show_error(error: EdgekdError) -> None:
    """Every problem with its place and hint, on stderr."""
    problems = list(error.problems)
    if len(problems) > 1:
        note(f"error: {len(problems)} problems")
    for problem in problems:
        prefix = "  " if len(problems) > 1 else "error: "
        note(f"{prefix}{problem.where + ': ' if problem.where else ''}{problem.what}")
        if problem.hint:
            note(f"{'  ' if len(problems) > 1 else ''}hint: {problem.hint}")


@contextmanager
def watching(as_json: bool) -> Iterator[Callable[[Event], None]]:
    """A callable that shows events in the way that fits where the output goes."""
    if not ranks.first():
        yield lambda event: None
    elif as_json:
        yield lambda event: print(json.dumps({"version": 1, **event}), flush=True)  # noqa: T201
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR"):
        with _bars() as show:
            yield show
    else:
        yield _Lines()


def line(event: Event) -> str | None:
    """What a finished piece of work leaves on the screen; None for what only moves a bar."""
    kind = event["event"]
    if kind == "stage":
        place = f"[{event['index'] + 1}/{event['stages']}] {event['stage']}"
        return f"{place}: complete, skipped" if event["done"] else place
    if kind == "resume":
        return f"  resuming {event['stage']} at epoch {event['epoch'] + 1}, step {event['step'] + 1}"
    if kind == "epoch":
        validation = "".join(
            f"  {k.removeprefix('val.')} {_figure(k, v)}" for k, v in event.items() if k.startswith("val.")
        )
        return (
            f"  epoch {event['epoch'] + 1}/{event['epochs']}  loss {event['loss']:.3f}"
            f"  on validation:{validation or ' -'}"
            f"  {event['images_per_s']:,.0f} images/s (loader alone {event['loader_images_per_s']:,.0f})"
        )
    if kind == "float":
        return f"  {event['stage']} stays float: {event['why']}"
    if kind == "saturation":
        return f"  {event['stage']}: {event['why']} (helps: {event['hint']})"
    if kind == "student":
        return f"student of {event['stage']}: {event['text']}"
    if kind == "device":
        return f"  {event['text']}"
    if kind == "elsewhere":
        return f"  {event['profile']} is not measured here: {event['why']}"
    if kind == "accuracy":
        return f"  accuracy of {event['variant']} on {event['images']:,} test images"
    if kind in ("trial", "tried", "waiting"):
        return _trial_line(event)
    if kind == "unjudged":
        return f"not judged: {', '.join(event['rules'])} (edgekd gate {event['path']} --baseline PATH)"
    if kind == "measured":
        return f"measurements: {event['path']}" + (" (nothing changed, not measured again)" if event["done"] else "")
    return None


def _trial_line(event: Event) -> str:
    if event["event"] == "waiting":
        return f"waiting for {event['for']}"
    if event["event"] == "trial":
        values = ", ".join(f"{name} = {_short(value)}" for name, value in event["values"].items())
        return f"trial {event['number']} of {event['trials']}{' goes on' if event['resumed'] else ''}: {values}"
    metric, best = event["metric"], event["best"]
    ended = {
        "complete": f"{metric} {_figure(metric, event['value'] or 0.0)}",
        "pruned": f"pruned after epoch {event['epochs']}",
    }.get(event["state"], f"{event['state']}: {event['error']}")
    known = f"; best {_figure(metric, best['value'])} (trial {best['number']})" if best is not None else ""
    return f"  {ended}{known}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(name: str, value: float) -> str:
    return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4f}"


class _Lines:
    """Plain lines, with a sign of life every ten seconds."""

    def __init__(self) -> None:
        self.told = time.monotonic()
        self.began: dict[str, tuple[float, int]] = {}

    def __call__(self, event: Event) -> None:
        text = line(event)
        if text is None and event["event"] in ("step", "bench", "cache"):
            what = str(event.get("stage", event.get("profile")))
            start, first = self.began.setdefault(what, (time.monotonic(), event["done"]))
            if time.monotonic() - self.told < 10:
                return
            elapsed, done = time.monotonic() - start, event["done"] - first
            left = f", about {_duration(elapsed / done * (event['total'] - event['done']))} left" if done else ""
            text = f"  {what} {event['done']}/{event['total']}{left}{_loss(event)}"
        if text is not None:
            self.told = time.monotonic()
            note(text)


def _loss(event: Event) -> str:
    return "".join(f"  {name} {value:.3f}" for name, value in event.get("loss", {}).items())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _bars() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        "  [bold]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        "{task.fields[info]}",
    )
    with Progress(
        *(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console, transient=True
    ) as bars:
        tasks: dict[str, Any] = {}

        def show(event: Event) -> None:
            text = line(event)
            if text is not None:
                console.print(text, markup=False)
            if event["event"] in ("step", "bench", "cache"):
                what = str(event.get("stage", event.get("profile")))
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=event["total"], completed=event["done"], info="")
                speed = f"  {event['images_per_s']:,.0f} images/s" if "images_per_s" in event else ""
                bars.update(tasks[what], completed=event["done"], info=_loss(event) + speed)
                if event["done"] >= event["total"]:
                    bars.remove_task(tasks.pop(what))

        yield show
