"""Measurement: latency, throughput, accuracy and memory of model files in their own runtime."""

from __future__ import annotations

from .env import disturbances, environment
from .evaluate import evaluate
from .footprint import peak_memory_mb
from .measure import measure_latency, throughput
from .results import Interval, Latency, Lineage, ProfileResults, Results, Variant
from .stats import bootstrap_median_by_round, paired_drop, paired_ratio, speedup

__all__ = [
    "Interval",
    "Latency",
    "Lineage",
    "ProfileResults",
    "Results",
    "Variant",
    "bootstrap_median_by_round",
    "disturbances",
    "environment",
    "evaluate",
    "measure_latency",
    "paired_drop",
    "paired_ratio",
    "peak_memory_mb",
    "speedup",
    "throughput",
]
