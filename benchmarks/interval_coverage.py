"""How often the 95 % intervals hold the truth: simulated calls whose quantiles are known.

    python benchmarks/interval_coverage.py --out benchmarks/results/interval_coverage.json

Calls are drawn by round: log-normal with a spread of 10 %, or bimodal (every fifth call half as slow again), alone or
with a random effect of each round (2 %, and 10 % as a hard case). Truth is the quantile of five million draws. For
ratios two variants share a drift that makes both 40 % slower from the first round to the last.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import write_atomically
from edgekd.bench import environment
from edgekd.bench.stats import bootstrap_median_by_round, bootstrap_quantile_by_round, paired_ratio

Array = np.ndarray[Any, Any]
SCENARIOS: dict[str, tuple[bool, float]] = {
    "log-normal": (False, 0.0),
    "log-normal, rounds differ by 2 %": (False, 0.02),
    "bimodal": (True, 0.0),
    "bimodal, rounds differ by 2 %": (True, 0.02),
    "log-normal, rounds differ by 10 % (hard)": (False, 0.10),
}
CALLS = 100


def draw(rng: np.random.Generator, bimodal: bool, effect: float, rounds: int, calls: int = CALLS) -> Array:
    x = rng.normal(0, effect, (rounds, 1)) + rng.normal(0, 0.1, (rounds, calls))
    return np.exp(x + (np.where(rng.random((rounds, calls)) < 0.2, 0.5, 0) if bimodal else 0))


def covered(interval: Callable[[int], Any], truth: float, trials: int) -> dict[str, float]:
    found = [interval(i) for i in range(trials)]
    share = float(np.mean([f.low <= truth <= f.high for f in found]))
    error = math.sqrt(share * (1 - share) / trials)
    return {
        "covered": share,
        "standard_error": error,
        "median_width": float(np.median([f.high - f.low for f in found])),
    }


def quantiles(trials: int, rounds: int) -> dict[str, Any]:
    table = {}
    for name, (bimodal, effect) in SCENARIOS.items():
        rng = np.random.default_rng(1)
        truth = draw(rng, bimodal, effect, 50_000)
        row = {}
        for label, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):

            def interval(i: int, share: float = share, bimodal: bool = bimodal, effect: float = effect) -> Any:
                sample = draw(np.random.default_rng(1000 + i), bimodal, effect, rounds)
                if share == 0.5:
                    return bootstrap_median_by_round(sample, seed=i)
                return bootstrap_quantile_by_round(sample, share, seed=i)

            row[label] = covered(interval, float(np.quantile(truth, share)), trials)
        table[name] = row
        print(f"{rounds} rounds, {name}:", {k: f"{v['covered']:.1%}" for k, v in row.items()}, flush=True)
    return table


def ratios(trials: int, rounds: int) -> dict[str, float]:
    def interval(i: int) -> Any:
        rng = np.random.default_rng(i)
        drift = np.linspace(1.0, 1.4, rounds)[:, None] * np.exp(rng.normal(0, 0.05, (rounds, 1)))
        slow, fast = (drift * m * draw(rng, False, 0.005, rounds) for m in (3.0, 1.0))
        return paired_ratio(np.median(slow, axis=1), np.median(fast, axis=1), seed=i)

    found = covered(interval, 3.0, trials)
    print(f"{rounds} rounds, ratio under drift: {found['covered']:.1%}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "trials": options.trials,
        "calls_per_round": CALLS,
        "quantiles": {str(rounds): quantiles(options.trials, rounds) for rounds in (12, 24)},
        "ratio_under_drift": {str(rounds): ratios(options.trials, rounds) for rounds in (12, 24)},
        "seconds": round(time.monotonic() - start),
        "environment": environment(),
    }
    if options.out is not None:
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
