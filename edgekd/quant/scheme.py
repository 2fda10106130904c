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
    weight_bits: Literal[7, 8] = Field(
        8, description="7: integers from -63 to 63, whose products with uint8 do not saturate int16 in pairs"
    )
    placement: Literal["onnxruntime", "tensorrt"] = Field(description="which tensors are quantized")


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="arm-s8s8", activation_dtype="int8", activation_symmetric=False, placement="onnxruntime"),
        Scheme(name="trt-s8s8", activation_dtype="int8", activation_symmetric=True, placement="tensorrt"),
        # AVX2 and AVX-512 without VNNI add pairs of u8 x s8 products in int16, which saturates: 2 * 255 * 127 > 32767.
        Scheme(
            name="x86-u8s7",
            activation_dtype="uint8",
            activation_symmetric=False,
            weight_bits=7,
            placement="onnxruntime",
        ),
        Scheme(name="x86-u8s8", activation_dtype="uint8", activation_symmetric=False, placement="onnxruntime"),
    )
}


def scheme_named(name: str, where: str) -> Scheme:
    """The scheme called `name`. Raises UsageError with the nearest name; `where` is the recipe's or profile's key."""
    if name not in SCHEMES:
        raise UsageError(f"no quantization scheme {name!r}", where=where, hint=nearest(name, SCHEMES))
    return SCHEMES[name]
