"""Latencies that were not measured: bounds from a datasheet, and what a user's own results make of them."""

from __future__ import annotations

from .document import Estimated, Estimates
from .fitted import Efficiency, Fit, Known, fit
from .record import estimate_of, estimates_of
from .roofline import Layer, Precision, Roofline, roofline

__all__ = [
    "Efficiency",
    "Estimated",
    "Estimates",
    "Fit",
    "Known",
    "Layer",
    "Precision",
    "Roofline",
    "estimate_of",
    "estimates_of",
    "fit",
    "roofline",
]
