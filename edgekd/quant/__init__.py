"""Quantization: schemes, fake-quantized networks that train, and their conversion to integers."""

from __future__ import annotations

from .prepared import calibrate, convert, enable_fake_quant, freeze, prepare
from .scheme import SCHEMES, Scheme, scheme_named

__all__ = ["SCHEMES", "Scheme", "calibrate", "convert", "enable_fake_quant", "freeze", "prepare", "scheme_named"]
