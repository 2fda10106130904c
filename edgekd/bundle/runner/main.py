"""The command line of run.py: what is said, and how it ends."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import signal
import sys
import traceback
from typing import Any, Callable, List, Optional

from .building import built_here
from .contents import read_manifest
from .errors import BUG, FAILED, INTERRUPTED, Failed
from .work import RUNTIMES, Run

__all__ = ["main"]


class Told:
    """Progress: JSON lines on stdout where asked for, words on stderr else, and always in the log.

    A terminal or a connection that is gone must not end the run, so what cannot be said is not.
    """

    def __init__(self, out: str, as_json: bool) -> None:
        self.as_json = as_json
        try:
            self.log: Any = open(os.path.join(out, "run.log"), "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise Failed(
                "cannot write in %s: %s" % (out, error.strerror), "--out DIR puts results and engines elsewhere"
            )

    def __call__(self, event: str, words: str, **more: Any) -> None:
        """One event: its name, a sentence, and its figures."""
        stamp = datetime.datetime.now().isoformat(timespec="seconds")
        line = json.dumps(dict(more, event=event, words=words), sort_keys=True) if self.as_json else words
        for stream, text in ((self.log, "%s %s" % (stamp, words)), (sys.stdout if self.as_json else sys.stderr, line)):
            try:
                stream.write(text + "\n")
                stream.flush()
            except (OSError, ValueError):
                pass


def _locked(out: str) -> Any:
    """Hold the directory: a second runner in it is told who runs."""
    try:
        stream = open(os.path.join(out, ".run.lock"), "a+")  # noqa: SIM115
    except OSError as error:
        raise Failed("cannot write in %s: %s" % (out, error.strerror), "--out DIR puts results and engines elsewhere")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        raise Failed(
            "already running here (process %s)" % (stream.read().strip() or "unknown"),
            "wait for it: results.json grows after each round",
        )
    stream.truncate(0)
    stream.write(str(os.getpid()))
    stream.flush()
    return stream


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Optional[List[str]] = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description="Measure this bundle's networks on this device.")
    known = ["auto", *sorted(RUNTIMES)]
    parser.add_argument("--runtime", default="auto", choices=known, help="default: the profile's")
    parser.add_argument(
        "--out", default=None, help="where results.json, engines and the log go; default: beside run.py"
    )
    parser.add_argument("--progress", action="store_true", help="one JSON object a line on stdout")
    parser.add_argument("--build", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="measure anew, and forget earlier rounds")
    options = parser.parse_args(arguments)
    directory = os.path.dirname(os.path.abspath(__file__))
    out = os.path.abspath(options.out or directory)
    if options.build is not None:
        return built_here(directory, read_manifest(directory)[0], options.build, out)
    for signum, handler in ((signal.SIGHUP, signal.SIG_IGN), (signal.SIGTERM, _stop)):
        signal.signal(signum, handler)
    tell: Callable[..., None] = lambda event, words, **more: print(words, file=sys.stderr)  # noqa: T201, E731
    try:
        if not os.path.isdir(out):
            os.makedirs(out)
        lock = _locked(out)
        tell = Told(out, options.progress)
        run = Run(directory, out, options.runtime, options.again, tell)
        run.work()
        code = run.conclude()
        lock.close()
        return code
    except Failed as error:
        hint = "\nhint: " + error.hint if error.hint else ""
        tell("error", "error: " + error.what + hint, code=error.code, hint=error.hint)
        return error.code
    except OSError as error:
        tell("error", "error: %s: %s" % (error.filename or "system", error.strerror or error), code=FAILED)
        return FAILED
    except KeyboardInterrupt:
        tell("interrupted", "interrupted: run the same command again to go on", code=INTERRUPTED)
        return INTERRUPTED
    except Exception:
        tell("bug", traceback.format_exc() + "this is a bug in edgekd's runner; please report it", code=BUG)
        return BUG


if __name__ == "__main__":
    ended = main()
    try:
        sys.stdout.flush()
    except OSError:  # whoever read is gone, and the exit code is still the run's
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(ended)
