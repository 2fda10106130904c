"""Where 8-bit weights do not suit a processor: products of u8 x s8 that are added in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..quant import Scheme

__all__ = ["SEVEN_BITS", "saturation"]

#: What recipes say to have weights whose products never saturate.
SEVEN_BITS = 'profiles = ["cpu-x86-avx2"]'
#: Any of these adds u8 x s8 products in 32 bits.
WIDE = {"avx512_vnni", "avx_vnni", "amx_int8"}


def saturation(scheme: Scheme, environment: Mapping[str, Any]) -> str | None:
    """A warning where files of this scheme may saturate on this machine (`edgekd.bench.environment`); or None.

    VPMADDUBSW, which x86 without VNNI has, adds two products of u8 x s8 in int16: 2 * 255 * 127 > 32767.
    Source: Intel, oneDNN developer guide, "Nuances of int8 computations".
    """
    if not scheme.name.startswith("x86-") or scheme.weight_bits != 8:
        return None
    if str(environment["machine"]).lower() not in ("x86_64", "amd64") or WIDE & set(environment["instruction_sets"]):
        return None
    return f"this CPU has no VNNI: sums of {scheme.name}'s products may saturate, and answers differ without a word"
