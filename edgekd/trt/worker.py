"""Compile one ONNX file with TensorRT-RTX, in a process that does nothing else.

    python worker.py FILE COMPUTE_CAPABILITY MIN,OPT,MAX

A script of its own, imported by nothing: TensorRT heeds the first logger of a process only, and may end it. Every
message of the compiler goes to stdout as it comes, one JSON list [severity, text] a line, and at the end one JSON
object. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    path, capability, batches = sys.argv[1], sys.argv[2], [int(n) for n in sys.argv[3].split(",")]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        import tensorrt_rtx_bindings as trt
    except (ImportError, OSError) as error:
        say({"missing": str(error)})
        return

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            say([severity.name, message])

    say({"version": trt.__version__, **compiled(trt, Log(), path, capability, batches)})


def compiled(trt: Any, log: Any, path: str, capability: str, batches: list[int]) -> dict[str, Any]:
    """What became of the file: nodes the parser refuses, inputs with open axes, and the engine's size in bytes."""
    began = time.monotonic()
    builder = trt.Builder(log)
    network = builder.create_network(0)  # always strongly typed: types are the file's
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(path)
    refused = [
        {"node": e.node_name(), "op": e.node_operator(), "what": e.desc(), "code": e.code().name}
        for e in (parser.get_error(i) for i in range(parser.num_errors))
    ]
    told: dict[str, Any] = {"refused": refused, "open_axes": {}, "engine_bytes": None}
    if parsed and network.num_outputs == 0:  # any text, and nothing at all, is a model with an empty graph
        told["refused"] = [{"node": "", "op": "", "what": "no outputs", "code": "MODEL_DESERIALIZE_FAILED"}]
    elif parsed:
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = 1
        target = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""), None)
        if target is None or not config.set_compute_capability(target, 0):
            return {**told, "no_target": capability}
        told["open_axes"] = add_profile(builder, config, network, batches)
        if not told["open_axes"]:
            engine = builder.build_serialized_network(network, config)
            told["engine_bytes"] = None if engine is None else engine.nbytes
    return {**told, "seconds": time.monotonic() - began}


def add_profile(builder: Any, config: Any, network: Any, batches: list[int]) -> dict[str, list[int]]:
    """Let the first axis of inputs be the batch; of inputs with other axes open, these axes."""
    profile, dynamic, others = builder.create_optimization_profile(), False, {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        open_axes = [axis for axis, size in enumerate(tensor.shape) if size < 0]
        if any(open_axes):
            others[tensor.name] = [axis for axis in open_axes if axis]
        elif open_axes:
            dynamic = True
            profile.set_shape(tensor.name, *((batch, *tuple(tensor.shape)[1:]) for batch in batches))
    if dynamic and not others:
        config.add_optimization_profile(profile)
    return others


if __name__ == "__main__":
    main()
