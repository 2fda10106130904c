"""What is told of a network's layers, as one JSON-able document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Explanation", "LayerRow", "Stored", "Summary"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stored(_Record):
    """Integers in the file: their type, whether there is a scale per channel, and what they can stand for."""

    dtype: str = Field(description="u8, s8, ...")
    per_channel: bool
    scale: float | None = Field(None, description="null where there are several, or it is calculated at run time")
    zero_point: int | None = None
    low: float | None = None
    high: float | None = None


class LayerRow(_Record):
    """One matrix layer."""

    name: str = Field(description="module path where the file has it, otherwise the node's name")
    node: str
    path: str | None
    op: str
    weight: list[int] | None = Field(description="shape")
    input: list[int] | None = Field(description="shape of the first input")
    output: list[int] | None = Field(description="shape")
    parameters: int | None
    macs: int | None = Field(description="of one call")
    stored_input: Stored | None
    stored_weight: Stored | None
    stored_output: Stored | None
    bias: str
    kernel: str | None = Field(description="operator of ONNX Runtime's optimised graph")
    runs: str | None = Field(description="int8, float, w4 and the like; null where no kernel of its own is left")
    weight_sqnr_db: float | None = Field(
        None, description="against the float network's weight; after training or equalising, its own before rounding"
    )
    output_sqnr_db: float | None = Field(
        None, description="of the output, all in front of it fake-quantized too, against the same weights unquantized"
    )
    ms: float | None = Field(None, description="measured, of a usual call")
    float_ms: float | None = Field(None, description="of the same layer in the float network it came from")
    share: float | None = Field(None, description="of the time of all operators")
    why_float: list[str] = []


class Summary(_Record):
    """All layers together."""

    int8_layers: int
    float_layers: int
    other_layers: int = Field(description="integer weights with float products, or merged with other layers")
    parameters: int
    macs: int | None
    ms: float | None = Field(description="all operators of one call, by the profiler")
    float_parent_ms: float | None = Field(None, description="the same of the float network it came from")
    shares: dict[str, float] = Field(
        default={}, description="of that time: int8, float, weights (integer weights alone), conversion, other"
    )
    rest: dict[str, float] = Field(default={}, description="operators of `other` with the largest shares")
    hint: str | None = None


class Explanation(_Record):
    """One file, layer by layer."""

    file: str
    producer: str
    layers: list[LayerRow]
    summary: Summary
    measured: dict[str, Any] = Field(description="device, threads, runtime, calls; or why nothing was measured")
    against: str | None = Field(None, description="where the float weights are from")
    notes: list[str] = []
