"""The measuring protocol: everything that is compared is measured interleaved, in one process.

The median of one model differs up to twofold between processes, while ratios within one agree to half a percent.
So there are rounds; in each, every variant has one block of consecutive calls (call-by-call interleaving would
measure cold caches), in an order drawn anew, and what is compared is compared round by round.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ..errors import EdgekdError, UsageError
from ..profile import Protocol
from ..runtimes import Feed, Session
from .results import Latency
from .stats import summarize

__all__ = ["measure_latency", "throughput"]

#: Fewer rounds have no interval worth the name, so the time cap does not cut below.
MIN_ROUNDS = 3
#: Kept calls per block, at least: of very slow networks.
MIN_CALLS = 3


def measure_latency(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Feed],
    protocol: Protocol,
    threads: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Latency], dict[str, list[list[float]]]]:
    """Milliseconds per call of every variant: their summaries, and the raw samples by variant and round.

    Each variant is called for `protocol.warmup_s`; then come `protocol.rounds` rounds, and none is begun after
    `protocol.cap_s` (three are always done). A block lasts about `protocol.block_s`, has the same number of calls in
    every round, and the calls at its start that refill the caches are not kept. The clock is read around a call on
    preallocated inputs and outputs, with Python's garbage collection off. `threads` is recorded: sessions are opened
    with it. `progress(done, rounds)` is called after each round. Raises UsageError (a feed is missing or does not fit)
    or StageError (a runtime failed).
    """
    calls = {}
    for name, session in sessions.items():
        if name not in feeds:
            raise UsageError(f"nothing to feed to {name!r}", where="bench")
        calls[name] = session.bound(feeds[name])
    rounds: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = list(calls)
    rng = np.random.default_rng(seed)
    with _no_garbage_collection():
        kept = {name: _calls_per_block(call, protocol) for name, call in calls.items()}
        start = time.perf_counter()
        for done in range(protocol.rounds):
            if done >= MIN_ROUNDS and time.perf_counter() - start >= protocol.cap_s:
                break
            for position in rng.permutation(len(order)):
                name = order[position]
                rounds[name].append(_block(calls[name], kept[name]))
            if progress is not None:
                progress(done + 1, protocol.rounds)
    summaries = {
        name: summarize(samples, batch=_batch(feeds[name]), threads=threads, seed=seed)
        for name, samples in rounds.items()
    }
    return summaries, rounds


def throughput(
    session: Session, feed_for_batch: Callable[[int], Feed], batches: Sequence[int], seconds: float
) -> dict[str, float]:
    """Images per second by batch size, each from calls for about `seconds` (at least two) after one that warms up.

    Leaves out the sizes that the network refuses, as those with a static batch axis do.
    """
    found = {}
    for batch in batches:
        try:
            call = session.bound(feed_for_batch(batch))
        except EdgekdError:
            continue
        with _no_garbage_collection():
            call()
            count, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or count < 2:
                call()
                count += 1
        found[str(batch)] = count * batch / elapsed
    return found


def _calls_per_block(call: Callable[[], None], protocol: Protocol) -> int:
    """Warm up, and see how many calls fill a block; the faster half of them tells what a warm call takes."""
    taken: list[int] = []
    start = time.perf_counter()
    while time.perf_counter() - start < protocol.warmup_s or len(taken) < MIN_CALLS:
        begin = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - begin)
    typical = max(float(np.percentile(taken, 25)), 1.0)
    return max(MIN_CALLS, round(protocol.block_s * 1e9 / typical))


def _block(call: Callable[[], None], kept: int) -> list[float]:
    """Milliseconds of `kept` consecutive calls; a tenth as many, at least two, go before and are not kept."""
    clock = time.perf_counter_ns
    for _ in range(max(2, math.ceil(kept / 10))):
        call()
    taken = [0] * kept
    for i in range(kept):
        begin = clock()
        call()
        taken[i] = clock() - begin
    return [t / 1e6 for t in taken]


def _batch(feed: Feed) -> int:
    shape = next(iter(feed.values())).shape
    return int(shape[0]) if shape else 1


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
