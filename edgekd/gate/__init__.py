"""The gate: rules from a recipe's `[gate]` judged against what was measured. Pure, and free of torch.

    accuracy = { min = 0.9, drop = 0.01 }      any metric of the task; drop is against the teacher, same images
    latency  = { p50 = { max = 2.0, speedup = 4.0 } }      milliseconds; against the teacher, same rounds
    size_mb  = { max = 1.0 }                   also parameters, macs, peak_memory_mb; agreement = { min = 0.95 }

A latency is judged by its whole 95 % interval: inside is a pass, beyond a failure, across the limit inconclusive.
Accuracy is judged on the figure itself, since more rounds never narrow a fixed test set; the paired interval is
shown beside it.
"""

from __future__ import annotations

from .judging import judge
from .rules import OWN_METRICS, RuleFor, parse_rules
from .verdict import Verdict, exit_code, lines, read, write_gate

__all__ = ["OWN_METRICS", "RuleFor", "Verdict", "exit_code", "judge", "lines", "parse_rules", "read", "write_gate"]
