"""Measurement: latency, throughput, accuracy and memory of model files in their own runtime."""

from __future__ import annotations

from .elsewhere import kernels_differ, not_here
from .energy import energy_counter
from .env import INSTRUCTION_SETS, disturbances, environment, others_busy, same_machine
from .evaluate import evaluate
from .footprint import footprint_of
from .layers import layer_times
from .measure import Samples, measure_latency, pinned, ratios_known, round_medians, unsteadiness
from .quality import calibration_error, class_figures, confusion_matrix, packed, unpacked
from .rates import offline, throughput
from .results import Interval, Latency, Lineage, ProfileResults, Results, Variant
from .side_by_side import noise, side_by_side
from .stats import bootstrap_median_by_round, mcnemar, paired_drop, paired_ratio, speedup, unpaired_ratio, wilson

__all__ = [
    "INSTRUCTION_SETS",
    "Interval",
    "Latency",
    "Lineage",
    "ProfileResults",
    "Results",
    "Samples",
    "Variant",
    "bootstrap_median_by_round",
    "calibration_error",
    "class_figures",
    "confusion_matrix",
    "disturbances",
    "energy_counter",
    "environment",
    "evaluate",
    "footprint_of",
    "kernels_differ",
    "layer_times",
    "mcnemar",
    "measure_latency",
    "noise",
    "not_here",
    "offline",
    "others_busy",
    "packed",
    "paired_drop",
    "paired_ratio",
    "pinned",
    "ratios_known",
    "round_medians",
    "same_machine",
    "side_by_side",
    "speedup",
    "throughput",
    "unpacked",
    "unpaired_ratio",
    "unsteadiness",
    "wilson",
]
