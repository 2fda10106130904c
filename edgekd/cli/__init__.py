"""The command line: parse, call, exit code. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any

import typer

from .. import ranks
from ..errors import EdgekdError
from . import chain, compress, devices, estimate, measure, profiles, report, search, sensitivity, show, students, verify
from .app import app

__all__ = ["app", "main"]

CLOSED_PIPE = 141
#: To end after an interrupt, with a last checkpoint, takes less.
AGAIN_S = 10.0
COMMANDS = (
    chain,
    compress,
    search,
    students,
    sensitivity,
    measure,
    estimate,
    verify,
    devices,
    profiles,
    report,
    show,
)  # importing them adds their commands to the app, in this order


def main() -> None:
    """Run the command line and exit with the code that the outcome has."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _as_interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, _as_interrupt)
    if not ranks.first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first process of a run speaks for all
    if ranks.launched() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # advice on speed, once per process
    # Threads that spin at barriers make training ten times slower where another process wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = _outcome()
    except KeyboardInterrupt:  # while an error was being shown
        code = ranks.INTERRUPTED
    signal.setitimer(signal.ITIMER_REAL, 0)
    if code == ranks.INTERRUPTED:
        print("interrupted: run the same command again to resume", file=sys.stderr)  # noqa: T201
    ranks.leave(code)


def _outcome() -> int:
    """Run the command and say what went wrong; the exit code."""
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
    except EdgekdError as error:
        from ..screen import show_error

        show_error(error)
        if not error.problems:  # another process has said it, also that it was interrupted
            ranks.leave(error.exit_code)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return ranks.INTERRUPTED
    except BrokenPipeError:
        return _closed_pipe()
    except SystemExit as stop:  # the parser makes 1 of a closed pipe, and 1 is a failed gate
        return _closed_pipe() if stop.code == 1 else int(stop.code or 0)
    except Exception as error:
        return _other(error)
    return result if isinstance(result, int) else 0


def _other(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # the parser's own usage errors
        error.show()
        return int(error.exit_code)
    if isinstance(error, OSError):
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)  # noqa: T201
        print("hint: is the disk full, or a path not readable or writable?", file=sys.stderr)  # noqa: T201
        return 3
    traceback.print_exc()
    print(  # noqa: T201
        f"\nThis is a bug in edgekd ({type(error).__name__}). Please report it with the lines above, the command and "
        "the output of `edgekd doctor`.",
        file=sys.stderr,
    )
    return 70


def _closed_pipe() -> int:
    # Whoever read has enough (`edgekd list models | head -1`); flushing at exit would complain about it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return CLOSED_PIPE


def _as_interrupt(signum: int, frame: Any) -> None:
    # Again, if it is swallowed: by an import that may fail in any way, or by a finalizer.
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    raise KeyboardInterrupt
