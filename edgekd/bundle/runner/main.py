"""Check the bundle, build, compare, measure, and write results.json after each round."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from .contents import Arrays, answered, batches, compared, feed, load_arrays, read_manifest, verify, write_json
from .device import described_device
from .errors import BUG, FAILED, INTERRUPTED, USAGE, Failed
from .onnx_runtime import OnnxRuntime
from .rounds import measure_rounds
from .sensors import Sensors

__all__ = ["main"]

RESULTS = "results.json"
KIND = "edgekd bundle results"
RUNTIMES: Dict[str, Any] = {"onnxruntime": OnnxRuntime}
#: The wall clock may be set meanwhile; what is timed is not timed by it.
CLOCK_JUMP_S = 1.0


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


class Run:
    """One run of a bundle's networks on this device."""

    def __init__(self, directory: str, out: str, runtime: str, again: bool, tell: Told) -> None:
        self.directory, self.out, self.tell = directory, out, tell
        self.results_path = os.path.join(out, RESULTS)
        tell("verify", "checking the bundle's files")
        self.manifest, self.sha256 = read_manifest(directory)
        verify(directory, self.manifest)
        self.profile, self.protocol = self.manifest["profile"], self.manifest["profile"]["protocol"]
        self.runtime = chosen(runtime, self.profile["runtime"])
        version = self.runtime.version()
        self.sensors = Sensors()
        device = described_device(self.runtime.name, version, self.manifest)
        mode = self.sensors.power_mode()
        if mode is not None:
            device["power_mode"] = mode
        self.results: Dict[str, Any] = {
            "format": 1, "kind": KIND, "bundle": self.sha256, "manifest": self.manifest, "device": device,
            "runtime": {"name": self.runtime.name, "version": version, "timed": self.runtime.timed},
            "networks": {}, "rounds": [], "sessions": [], "warnings": [], "complete": False,
        }  # fmt: skip
        if not again:
            self._resume()

    def _resume(self) -> None:
        """Take over rounds that an earlier call left, of the same bundle, runtime and device."""
        try:
            with open(self.results_path, encoding="utf-8") as stream:
                earlier = json.load(stream)
            same = all(self._identity(earlier, key) == self._identity(self.results, key) for key in (0, 1, 2))
        except OSError:
            return
        except (ValueError, KeyError, TypeError, AttributeError):
            self.tell("resume", "the old results.json is damaged and is made anew")
            return
        if not same:
            os.replace(self.results_path, self.results_path + ".old")
            self.tell("resume", "results.json is of another bundle, runtime or device: kept as results.json.old")
            return
        for key in ("networks", "rounds", "sessions", "warnings", "complete"):
            self.results[key] = earlier[key]
        if self.results["rounds"] and not self.results["complete"]:
            count = len(self.results["rounds"])
            self.tell("resume", "going on after %d rounds of an earlier call" % count, rounds=count)

    @staticmethod
    def _identity(results: Dict[str, Any], which: int) -> Any:
        device = results["device"]
        machine = [device.get(k) for k in ("cpu", "machine", "board", "jetson", "power_mode", "gpu")]
        return (results["bundle"], [results["runtime"]["name"], results["runtime"]["version"]], machine)[which]

    def write(self) -> None:
        write_json(self.results_path, self.results)

    def warn(self, text: str) -> None:
        """A sentence that belongs to the results."""
        if text not in self.results["warnings"]:
            self.results["warnings"].append(text)
            self.tell("warning", "warning: " + text)

    def work(self) -> None:
        """Build, compare, measure. Raises Failed when the profile's own network, the last, is not right."""
        inputs, expected = load_arrays(self.directory, "inputs.npz"), load_arrays(self.directory, "expected.npz")
        if "labels" in inputs:
            self.results["labels"] = [int(label) for label in inputs["labels"]]
        self._pin()
        opened: Dict[str, Any] = {}
        for network in self.manifest["networks"]:
            session = self._checked(network, inputs, expected)
            if session is not None:
                opened[network["name"]] = session
        if not opened:
            raise Failed("no network of the bundle runs here: see `problem` of each in %s" % self.results_path)
        if not self.results["complete"]:
            self._measure(opened, inputs)
        for session in opened.values():
            session.close()

    def _pin(self) -> None:
        cores = set(self.profile["affinity"])
        if cores and hasattr(os, "sched_setaffinity"):
            if cores <= os.sched_getaffinity(0):
                os.sched_setaffinity(0, cores)
            else:
                self.warn("the profile pins to cores %s, which are not all here: not pinned" % sorted(cores))

    def _checked(self, network: Dict[str, Any], inputs: Arrays, expected: Arrays) -> Any:
        """The network's session, compared with its reference outputs; None where it does not run or is not right."""
        name = network["name"]
        told: Dict[str, Any] = {"file": network["file"], "problem": None}
        self.results["networks"][name] = told
        try:
            self.tell("open", "%s: opening" % name, network=name)
            begun = time.monotonic()
            session = self.runtime(self.directory, network, self.profile)
            told["opened_s"] = round(time.monotonic() - begun, 3)
            outputs, rows = self._outputs(session, network, inputs)
            wanted = {o["name"]: expected["%s.%s" % (name, o["name"])][:rows] for o in network["outputs"]}
            told["comparison"] = compared(network, outputs, wanted, network["tolerance"])
            told["problem"] = told["comparison"]["problem"]
            if told["problem"] is None and "labels" in inputs and network["logits"]:
                told["judged"] = answered(outputs[network["logits"]], inputs["labels"][:rows])
        except Failed as error:
            told["problem"] = error.what
        if told["problem"] is not None:
            self.tell("problem", "%s: %s" % (name, told["problem"]), network=name)
        else:
            self.tell("compared", "%s: outputs are right" % name, network=name, **_brief(told))
        self.write()
        return session if told["problem"] is None else None

    def _outputs(self, session: Any, network: Dict[str, Any], inputs: Arrays) -> Any:
        """Outputs of all rows, computed in the measured batch size, and how many they are."""
        rows, size = int(self.manifest["rows"]), int(network["batch"])
        parts = []
        for start in batches(rows, size):
            outputs = session.run(feed(network, inputs, start, size))
            parts.append(outputs)
        joined = {}
        for info in network["outputs"]:
            arrays = [part[info["name"]] for part in parts]
            joined[info["name"]] = np.concatenate(arrays)[:rows] if arrays[0].ndim else arrays[0]
        return joined, rows

    def _measure(self, opened: Dict[str, Any], inputs: Arrays) -> None:
        number = len(self.results["sessions"])
        session: Dict[str, Any] = {"begun": _now(), "warm_up": {}, "before": self.sensors.snapshot()}
        self.results["sessions"].append(session)
        by_name = {network["name"]: network for network in self.manifest["networks"]}
        wall = time.time() - time.monotonic()
        for name, opened_session in opened.items():
            self.tell("warm-up", "%s: warming up" % name, network=name)
            size = int(by_name[name]["batch"])
            kept, seconds, steady = opened_session.prepare(feed(by_name[name], inputs, 0, size), self.protocol)
            session["warm_up"][name] = {"calls": kept, "seconds": round(seconds, 3), "steady": steady}
        self.sensors.start()

        def after(done: Dict[str, Any], wanted: int) -> None:
            done["sensors"] = self.sensors.since()
            done["at"] = _now()
            jump = time.time() - time.monotonic() - wall
            if abs(jump) > CLOCK_JUMP_S:
                self.warn("the wall clock jumped by %.0f s while measuring; times are by the monotonic clock" % jump)
            count = len(self.results["rounds"])
            self.write()
            medians = {name: found["p50"] for name, found in done["networks"].items()}
            words = ", ".join("%s %.4g ms" % pair for pair in medians.items())
            self.tell("round", "round %d of %d: %s" % (count, wanted, words), done=count, total=wanted, p50=medians)

        def reopen() -> None:
            for each in opened.values():
                each.reopen()

        try:
            measure_rounds(
                {name: each.block for name, each in opened.items()},
                self.protocol, self.results["rounds"], after, number, reopen,
            )  # fmt: skip
        finally:
            self.sensors.stop()
        session["after"], session["ended"] = self.sensors.snapshot(), _now()
        for text in self.sensors.complaints(self.results["rounds"], session):
            self.warn(text)
        self.results["complete"] = True
        self.write()

    def conclude(self) -> int:
        """Say what came out; the exit code."""
        problems = {name: told["problem"] for name, told in self.results["networks"].items() if told["problem"]}
        for name, problem in problems.items():
            self.tell("problem", "%s: %s" % (name, problem), network=name)
        code = FAILED if problems else 0
        self.tell("done", "written: %s" % self.results_path, code=code, results=self.results_path)
        return code


def chosen(asked: str, wanted: str) -> Any:
    """The runtime to use: `auto` is the profile's. A CPU's figures are never given for a GPU's."""
    name = wanted if asked == "auto" else asked
    if name not in RUNTIMES:
        raise Failed("this runner has no runtime %s" % name, "known: %s" % ", ".join(sorted(RUNTIMES)), USAGE)
    return RUNTIMES[name]


def _brief(told: Dict[str, Any]) -> Dict[str, Any]:
    brief = {"agreement": told["comparison"]["agreement"], "rms_ratio": told["comparison"]["rms_ratio"]}
    return dict(brief, accuracy=told["judged"]["accuracy"]) if "judged" in told else brief


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


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
    parser.add_argument("--again", action="store_true", help="measure anew, and forget earlier rounds")
    options = parser.parse_args(arguments)
    directory = os.path.dirname(os.path.abspath(__file__))
    out = os.path.abspath(options.out or directory)
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
    sys.exit(main())
