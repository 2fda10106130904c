"""TensorRT by its command line tool, for devices without its Python package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from typing import Any, Dict, List, Optional

import numpy as np

from .building import ENGINES, engine_settings, input_shape, kept_engine, timing_cache, workspace_mib
from .contents import Arrays, write_json
from .cuda import described_gpu
from .device import smi_cards
from .errors import Failed
from .rounds import MIN_CALLS, TOLERANCE, Block, WarmUp

__all__ = [
    "Trtexec",
    "build_flags",
    "exported_outputs",
    "exported_times",
    "inference_options",
    "performance",
    "run_flags",
]

PLACES_OF_TRTEXEC = ("/usr/src/tensorrt/bin", os.path.join("/opt", "tensorrt", "bin"), "/usr/local/tensorrt/bin")
#: Batches that are compared: each is a process.
COMPARED = 8
#: Rows of the engine that judges all images, where the batch is free.
WIDE = 250
WARM_UP_MS = 200
HOUR = 3600.0
#: What is asked for, and how trtexec names it among its inference options: a call is copying in, the engine as a CUDA
#: graph, and copying out, one after the other. Versions have other defaults (11 captures a graph and copies nothing, 8
#: and 10 do the opposite), so every option is given that --help knows, and what the tool says it did is kept.
TIMED_WITH = (
    ("--useCudaGraph", "CUDA Graph"),
    ("--useSpinWait", "Spin-wait"),
    ("--includeDataTransfers", "Data transfers"),
    ("--exposeDMA", "ExposeDMA"),
)


def version_of(text: str) -> Optional[str]:
    """The version in `[TensorRT v8602]`, `[TensorRT v100300]` or `[TensorRT v110000]`: 8.6.2, 10.3.0, 11.0.0."""
    found = re.search(r"\[TensorRT v(\d+)\]", text)
    if found is None:
        return None
    number = int(found.group(1))
    major, rest = (number // 10000, number % 10000) if number >= 10000 else (number // 1000, number % 1000)
    return "%d.%d.%d" % (major, rest // 100, rest % 100)


def performance(text: str) -> Dict[str, Dict[str, float]]:
    """The performance summary: milliseconds by metric ("GPU Compute Time", "Latency") and figure ("median", "mean")."""
    found = {}
    for name, figures in re.findall(r"\[I\] ([A-Z][\w ]+): (min = .*)", text):
        pairs = re.findall(r"([\w()%.]+) = (-?[\d.e+-]+) ms", figures)
        found[name] = {key: float(value) for key, value in pairs}
    return found


def inference_options(text: str) -> Dict[str, str]:
    """What trtexec says of how it times: the lines `[I] Spin-wait: Disabled` below `=== Inference Options ===`."""
    section = text.partition("=== Inference Options ===")[2].partition("===")[0]
    return dict(re.findall(r"\[I\] ([\w -]+): ?(.*\S)", section))


def exported_times(text: str) -> List[Dict[str, float]]:
    """`--exportTimes`: a table per call, with "computeMs" and "latencyMs"."""
    rows = json.loads(text)
    return [{key: float(value) for key, value in row.items()} for row in rows]


def exported_outputs(text: str) -> Dict[str, "np.ndarray[Any, Any]"]:
    """`--exportOutput`: arrays by name. The tool writes nan and inf as C++ does, which JSON has not."""
    text = re.sub(r"-?\bnan\b", "NaN", re.sub(r"(-?)\binf\b", r"\1Infinity", text))
    found = {}
    for tensor in json.loads(text):
        shape = [int(size) for size in tensor["dimensions"].split("x")] if tensor["dimensions"] else []
        found[tensor["name"]] = np.asarray(tensor["values"], np.float64).reshape(shape)
    return found


def build_flags(network: Dict[str, Any], settings: Dict[str, Any], usage: str) -> List[str]:
    """Options that build an engine for the measured batch, as far as this trtexec's --help (`usage`) knows them."""
    flags = []
    if settings["strongly_typed"] and "--stronglyTyped" in usage:
        flags.append("--stronglyTyped")
    flags += ["--" + flag.lower() for flag in settings["flags"]]
    if "--builderOptimizationLevel" in usage:  # from 8.6 on
        flags.append("--builderOptimizationLevel=%d" % settings["optimization_level"])
    if settings["workspace_mb"] is not None:
        flags.append("--memPoolSize=workspace:%d" % workspace_mib(settings))
    shapes = _shapes(network, settings["batch"])
    if shapes:
        flags += ["--%sShapes=%s" % (which, shapes) for which in ("min", "opt", "max")]
    flags.append("--skipInference" if "--skipInference" in usage else "--buildOnly")
    return flags


def run_flags(network: Dict[str, Any], batch: int, usage: str) -> List[str]:
    """Options that run an engine, each stated that this trtexec's --help knows; the others are its defaults."""
    shapes = _shapes(network, batch)
    flags = ["--shapes=" + shapes] if shapes else []
    return flags + [option for option, _ in TIMED_WITH if re.search(re.escape(option) + r"\b", usage)]


def _shapes(network: Dict[str, Any], batch: int) -> str:
    """NAME:1x3x32x32,... of all inputs, or nothing where all are static: trtexec refuses shapes then."""
    if not any(isinstance(axis, str) for info in network["inputs"] for axis in info["axes"]):
        return ""
    pairs = [(info["name"], "x".join(map(str, input_shape(info, batch)))) for info in network["inputs"]]
    return ",".join("%s:%s" % pair for pair in pairs)


def said(arguments: List[str], seconds: float = HOUR) -> str:
    """All that trtexec says, whatever its exit code."""
    try:
        done = subprocess.run(
            [tool(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed("trtexec does not run: %s" % error)
    return done.stdout.decode("utf-8", "replace")


def tool() -> str:
    path = shutil.which("trtexec") or shutil.which("trtexec", path=os.pathsep.join(PLACES_OF_TRTEXEC))
    if path is None:
        hint = "on a Jetson: sudo apt install nvidia-jetpack (it comes with libnvinfer-bin)"
        raise Failed("trtexec is neither in PATH nor in %s" % PLACES_OF_TRTEXEC[0], hint)
    return path


class Trtexec:
    """One network's engine, timed by processes of trtexec."""

    name = "trtexec"
    timed = "trtexec's latency: copying in, the engine and copying out, each between CUDA events"

    def __init__(self, directory: str, network: Dict[str, Any], profile: Dict[str, Any], out: str) -> None:
        self.usage = said(["--help"], 60.0)
        version = version_of(self.usage) or self.version()
        self.directory, self.network, self.profile, self.out = directory, network, profile, out
        settings = engine_settings(network, profile, version)
        identity = dict(settings, tensorrt=version, sha256=network["sha256"], by="trtexec", **self.device())
        self.path = os.path.join(out, ENGINES, "%s.%d.trtexec.engine" % (network["name"], network["batch"]))
        self.facts: Dict[str, Any] = {"engine": identity}
        if not kept_engine(self.path, identity):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            onnx = os.path.join(directory, network["file"])
            cache = timing_cache(out, version, identity.get("gpu"))
            flags = build_flags(network, settings, self.usage)
            self._passed(said(["--onnx=" + onnx, "--saveEngine=" + self.path, "--timingCacheFile=" + cache, *flags]))
            write_json(self.path + ".json", identity)

    @staticmethod
    def version() -> str:
        found = version_of(said(["--version"], 60.0))
        if found is None:
            raise Failed("trtexec does not say its version", "does `trtexec --version` work?")
        return found

    @staticmethod
    def device() -> Dict[str, Any]:
        """By CUDA's runtime where it is found, which counts as trtexec does; else nvidia-smi's first; or nothing."""
        try:
            return dict(described_gpu())
        except Failed:
            cards = smi_cards()[:1]
        return {"gpu": cards[0]["name"], "compute_capability": cards[0]["compute_capability"]} if cards else {}

    @staticmethod
    def _passed(text: str) -> str:
        if "&&&& PASSED" not in text:
            errors = re.findall(r"\[E\] (.*)", text)
            raise Failed("trtexec failed: %s" % "; ".join(errors[:3] or [text.strip()[-300:]]))
        return text

    def _file(self, name: str) -> str:
        return os.path.join(self.out, ENGINES, "%s.%s" % (self.network["name"], name))

    def _times(self, calls: int) -> List[Dict[str, float]]:
        path = self._file("times.json")
        flags = run_flags(self.network, self.network["batch"], self.usage)
        lasts = ["--warmUp=%d" % WARM_UP_MS, "--duration=0", "--iterations=%d" % calls, "--exportTimes=" + path]
        text = self._passed(said(["--loadEngine=" + self.path, *flags, *lasts]))
        self.facts.update(inference_options=inference_options(text), performance=performance(text))
        with open(path, encoding="utf-8") as stream:
            return exported_times(stream.read())

    def run(self, fed: Arrays) -> Arrays:
        loads = []
        for i, (name, array) in enumerate(fed.items()):
            file = self._file("input%d.bin" % i)
            array.tofile(file)
            loads.append("%s:%s" % (name, file))
        path = self._file("output.json")
        flags = run_flags(self.network, self.network["batch"], self.usage)
        once = ["--warmUp=0", "--duration=0", "--iterations=1", "--exportOutput=" + path]
        self._passed(said(["--loadEngine=" + self.path, "--loadInputs=" + ",".join(loads), *flags, *once]))
        with open(path, encoding="utf-8") as stream:
            return exported_outputs(stream.read())

    #: Rows that are compared are few, as each batch is a process.
    compared_batches = COMPARED

    def wide(self, rows: int) -> Optional["Trtexec"]:
        """The same file as an engine for many rows at once, which judges all images; None where its batch is fixed."""
        if not all(isinstance(info["axes"][0], str) for info in self.network["inputs"]):
            return None
        network = dict(self.network, batch=min(WIDE, rows))
        return Trtexec(self.directory, network, self.profile, self.out)

    def prepare(self, fed: Arrays, protocol: Dict[str, Any]) -> WarmUp:
        times = [row["latencyMs"] for row in self._times(50)]
        typical = max(float(np.percentile(times, 25)), 1e-3)
        self.kept = max(MIN_CALLS, round(protocol["block_s"] * 1e3 / typical))
        halves = [float(np.median(half)) for half in np.array_split(np.asarray(times), 2)]
        return self.kept, WARM_UP_MS / 1e3, abs(halves[1] / halves[0] - 1) <= TOLERANCE

    def reopen(self) -> None:
        """Each block is a process anyway."""

    def block(self) -> Block:
        rows = self._times(self.kept)
        return {
            "ns": [int(row["latencyMs"] * 1e6) for row in rows],
            "compute_ns": [int(row["computeMs"] * 1e6) for row in rows],
            "transfers_ns": [int((row["h2dMs"] + row["d2hMs"]) * 1e6) for row in rows],
        }

    def warnings(self) -> List[str]:
        """What trtexec timed otherwise than it was asked."""
        options = self.facts.get("inference_options", {})
        wrong = [(name, options[name]) for _, name in TIMED_WITH if options.get(name, "Enabled") != "Enabled"]
        return ["trtexec timed with %s: %s" % pair for pair in wrong]

    def close(self) -> None:
        """Nothing is held."""
