"""A script: a bundle's run.py builds an engine, by the real API and compiler of TensorRT-RTX, without a GPU.

    python rtx_build.py RUN.PY FILE BATCH CACHE

TensorRT-RTX is strongly typed, as TensorRT 11 is, and has its API; what it wants beside is a target to compile for.
Prints {"bytes": n} or {"problem": text}.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx_bindings as rtx


class Builder:
    """The real one, whose configurations are for compute capability 8.6."""

    def __init__(self, log: Any) -> None:
        self.real = rtx.Builder(log)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def create_builder_config(self) -> Any:
        config = self.real.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
        return config


class TensorRT11:
    """The module as the runner sees it."""

    __version__ = "11.0.0"
    Builder = Builder

    def __getattr__(self, name: str) -> Any:
        return getattr(rtx, name)


def main() -> None:
    runner, path, batch, cache = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    sys.path.insert(0, str(runner.parent))
    run = importlib.import_module(runner.stem)
    graph = onnx.load(path).graph
    inputs = [
        {"name": i.name, "axes": [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim]}
        for i in graph.input
    ]
    network = {"precision": "int8", "typed_half": False, "batch": batch, "inputs": inputs}
    trt = TensorRT11()
    try:
        settings = run.engine_settings(network, {}, trt.__version__)
        told = {"bytes": len(run.build_engine(trt, path, network, settings, run.logger_of(trt), cache))}
    except run.Failed as error:
        told = {"problem": error.what}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
