"""Quantization schemes: which integers stand for which tensors, and where a runtime wants them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UsageError, nearest

__all__ = ["SCHEMES", "Scheme", "scheme_named"]


class Scheme(BaseModel):
    """What one runtime fuses. Weights are int8, symmetric, one scale per output channel."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    activation_dtype: Literal["uint8", "int8"]
    activation_symmetric: bool = Field(description="zero point fixed at 0")
    weight_per_channel: Literal[True] = Field(
        True, description="always: only then does quantizing a weight commute with folding its batch norm"
    )
    placement: Literal["onnxruntime", "tensorrt"] = Field(description="which tensors are quantized")


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="arm-s8s8", activation_dtype="int8", activation_symmetric=False, placement="onnxruntime"),
        Scheme(name="trt-s8s8", activation_dtype="int8", activation_symmetric=True, placement="tensorrt"),
        Scheme(name="x86-u8s8", activation_dtype="uint8", activation_symmetric=False, placement="onnxruntime"),
    )
}


def scheme_named(name: str, where: str) -> Scheme:
    """The scheme called `name`. Raises UsageError with the nearest name; `where` is the recipe's or profile's key."""
    if name not in SCHEMES:
        raise UsageError(f"no quantization scheme {name!r}", where=where, hint=nearest(name, SCHEMES))
    return SCHEMES[name]
