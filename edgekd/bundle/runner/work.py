"""One run of a bundle: check, build, compare, measure, and write results.json after each round."""

from __future__ import annotations

import datetime
import json
import os
import time
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from .contents import Arrays, answered, batches, compared, feed, load_arrays, read_manifest, verify, write_json
from .device import cards_of, described_device
from .engines import TensorRT
from .errors import FAILED, USAGE, Failed
from .onnx_runtime import OnnxRuntime
from .rounds import measure_rounds, median_interval
from .sensors import Sensors
from .trtexec import Trtexec

__all__ = ["RUNTIMES", "Run"]

RESULTS = "results.json"
KIND = "edgekd bundle results"
RUNTIMES: Dict[str, Any] = {"onnxruntime": OnnxRuntime, "tensorrt": TensorRT, "trtexec": Trtexec}
#: The wall clock may be set meanwhile; what is timed is not timed by it.
CLOCK_JUMP_S = 1.0


class Run:
    """One run of a bundle's networks on this device."""

    def __init__(self, directory: str, out: str, runtime: str, again: bool, tell: Callable[..., None]) -> None:
        self.directory, self.out, self.tell = directory, out, tell
        self.results_path = os.path.join(out, RESULTS)
        tell("verify", "checking the bundle's files")
        self.manifest, self.sha256 = read_manifest(directory)
        verify(directory, self.manifest)
        self.profile, self.protocol = self.manifest["profile"], self.manifest["profile"]["protocol"]
        self.runtime = chosen(runtime, self.profile["runtime"])
        version = self.runtime.version()
        self.sensors = Sensors()
        used = self.runtime.device()
        device = dict(described_device(self.runtime.name, version, self.manifest), **used)
        cards = cards_of(used)
        if cards:
            device["gpus"] = cards
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
            kept = _kept(earlier) if same else {}
        except OSError:
            return
        except (ValueError, LookupError, TypeError, AttributeError):
            self.tell("resume", "the old results.json is damaged and is made anew")
            return
        if not same:
            os.replace(self.results_path, self.results_path + ".old")
            self.tell("resume", "results.json is of another bundle, runtime or device: kept as results.json.old")
            return
        self.results.update(kept)
        if self.results["rounds"] and not self.results["complete"]:
            count = len(self.results["rounds"])
            self.tell("resume", "going on after %d rounds of an earlier call" % count, rounds=count)

    @staticmethod
    def _identity(results: Dict[str, Any], which: int) -> Any:
        device = results["device"]
        machine = [
            device.get(k) for k in ("cpu", "machine", "board", "jetson", "power_mode", "gpu", "compute_capability")
        ]
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
        if self.results["complete"]:
            self.tell("complete", "measured already: --again measures anew")
            return
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
        session: Any = None
        try:
            self.tell("open", "%s: opening" % name, network=name)
            begun = time.monotonic()
            session = self.runtime(self.directory, network, self.profile, self.out)
            told["opened_s"] = round(time.monotonic() - begun, 3)
            outputs, rows = self._outputs(session, network, inputs, session.compared_batches)
            told["comparison"] = self._compared(network, outputs, expected, rows)
            told["problem"] = told["comparison"]["problem"]
            if told["problem"] is None and "labels" in inputs and network["logits"]:
                if rows < int(self.manifest["rows"]):
                    outputs = self._wide_outputs(told, session, inputs, expected)
                if outputs is not None:
                    told["judged"] = answered(outputs[network["logits"]], inputs["labels"])
            told.update(session.facts)
        except Failed as error:
            told["problem"] = error.what
        if told["problem"] is not None:
            self.tell("problem", "%s: %s" % (name, told["problem"]), network=name)
        else:
            self.tell("compared", "%s: outputs are right" % name, network=name, **_brief(told))
        self.write()
        if told["problem"] is None or session is None:
            return session
        session.close()
        return None

    @staticmethod
    def _compared(network: Dict[str, Any], outputs: Arrays, expected: Arrays, rows: int) -> Dict[str, Any]:
        names = [output["name"] for output in network["outputs"]]
        wanted = {name: expected["%s.%s" % (network["name"], name)][:rows] for name in names}
        return compared(network, outputs, wanted, network["tolerance"])

    def _wide_outputs(self, told: Dict[str, Any], session: Any, inputs: Arrays, expected: Arrays) -> Optional[Arrays]:
        """Outputs of all rows by an engine of the same file for more rows at once; None where there can be none."""
        wide = session.wide(int(self.manifest["rows"]))
        if wide is None:
            return None
        outputs, rows = self._outputs(wide, wide.network, inputs, None)
        told["comparison_wide"] = self._compared(wide.network, outputs, expected, rows)
        told["problem"] = told["comparison_wide"]["problem"]
        return dict(outputs)

    def _outputs(self, session: Any, network: Dict[str, Any], inputs: Arrays, most: Optional[int]) -> Any:
        """Outputs of all rows, or of `most` batches, and how many rows they are."""
        rows, size = int(self.manifest["rows"]), int(network["batch"])
        rows = rows if most is None else min(rows, most * size)
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
        number, rounds = len(self.results["sessions"]), self.results["rounds"]
        rounds[:] = [done for done in rounds if set(opened) <= set(done["networks"])]  # of those that run now
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
                self.protocol, rounds, after, number, reopen,
            )  # fmt: skip
        finally:
            self.sensors.stop()
        for name, each in opened.items():
            self.results["networks"][name].update(each.facts)
            for text in each.warnings():
                self.warn("%s: %s" % (name, text))
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
        for name, told in self.results["networks"].items():
            if told["problem"] is None and self.results["rounds"]:
                self.tell("result", name + ": " + _figures(told, name, self.results["rounds"]), network=name)
        code = FAILED if problems else 0
        self.tell("done", "written: %s" % self.results_path, code=code, results=self.results_path)
        return code


def chosen(asked: str, wanted: str) -> Any:
    """The runtime to use: `auto` is the profile's. A CPU's figures are never given for a GPU's."""
    name = wanted if asked == "auto" else asked
    if asked == "auto" and wanted == "tensorrt":
        try:
            TensorRT.version()
        except Failed as error:
            try:
                Trtexec.version()
            except Failed:
                raise Failed("TensorRT is not here: %s; and no trtexec" % error.what, error.hint)
            name = "trtexec"
    if name not in RUNTIMES:
        raise Failed("this runner has no runtime %s" % name, "known: %s" % ", ".join(sorted(RUNTIMES)), USAGE)
    return RUNTIMES[name]


def _kept(earlier: Dict[str, Any]) -> Dict[str, Any]:
    """What of earlier results is gone on with. Raises what damaged ones do: LookupError, TypeError, AttributeError."""
    kinds = {"networks": dict, "rounds": list, "sessions": list, "warnings": list, "complete": bool}
    for key, kind in kinds.items():
        if not isinstance(earlier[key], kind):
            raise TypeError(key)
    for told in earlier["networks"].values():
        told["problem"]
    for done in earlier["rounds"]:
        for found in done["networks"].values():
            found["p50"] + found["ns"][0]
    return {key: earlier[key] for key in kinds}


def _brief(told: Dict[str, Any]) -> Dict[str, Any]:
    brief = {"agreement": told["comparison"]["agreement"], "rms_ratio": told["comparison"]["rms_ratio"]}
    return dict(brief, accuracy=told["judged"]["accuracy"]) if "judged" in told else brief


def _figures(told: Dict[str, Any], name: str, rounds: List[Dict[str, Any]]) -> str:
    """Median of the rounds with its interval, and accuracy, as words."""
    figures = median_interval([done["networks"][name]["p50"] for done in rounds])
    words = "%.4g ms (%.4g to %.4g)" % figures
    return words + ", accuracy %.2f %%" % (100 * told["judged"]["accuracy"]) if "judged" in told else words


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
