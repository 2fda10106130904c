"""What verification found of one file, as one versioned JSON document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .compiler import Refusal
from .findings import Finding

__all__ = ["Fused", "MatrixLayer", "Verification"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fused(_Record):
    """An ONNX node that is computed within the same engine layer."""

    node: str
    op: str


class MatrixLayer(_Record):
    """One convolution or matrix product of the file."""

    node: str
    path: str | None = Field(description="of the module, where the file has it")
    op: str
    wanted: str = Field(description="int8 where both factors come from DequantizeLinear, else the tensors' type")
    why: str | None = Field(None, description="it is not int8 in a file that has int8 layers, where that is known")
    got: str | None = Field(None, description="of the engine's layer; null without a compiler or a layer of its own")
    output: str | None = Field(None, description="type that the engine's layer writes")
    engine_layer: str | None = None
    engine_type: str | None = None
    fused: list[Fused] = []

    @property
    def name(self) -> str:
        return self.path or self.node


class Verification(_Record):
    """One file, judged for one profile."""

    version: int = 1
    file: str
    profile: str
    tensorrt: str
    compute_capability: str | None = Field(description="of the device")
    origin: Literal["compiled", "static"] = Field(description="static: by rules alone, no compiler judged it")
    compiler: str | None = None
    compiled_for: str | None = Field(None, description="compute capability; the nearest that the compiler has")
    compiled: bool | None = Field(None, description="whether there is an engine; null without a compiler")
    why: str | None = Field(None, description="why there is none")
    refused: list[Refusal] = Field(default=[], description="nodes that the parser does not take")
    findings: list[Finding] = Field(description="of the rules that hold without a compiler")
    layers: list[MatrixLayer]
    wanted: dict[str, int] = Field(description="matrix layers by the precision that the file wants")
    got: dict[str, int] = Field(default={}, description="the same by the precision of the engine")
    seconds: float | None = Field(None, description="of parsing and building")
    notes: list[str] = []

    @property
    def silently_float(self) -> list[MatrixLayer]:
        """Layers that should be int8 and are not."""
        if not self.compiled:
            return []
        return [layer for layer in self.layers if layer.wanted == "int8" and layer.got != "int8"]

    @property
    def ok(self) -> bool:
        """Whether it is taken, and every layer that should be int8 is."""
        bad = any(finding.severity in ("refused", "float") for finding in self.findings)
        return not bad and self.compiled is not False and not self.silently_float
