"""The measuring protocol, as edgekd has it: rounds, in each of which every network has one block of calls.

Rounds draw their order anew, what is compared is compared round by round, and they go on until every median and every
ratio to the first network is known within the protocol's precision.
"""

from __future__ import annotations

import gc
import math
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

__all__ = ["WarmUp", "measure_rounds", "timed_block", "warmed_up"]

#: As in edgekd/bench/measure.py, where the reasons are.
MIN_ROUNDS, MIN_CALLS, REOPENED, LOOKS = 3, 3, 4, 1.25
WINDOWS, TOLERANCE, PATIENCE = 3, 0.02, 10.0
RESAMPLES = 4000
#: Calls that are kept in results.json, per network and round.
STORED = 2000
Z95 = 1.959963984540054

#: Calls kept per block, seconds of warm-up, whether it became steady.
WarmUp = Tuple[int, float, bool]
#: What a block of calls gives: nanoseconds per call under "ns", and of its parts where the runtime tells them.
Block = Dict[str, List[int]]


def warmed_up(call: Callable[[], None], protocol: Dict[str, Any]) -> WarmUp:
    """Call until two sets of windows agree; the faster half of the last one tells how many calls fill a block."""
    medians: List[float] = []
    start = time.perf_counter()
    while True:
        taken: List[int] = []
        opened = time.perf_counter()
        while time.perf_counter() - opened < protocol["warmup_s"] / (2 * WINDOWS) or len(taken) < MIN_CALLS:
            begin = time.perf_counter_ns()
            call()
            taken.append(time.perf_counter_ns() - begin)
        medians.append(float(np.median(taken)))
        elapsed = time.perf_counter() - start
        earlier, later = medians[-2 * WINDOWS : -WINDOWS], medians[-WINDOWS:]
        if len(earlier) < WINDOWS or elapsed < protocol["warmup_s"]:
            continue
        steady = abs(float(np.median(later) / np.median(earlier)) - 1) <= TOLERANCE
        if steady or elapsed >= PATIENCE * protocol["warmup_s"]:
            break
    typical = max(float(np.percentile(taken, 25)), 1.0)
    return max(MIN_CALLS, round(protocol["block_s"] * 1e9 / typical)), elapsed, bool(steady)


def timed_block(call: Callable[[], None], kept: int, after: Optional[Callable[[], None]] = None) -> List[int]:
    """Nanoseconds of `kept` consecutive calls; a tenth as many, at least two, go before and are not kept.

    `after` is called after each kept one, outside of its time.
    """
    clock = time.perf_counter_ns
    for _ in range(max(2, math.ceil(kept / 10))):
        call()
    taken = [0] * kept
    for i in range(kept):
        begin = clock()
        call()
        taken[i] = clock() - begin
        if after is not None:
            after()
    return taken


def measure_rounds(
    blocks: Dict[str, Callable[[], Block]],
    protocol: Dict[str, Any],
    rounds: List[Dict[str, Any]],
    after: Callable[[Dict[str, Any], int], None],
    session: int,
    reopen: Optional[Callable[[], None]] = None,
) -> None:
    """Add rounds to `rounds` until they are enough; `after(round, wanted)` is told each, and writes it down.

    Rounds of an earlier session count. Every fourth begins with `reopen()`.
    """
    names = list(blocks)
    rng = np.random.default_rng([session, len(rounds)])
    look = _next_look(int(protocol["rounds"]), len(rounds))
    start = time.monotonic()
    fresh = 0
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while not (rounds and len(rounds) >= look and settled(rounds, names, protocol["precision"])):
            if len(rounds) >= look:
                look = math.ceil(look * LOOKS)
            if len(rounds) >= MIN_ROUNDS and time.monotonic() - start >= protocol["cap_s"]:
                break
            if reopen is not None and fresh and fresh % REOPENED == 0:
                reopen()
            order = [names[i] for i in rng.permutation(len(names))]
            found = {name: blocks[name]() for name in order}
            fresh += 1
            told = {name: described(found[name]) for name in names}
            rounds.append({"session": session, "order": order, "networks": told})
            after(rounds[-1], max(look, len(rounds)))
    finally:
        if enabled:
            gc.enable()


def described(block: Block) -> Dict[str, Any]:
    """A block's samples with their median and percentiles, in milliseconds."""
    milliseconds = np.asarray(block["ns"], dtype=np.float64) / 1e6
    values = np.percentile(milliseconds, [50, 90, 95, 99])
    told: Dict[str, Any] = {"p%d" % share: round(float(v), 6) for share, v in zip((50, 90, 95, 99), values)}
    for key in sorted(set(block) - {"ns"}):
        told[key.replace("_ns", "_p50")] = round(float(np.median(block[key])) / 1e6, 6)
    kept = block["ns"]
    if len(kept) > STORED:  # of very fast networks: as many quantiles stand for all calls
        kept = [int(v) for v in np.quantile(np.asarray(kept), (np.arange(STORED) + 0.5) / STORED)]
    return dict(told, ns=kept)


def settled(rounds: Sequence[Dict[str, Any]], names: Sequence[str], precision: float) -> bool:
    """Whether every median, and every ratio to the first network, is known within `precision` of it."""
    medians = [[r["networks"][name]["p50"] for r in rounds] for name in names]
    ratios = [[own / first for own, first in zip(series, medians[0])] for series in medians[1:]]
    for series in [*medians, *ratios]:
        value, low, high = median_interval(series)
        if max(high - value, value - low) > precision * value:
            return False
    return True


def median_interval(values: Sequence[float]) -> Tuple[float, float, float]:
    """The median of the rounds with its 95 % bootstrap interval: edgekd.bench.stats.bootstrap_median."""
    x = np.asarray(values, dtype=np.float64)
    value = float(np.median(x))
    if len(x) == 1:
        return value, value, value
    drawn = x[np.random.default_rng(0).integers(0, len(x), (RESAMPLES, len(x)))]
    tail = 0.5 * math.erfc(math.sqrt(len(x) / (len(x) - 1)) * _t975(len(x) - 1) / math.sqrt(2))
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return value, float(min(low, value)), float(max(high, value))


def _t975(degrees: int) -> float:
    z, v = Z95, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _next_look(first: int, done: int) -> int:
    look = first
    while look < done:
        look = math.ceil(look * LOOKS)
    return look
