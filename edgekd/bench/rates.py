"""Images per second: by batch size, and over a whole set at once. Interleaved by rounds, as latency is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..errors import EdgekdError
from ..runtimes import Feed, Session
from .measure import quiet
from .results import Interval
from .stats import bootstrap_median

__all__ = ["offline", "throughput"]

ROUNDS = 5


def throughput(
    sessions: Mapping[str, Session],
    feed_for: Callable[[str, int], Feed],
    batches: Sequence[int],
    block_s: float,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Images per second by variant and batch size: medians of five rounds of `block_s` each, with their intervals.

    `feed_for(name, batch)` gives a variant's inputs. Leaves out the sizes that a network refuses, as those with a
    static batch axis do.
    """
    found: dict[str, dict[str, Interval]] = {name: {} for name in sessions}
    for batch in batches:
        calls = {}
        for name, session in sessions.items():
            try:
                calls[name] = session.bound(feed_for(name, batch))
            except EdgekdError:
                continue
        for name, rate in _rates(calls, batch, block_s, seed).items():
            found[name][str(batch)] = rate
    return found


def offline(sessions: Mapping[str, Session], feeds: Mapping[str, Sequence[Feed]], seed: int = 0) -> dict[str, Interval]:
    """Images per second when a whole set is there at once: consecutive batches, copies to the runtime included."""

    def whole(session: Session, batches: Sequence[Feed]) -> Callable[[], None]:
        def call() -> None:
            for feed in batches:
                session.run(feed)

        return call

    calls = {name: whole(session, feeds[name]) for name, session in sessions.items()}
    images = {name: sum(len(next(iter(feed.values()))) for feed in feeds[name]) for name in sessions}
    rates = _rates(calls, 1, 0.0, seed)
    return {
        name: Interval(value=r.value * images[name], low=r.low * images[name], high=r.high * images[name])
        for name, r in rates.items()
    }


def _rates(calls: Mapping[str, Callable[[], None]], batch: int, block_s: float, seed: int) -> dict[str, Interval]:
    """`batch` times calls per second of each, after a call that warms up."""
    names = list(calls)
    rng = np.random.default_rng(seed)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with quiet():
        for _ in range(ROUNDS):
            for position in rng.permutation(len(names)):
                call = calls[names[position]]
                call()
                count, start = 0, time.perf_counter()
                while (elapsed := time.perf_counter() - start) < block_s or not count:
                    call()
                    count += 1
                rates[names[position]].append(count * batch / elapsed)
    return {name: bootstrap_median(found, seed) for name, found in rates.items()}
