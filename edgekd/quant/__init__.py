"""Quantization: schemes, fake-quantized networks that train, and their conversion to integers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .scheme import SCHEMES, Scheme, scheme_named

if TYPE_CHECKING:
    from .prepared import calibrate, convert, enable_fake_quant, freeze, prepare

__all__ = ["SCHEMES", "Scheme", "calibrate", "convert", "enable_fake_quant", "freeze", "prepare", "scheme_named"]


def __getattr__(name: str) -> Any:
    # torchao takes longer to import than everything else together; only a stage that quantizes should wait for it.
    if name in __all__:
        return getattr(importlib.import_module(".prepared", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
