"""The layers of an engine, read from the verbose log of its build."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["EngineLayer", "engine_layers"]

#: One line of the block `Layers:`, as TensorRT-RTX 1.7 writes it with ProfilingVerbosity.DETAILED.
LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, Metadata:(?P<metadata>.*)"
)
DATATYPE = re.compile(r"Dimensions: \[[^]]*\], .*?Datatype: (\w+)")
NODE = "[ONNX Layer: "
#: Between the nodes of one layer.
SEPARATOR = "\x1f"
SHORT = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16"}


@dataclass(frozen=True)
class EngineLayer:
    """One step of an engine. Types are int8, fp16, bf16, fp32, and others as TensorRT names them, in lower case."""

    name: str
    #: `correlation` is a convolution, `gemm` a matrix product, `runtime_fusion` one of both with more around it,
    #: `kgen` generated code, mostly elementwise.
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    #: Names of the ONNX nodes that it computes, or parts of them.
    nodes: tuple[str, ...]


def engine_layers(log: str) -> list[EngineLayer]:
    """The layers in the order of execution; none where nothing was built.

    log: the messages of the builder at its most verbose severity, as `Compiled.log` has them.
    """
    return [_layer(match) for line in log.split("\n") if (match := LINE.match(line))]


def _layer(match: re.Match[str]) -> EngineLayer:
    return EngineLayer(
        name=match["name"],
        type=match["type"],
        inputs=_types(match["inputs"]),
        constants=_types(match["constants"]),
        outputs=_types(match["outputs"]),
        nodes=_nodes(match["metadata"]),
    )


def _types(tensors: str) -> tuple[str, ...]:
    return tuple(SHORT.get(name, name.lower()) for name in DATATYPE.findall(tensors))


def _nodes(metadata: str) -> tuple[str, ...]:
    parts = metadata.strip().split(SEPARATOR)
    return tuple(part.removeprefix(NODE).removesuffix("]") for part in parts if part.startswith(NODE))
