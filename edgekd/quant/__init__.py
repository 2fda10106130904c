"""Quantization: schemes, fake-quantized networks that train, and their conversion to integers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .scheme import SCHEMES, Scheme, scheme_named

if TYPE_CHECKING:
    from .bias import correct_bias
    from .calibration import calibrate
    from .equalisation import equalise
    from .placed import Placement, matrix_layers, placements
    from .prepared import convert, enable_fake_quant, freeze, prepare
    from .rounding import adapt_rounding
    from .sensitivity import harms

__all__ = [
    "SCHEMES",
    "Placement",
    "Scheme",
    "adapt_rounding",
    "calibrate",
    "convert",
    "correct_bias",
    "enable_fake_quant",
    "equalise",
    "freeze",
    "harms",
    "matrix_layers",
    "placements",
    "prepare",
    "scheme_named",
]

_PLACES = {
    "bias": ("correct_bias",),
    "calibration": ("calibrate",),
    "equalisation": ("equalise",),
    "placed": ("Placement", "matrix_layers", "placements"),
    "prepared": ("convert", "enable_fake_quant", "freeze", "prepare"),
    "rounding": ("adapt_rounding",),
    "sensitivity": ("harms",),
}


def __getattr__(name: str) -> Any:
    # torchao takes longer to import than everything else together; only a stage that quantizes should wait for it.
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
