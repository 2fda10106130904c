"""Engines: how they are built, by TensorRT's Python package from 8.6 to 11, and whether one may be used again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any, Dict, List, Optional

from .cuda import described_gpu
from .errors import FAILED, Failed

__all__ = ["ENGINES", "build_engine", "build_in_child", "built_here", "engine_settings", "input_shape", "kept_engine"]

ENGINES = "engines"


def engine_settings(network: Dict[str, Any], profile: Dict[str, Any], version: str) -> Dict[str, Any]:
    """How an engine is built of a network by a TensorRT: typing, precisions that it may use, effort and memory.

    Version 11 takes types from the file only. Before, so do files with fp16 tensors; the others are built weakly
    typed, an int8 one with fp16 allowed, as int8 beside fp32 is the slow case. Raises Failed for a DLA, as the GPU's
    figures would stand for it.
    """
    major, wanted = int(version.split(".")[0]), profile.get("tensorrt") or {}
    if wanted.get("dla") is not None:
        raise Failed("run.py builds for the GPU, the profile asks for DLA %d" % wanted["dla"])
    typed = major >= 11 or (major >= 10 and network["typed_half"])
    flags: List[str] = []
    if not typed:
        flags += ["INT8"] if network["precision"] == "int8" else []
        flags += ["FP16"] if network["precision"] in ("int8", "fp16") else []
    return {
        "strongly_typed": typed,
        "flags": flags,
        "optimization_level": wanted.get("optimization_level", 3),
        "workspace_mb": wanted.get("workspace_mb"),
        "batch": network["batch"],
    }


def input_shape(info: Dict[str, Any], batch: int) -> List[int]:
    """The shape that is measured: dynamic axes are the batch first, then 1."""
    return [axis if isinstance(axis, int) else (batch if i == 0 else 1) for i, axis in enumerate(info["axes"])]


def workspace_mib(settings: Dict[str, Any]) -> int:
    """The builder's memory in whole MiB, which is what trtexec takes, within workspace_mb (10^6 bytes)."""
    return max(1, int(settings["workspace_mb"]) * 10**6 >> 20)


def timing_cache(out: str, version: str, gpu: Optional[str]) -> str:
    """Where a builder's timings are kept; those of one GPU are wrong for another."""
    return os.path.join(out, ENGINES, "timing.%s.%s.cache" % (version, re.sub(r"\W+", "-", gpu or "gpu")))


def build_engine(
    trt: Any, path: str, network: Dict[str, Any], settings: Dict[str, Any], log: Any, cache: Optional[str] = None
) -> bytes:
    """A serialized engine of an ONNX file for the measured batch size. Raises Failed with TensorRT's reasons."""
    major = int(trt.__version__.split(".")[0])
    creation = trt.NetworkDefinitionCreationFlag
    bits = 0
    if major < 10:
        bits |= 1 << int(creation.EXPLICIT_BATCH)
    if settings["strongly_typed"] and hasattr(creation, "STRONGLY_TYPED"):
        bits |= 1 << int(creation.STRONGLY_TYPED)
    builder = trt.Builder(log)
    definition = builder.create_network(bits)
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(path):
        reasons = [_reason(parser.get_error(i)) for i in range(parser.num_errors)]
        raise Failed("TensorRT %s refuses it: %s" % (trt.__version__, "; ".join(reasons[:3]) or "no reason given"))
    config = builder.create_builder_config()
    for flag in settings["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = settings["optimization_level"]
    if settings["workspace_mb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib(settings) << 20)
    for content in (bytes_of(cache), b"") if cache is not None else ():  # an empty one where the kept one is refused
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, False):
            break
    if any(isinstance(axis, str) for info in network["inputs"] for axis in info["axes"]):
        shapes = builder.create_optimization_profile()
        for info in network["inputs"]:
            shape = input_shape(info, settings["batch"])
            shapes.set_shape(info["name"], shape, shape, shape)
        if config.add_optimization_profile(shapes) < 0:
            raise Failed("TensorRT %s refuses the batch of %d: %s" % (trt.__version__, settings["batch"], log.last()))
    engine = builder.build_serialized_network(definition, config)
    if engine is None:
        raise Failed("TensorRT %s does not build it: %s" % (trt.__version__, log.last()))
    timings = config.get_timing_cache() if cache is not None else None
    if cache is not None and timings is not None:
        write_bytes(cache, bytes(memoryview(timings.serialize())))
    return bytes(memoryview(engine))


def _reason(error: Any) -> str:
    """What the parser says, with the node, which 8.6 knows by number only."""
    if hasattr(error, "node_operator"):
        return "%s (%s, node %s)" % (error.desc(), error.node_operator(), error.node_name() or error.node())
    return "%s (node %d)" % (error.desc(), error.node())


def bytes_of(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def write_bytes(path: str, content: bytes) -> None:
    """Write so that a reader, or a power cut, sees the old file or the new one."""
    temporary = "%s.%d.tmp" % (path, os.getpid())
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def logger_of(trt: Any) -> Any:
    """A logger that keeps errors; TensorRT heeds the first one of a process only."""
    if not hasattr(logger_of, "made"):

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: List[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    self.errors.append(message)

            def last(self) -> str:
                return self.errors[-1][:300] if self.errors else "no reason given"

        logger_of.made = Log()  # type: ignore[attr-defined]
    return logger_of.made  # type: ignore[attr-defined]


def imported() -> Any:
    try:
        import tensorrt
    except Exception as error:  # a stub wheel raises what it likes
        hint = "on a Jetson: sudo apt install nvidia-jetpack python3-libnvinfer"
        raise Failed("TensorRT's Python package does not import: %s" % error, hint)
    return tensorrt


def build_in_child(arguments: List[str], what: str) -> None:
    """Build in a process of its own: a builder that runs out of memory takes its process with it."""
    done = subprocess.run([sys.executable, os.path.abspath(sys.argv[0]), *arguments], stdout=subprocess.PIPE)
    try:
        problem = json.loads(done.stdout.decode("utf-8").strip().split("\n")[-1])["problem"]
    except (ValueError, KeyError, TypeError):
        ended = "signal %d" % -done.returncode if done.returncode < 0 else "exit code %d" % done.returncode
        hint = "was memory short? close other programs, add swap, or set workspace_mb in the profile"
        raise Failed("building %s ended with %s" % (what, ended), hint)
    if problem is not None:
        raise Failed(problem)


def kept_engine(path: str, identity: Dict[str, Any]) -> bool:
    """Whether an engine lies there that was built of the same file, by the same TensorRT, for the same GPU."""
    try:
        with open(path + ".json", encoding="utf-8") as stream:
            return bool(json.load(stream) == identity) and os.path.getsize(path) > 0
    except (OSError, ValueError):
        return False


def built_here(directory: str, manifest: Dict[str, Any], name: str, out: str) -> int:
    """What the child does: build one engine, and say on stdout what was wrong, or nothing."""
    problem = None
    try:
        trt = imported()
        network = next(n for n in manifest["networks"] if n["name"] == name)
        settings = engine_settings(network, manifest["profile"], str(trt.__version__))
        cache = timing_cache(out, str(trt.__version__), described_gpu()["gpu"])
        path = os.path.join(out, ENGINES, name + ".engine")
        engine = build_engine(trt, os.path.join(directory, network["file"]), network, settings, logger_of(trt), cache)
        write_bytes(path, engine)
    except Failed as error:
        problem = error.what
    except OSError as error:
        problem = "cannot write the engine: %s" % error.strerror
    except Exception as error:  # the parent knows no more than what is said here
        problem = "building failed: %s: %s" % (type(error).__name__, str(error).strip()[:300])
    sys.stdout.write(json.dumps({"problem": problem}) + "\n")
    return 0 if problem is None else FAILED
