"""The measuring protocol: everything that is compared is measured interleaved, in one process.

The median of one model differs up to twofold between processes, while ratios within one agree to half a percent.
So there are rounds; in each, every variant has one block of consecutive calls (call-by-call interleaving would
measure cold caches), in an order drawn anew, and what is compared is compared round by round.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..errors import UsageError
from ..profile import Protocol
from ..runtimes import DeviceCall, Feed, Parts, Session
from .energy import EnergyCounter
from .results import Latency
from .stats import bootstrap_median, drift, paired_ratio, summarize

__all__ = ["Measured", "Samples", "measure_latency", "pinned", "quiet", "ratios_known", "round_medians", "unsteadiness"]

#: Milliseconds per call by variant and round.
Samples = dict[str, list[list[float]]]

#: Fewer rounds have no interval worth the name, so the time cap does not cut below.
MIN_ROUNDS = 3
#: Kept calls per block, at least: of very slow networks.
MIN_CALLS = 3
#: So many rounds are measured in one session.
REOPENED = 4
#: Between looks at the intervals the rounds grow by a quarter: many looks would stop on a lucky one.
LOOKS = 1.25
#: Warm-up is over when two sets of so many windows agree within TOLERANCE, or after PATIENCE times its least length.
WINDOWS, TOLERANCE, PATIENCE = 3, 0.02, 10.0
#: From the first third of the rounds to the last: more than this is told.
DRIFT = 0.05


@dataclass(frozen=True)
class Measured:
    """What a session of rounds gave: summaries and raw samples by variant."""

    latencies: dict[str, Latency]
    samples: Samples


@dataclass
class _Variant:
    """One variant at work."""

    call: Callable[[], None]
    kept: int
    warmup_s: float
    steady: bool
    rounds: list[list[float]] = field(default_factory=list)
    energy_mj: list[float] = field(default_factory=list)
    parts: dict[str, list[list[float]]] = field(default_factory=dict)
    session: Session | None = None


def measure_latency(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Feed],
    protocol: Protocol,
    threads: int,
    *,
    seed: int = 0,
    reopen: Callable[[str], Session] | None = None,
    settled: Callable[[Samples], bool] | None = None,
    energy: EnergyCounter | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Milliseconds per call of every variant, their intervals, and the raw samples.

    Each variant is called until it is steady. Then come `protocol.rounds` rounds, and more until `settled(samples)`
    (default: every median and every ratio to the first variant is known within `protocol.precision`); none is begun
    after `protocol.cap_s`, but three are always done. A block lasts about `protocol.block_s`, has the same number of
    calls in every round, and the calls at its start that refill the caches are not kept. With `reopen(name)` every
    fourth round begins with sessions opened anew: where a model comes to lie in memory is worth some tenths of a
    percent, and one session has but one place (Mytkowicz et al. 2009, Producing wrong data). The clock is read around a
    call on preallocated inputs and outputs, with Python's garbage collection off. On a device with memory of its own a
    call includes the copies to and from it, and `Latency.parts` tells them from compute. `threads` is recorded:
    sessions are opened with it. `energy` counts joules, where the device does. `progress(done, rounds)` is called after
    each round.
    Raises UsageError (a feed is missing or does not fit) or StageError (a runtime failed).
    """
    settled = settled or (lambda samples: _known(samples, protocol.precision))
    calls = {}
    for name, session in sessions.items():
        if name not in feeds:
            raise UsageError(f"nothing to feed to {name!r}", where="bench")
        calls[name] = session.bound(feeds[name])
    rng = np.random.default_rng(seed)
    with quiet():
        variants = {name: _warmed_up(call, protocol) for name, call in calls.items()}
        names = list(variants)
        start = time.perf_counter()
        done, look = 0, protocol.rounds
        while done < MIN_ROUNDS or time.perf_counter() - start < protocol.cap_s:
            if reopen is not None and done and done % REOPENED == 0:
                for name, variant in variants.items():
                    _move(variant, reopen(name), feeds[name])
            for position in rng.permutation(len(names)):
                _block(variants[names[position]], energy)
            done += 1
            if progress is not None:
                progress(done, max(done, look))
            if done >= look:
                if settled({name: v.rounds for name, v in variants.items()}):
                    break
                look = math.ceil(look * LOOKS)
        for variant in variants.values():
            if variant.session is not None:
                variant.session.close()
    summaries = {
        name: summarize(
            v.rounds,
            batch=_batch(feeds[name]),
            threads=threads,
            warmup_s=v.warmup_s,
            steady=v.steady,
            energy_mj=bootstrap_median(v.energy_mj, seed) if v.energy_mj else None,
            parts=v.parts,
            seed=seed,
        )
        for name, v in variants.items()
    }
    return Measured(summaries, {name: v.rounds for name, v in variants.items()})


def round_medians(samples: Samples) -> dict[str, list[float]]:
    """The median of each round, by variant: what is compared."""
    return {name: [float(np.median(r)) for r in rounds] for name, rounds in samples.items()}


def ratios_known(samples: Samples, precision: float) -> bool:
    """Whether every variant's ratio to the first one is known within `precision` (a share of it)."""
    first, *others = round_medians(samples).values()
    ratios = [paired_ratio(own, first) for own in others]
    return all(max(r.high - r.value, r.value - r.low) <= precision * r.value for r in ratios)


def _known(samples: Samples, precision: float) -> bool:
    medians = [bootstrap_median(found) for found in round_medians(samples).values()]
    return ratios_known(samples, precision) and all(
        max(m.high - m.value, m.value - m.low) <= precision * m.value for m in medians
    )


def unsteadiness(latencies: Mapping[str, Latency], protocol: Protocol) -> list[str]:
    """What the samples themselves say against a measurement: a sentence each, with what helps; empty if nothing."""
    found = []
    for name, latency in latencies.items():
        p50 = latency.p50
        if not latency.steady:
            found.append(f"{name} was not steady after {latency.warmup_s:.1f} s of warm-up: raise warmup_s")
        change = drift(latency.round_p50) or 0.0
        if abs(change) > DRIFT:
            more = "slower" if change > 0 else "faster"
            found.append(
                f"{name} became {abs(change):.0%} {more} from the first third of the rounds to the last: "
                "throttling, or other work on the machine; see `sensors` and `ps -eo pcpu,comm --sort -pcpu | head`"
            )
        width = max(p50.high - p50.value, p50.value - p50.low) / p50.value if p50.value else 0
        if width > 2 * protocol.precision and len(latency.round_p50) > MIN_ROUNDS:
            found.append(
                f"the median of {name} is known within {width:.1%} only, {protocol.precision:.1%} were asked: "
                "raise cap_s, or measure on a quieter machine"
            )
    return found


def _warmed_up(call: Callable[[], None], protocol: Protocol) -> _Variant:
    """Call until two sets of windows agree, and see how many calls fill a block.

    The faster half of the last window tells what a warm call takes.
    """
    medians: list[float] = []
    start = time.perf_counter()
    while True:
        taken: list[int] = []
        opened = time.perf_counter()
        while time.perf_counter() - opened < protocol.warmup_s / (2 * WINDOWS) or len(taken) < MIN_CALLS:
            begin = time.perf_counter_ns()
            call()
            taken.append(time.perf_counter_ns() - begin)
        medians.append(float(np.median(taken)))
        elapsed = time.perf_counter() - start
        earlier, later = medians[-2 * WINDOWS : -WINDOWS], medians[-WINDOWS:]
        if len(earlier) < WINDOWS or elapsed < protocol.warmup_s:
            continue
        steady = abs(float(np.median(later) / np.median(earlier)) - 1) <= TOLERANCE
        if steady or elapsed >= PATIENCE * protocol.warmup_s:
            break
    typical = max(float(np.percentile(taken, 25)), 1.0)
    return _Variant(call, max(MIN_CALLS, round(protocol.block_s * 1e9 / typical)), elapsed, steady)


def _move(variant: _Variant, session: Session, feed: Feed) -> None:
    """Let a variant go on in a new session; the one that it was opened with stays with the caller."""
    variant.call = session.bound(feed)
    if variant.session is not None:
        variant.session.close()
    variant.session = session


def _block(variant: _Variant, energy: EnergyCounter | None) -> None:
    """Time `kept` consecutive calls; a tenth as many, at least two, go before and are not kept."""
    clock, call, kept = time.perf_counter_ns, variant.call, variant.kept
    for _ in range(max(2, math.ceil(kept / 10))):
        call()
    taken = [0] * kept
    parts: list[Parts] = []
    device = call if isinstance(call, DeviceCall) else None
    before = energy() if energy is not None else 0.0
    for i in range(kept):
        begin = clock()
        call()
        taken[i] = clock() - begin
        if device is not None:
            parts.append(device.parts())
    if energy is not None:
        variant.energy_mj.append((energy() - before) * 1e3 / kept)
    variant.rounds.append([t / 1e6 for t in taken])
    for name in parts[0] if parts else ():
        variant.parts.setdefault(name, []).append([found[name] for found in parts])


def _batch(feed: Feed) -> int:
    shape = next(iter(feed.values())).shape
    return int(shape[0]) if shape else 1


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection meanwhile."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def pinned(cores: Sequence[int], where: str = "affinity") -> Iterator[None]:
    """Run on these CPU cores only; threads that are started meanwhile stay on them. Nothing for no cores.

    Raises UsageError for cores that this process may not use, or where the system cannot pin.
    """
    if not cores:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("this system cannot pin a process to cores", where=where, hint="leave affinity out")
    before = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - before):
        raise UsageError(f"no core {missing[0]} here", where=where, hint=f"there are: {', '.join(map(str, before))}")
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
