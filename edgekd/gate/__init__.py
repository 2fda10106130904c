"""The gate: rules from a recipe's `[gate]` judged against what was measured. Pure, and free of torch.

    accuracy = { min = 0.9, drop = 0.01 }      any metric of the task; drop is against the teacher, same images
    latency  = { p50 = { max = 2.0, speedup = 4.0 } }      milliseconds; against the teacher, same rounds
    size_mb  = { max = 1.0 }                   also parameters, macs, peak_memory_mb, load_ms, energy_mj
    agreement = { min = 0.95 }                 with the teacher's answers
    ... = { drop = 0.01, against = "prune" }   drop and speedup against another stage of the run
    ... = { regress = "5%" }                   any of these: relative worsening against a baseline
    ... = { drop = 0.01, strict = true }       asks it of the whole interval of a task's metric
    estimates = true                           where the device is elsewhere, an estimated latency may decide

A latency is judged by its whole 95 % interval: inside is a pass, beyond a failure, across the limit inconclusive.
Accuracy is judged on the figure itself, since more rounds never narrow a fixed test set; the paired interval is
shown beside it.
"""

from __future__ import annotations

from .figure import Baseline
from .judging import judge
from .rules import OWN_METRICS, RuleFor, parse_rules
from .verdict import OnInconclusive, Verdict, exit_code, lines, read, write_gate

__all__ = [
    "OWN_METRICS",
    "Baseline",
    "OnInconclusive",
    "RuleFor",
    "Verdict",
    "exit_code",
    "judge",
    "lines",
    "parse_rules",
    "read",
    "write_gate",
]
