"""Which layers to quantize: those whose int8 saves time on a device, as far as the answers allow.

What is fast is not a property of single layers: where int8 meets float there is a Q or a DQ, and blocked layouts are
reordered. So sets of layers are timed as whole networks: a few that are often best (all, only linear layers, only wide
ones, the front or the rear of the network), then the best of them with one group of neighbouring layers changed, as
long as that helps. Where answers suffer too much, groups go back to float, those first whose harm is largest for the
time they save (as in HAWQ-V3, Yao et al. 2021, with measured latencies and Kullback-Leibler divergences).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ..bench import Interval

__all__ = ["Candidate", "Found", "LayerPrecision", "Measured", "PrecisionRecord", "candidates", "fastest", "groups"]
__all__ += ["least_harm", "within"]

#: More groups than that are not timed one by one.
MOST_GROUPS = 32
#: Channels from which on a layer counts as wide.
WIDTHS = (32, 64, 128, 256)
#: Cuts between front and rear that are tried.
CUTS = 8
#: A change that saves a smaller share of the time is none.
WORTH = 0.005
ROUNDS = 3
#: By which a brief timing must exceed the speed-up that is asked for.
MARGIN = 1.02
#: So many are timed again, side by side.
FINALISTS = 4

#: Speed-ups over float of networks by name, each given as the layers that are int8.
Timer = Callable[[Mapping[str, frozenset[str]]], dict[str, float]]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Record):
    """A set of layers that was timed."""

    name: str
    int8: int = Field(description="how many matrix layers it computes in integers")
    speedup: float = Field(description="over the float network, on the profile; its weights were not trained")


class LayerPrecision(_Record):
    """What became of one matrix layer."""

    path: str = Field(description="module path")
    precision: Literal["int8", "float"]
    reason: str = Field(description="why")
    group: str = Field("", description="the neighbouring layers that it was timed with")
    harm: float | None = Field(
        None, description="divergence of the answers from the float network's if only it is int8, in nats per image"
    )
    gain: float | None = Field(
        None, description="share of the float network's time that int8 in its group saves, all others as they are"
    )


class Measured(_Record):
    """The result beside the float network it came from."""

    profile: str
    float_ms: float = Field(description="median of the float file, milliseconds per call")
    own_ms: float = Field(description="median of the quantized file")
    speedup: Interval = Field(description="float over quantized, from the same rounds")
    metric: str = Field("", description="the task's headline metric; empty where the stage stopped before")
    float_metric: float | None = Field(None, description="of the float network")
    own_metric: float | None = Field(None, description="of the quantized one, healed where the stage heals")
    images: int = Field(0, description="how many images the metric is of")
    split: str = Field("", description="validation or training images")


class PrecisionRecord(_Record):
    """`precision.json`: layer by layer what is int8, why, and what it was worth."""

    scheme: str
    kept_float: str | None = Field(None, description="why the whole network stayed float; none: it was quantized")
    measured: Measured | None = None
    not_measured: str | None = Field(None, description="why nothing was timed")
    float_layers: list[str] = Field(default=[], description="module paths that were kept from being quantized")
    layers: list[LayerPrecision] = []
    tried: list[Candidate] = Field(default=[], description="sets of layers that were timed, the fastest first")


class Found(NamedTuple):
    """The result of `fastest`."""

    int8: frozenset[str]
    speedup: float  #: of the fastest set with integers, also where float is faster
    gains: dict[str, float]  #: group -> share of the float network's time
    tried: dict[frozenset[str], tuple[str, float]]


def groups(paths: Sequence[str]) -> dict[str, list[str]]:
    """Layers by the deepest common module of neighbours that leaves at most MOST_GROUPS groups, in their order."""
    depth = max((path.count(".") + 1 for path in paths), default=1)
    found: dict[str, list[str]] = {}
    for level in range(depth, 0, -1):
        found = {}
        for path in dict.fromkeys(paths):
            found.setdefault(".".join(path.split(".")[:level]), []).append(path)
        if len(found) <= MOST_GROUPS:
            return found
    # Flat and long: neighbours by number.
    names, size = list(dict.fromkeys(paths)), -(-len(set(paths)) // MOST_GROUPS)
    return {names[i]: names[i : i + size] for i in range(0, len(names), size)}


def candidates(network: nn.Module, paths: Sequence[str]) -> dict[str, frozenset[str]]:
    """Sets of layers that are worth a try, by what they are; none twice. `paths` in the order in which they run."""
    modules = {path: network.get_submodule(path) for path in dict.fromkeys(paths)}
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    found: dict[str, Iterable[str]] = {
        "all": modules,
        "linear layers": linear,
        "convolutions": modules.keys() - set(linear),
        "all but depthwise": [path for path, module in modules.items() if not _depthwise(module)],
    }
    for width in WIDTHS:
        found[f"from {width} channels"] = [path for path, module in modules.items() if _width(module) >= width]
    in_order = list(groups(paths).items())
    step = max(1, round(len(in_order) / CUTS))
    for cut in range(step, len(in_order), step):
        name = in_order[cut][0]
        found[f"from {name}"] = [path for _, layers in in_order[cut:] for path in layers]
        found[f"up to {name}"] = [path for _, layers in in_order[:cut] for path in layers]
    once: dict[frozenset[str], str] = {}
    for name, layers in found.items():
        if chosen := frozenset(layers):
            once.setdefault(chosen, name)
    return {name: chosen for chosen, name in once.items()}


def fastest(tried: Mapping[str, frozenset[str]], grouped: Mapping[str, Sequence[str]], time: Timer) -> Found:
    """The fastest set of layers: the best of `tried`, then changed group by group while that saves time.

    `time` gives speed-ups over float. Where nothing is faster than float, the result is an empty set.
    """
    known: dict[frozenset[str], tuple[str, float]] = {frozenset(): ("float", 1.0)}

    def timed(sets: Mapping[str, frozenset[str]]) -> None:
        new = {name: chosen for name, chosen in sets.items() if chosen not in known}
        for name, value in (time(new) if new else {}).items():
            known[new[name]] = (name, value)

    def best() -> frozenset[str]:
        """Beside float: what comes near it is where a mixture may be found."""
        return max((chosen for chosen in known if chosen), key=lambda chosen: known[chosen][1])

    timed(tried)
    if not _worth(known[best()][1], 1.0):
        timed({f"only {name}": frozenset(layers) for name, layers in grouped.items()})
    start = best()
    for _ in range(ROUNDS):
        name, speed = known[start]
        flips = {group: _flip(layers, start) for group, layers in grouped.items()}
        timed(dict(_changed(name, start, [group], flips) for group in grouped))
        better = [g for g in grouped if _worth(known[start ^ flips[g]][1], speed)]
        better.sort(key=lambda g: known[start ^ flips[g]][1], reverse=True)
        counts = {count for count in (2, len(better) // 2, len(better)) if 2 <= count <= len(better)}
        timed(dict(_changed(name, start, better[:count], flips) for count in counts))
        if not _worth(known[best()][1], speed):
            break
        start = best()
    # Of many that were timed, the first owes some of its place to luck.
    finalists = sorted((chosen for chosen in known if chosen), key=lambda chosen: known[chosen][1])[-FINALISTS:]
    finalists = list(dict.fromkeys([*finalists, max(known, key=len)]))
    for name, value in time({known[chosen][0]: chosen for chosen in finalists}).items():
        known[next(chosen for chosen in finalists if known[chosen][0] == name)] = (name, value)
    start = max(finalists, key=lambda chosen: known[chosen][1])
    name, speed = known[start]
    flips = {group: _flip(layers, start) for group, layers in grouped.items()}
    timed(dict(_changed(name, start, [group], flips) for group in grouped))
    # What a group's int8 saves, with all others as they are.
    saved = {group: 1 / known[start ^ flip][1] - 1 / speed for group, flip in flips.items()}
    gains = {group: value if flips[group] & start else -value for group, value in saved.items()}
    del known[frozenset()]
    return Found(start if _worth(speed, 1.0) else frozenset(), speed, gains, known)


def _changed(
    name: str, start: frozenset[str], changed: Sequence[str], flips: Mapping[str, frozenset[str]]
) -> tuple[str, frozenset[str]]:
    """A set with groups on the other side, and how it is called."""
    added = [group for group in changed if not flips[group] & start]
    removed = [group for group in changed if flips[group] & start]
    words = [f"{word} {', '.join(those)}" for word, those in (("and", added), ("but", removed)) if those]
    return " ".join([name, *words]), start ^ frozenset[str]().union(*(flips[group] for group in changed))


def within(
    found: Found,
    grouped: Mapping[str, Sequence[str]],
    harm: Mapping[str, float],
    drop: Callable[[frozenset[str]], float],
    max_drop: float,
) -> frozenset[str]:
    """As many groups of `found` as keep the loss of accuracy within `max_drop` (a fraction), by bisection.

    `harm` by layer; `drop` says what a set of layers loses. Groups leave in the order of harm for time saved.
    """
    sets = _retreat(found, grouped, harm)
    low, high = 0, len(sets) - 1  # the last one is float, which loses nothing
    while low < high:
        middle = (low + high) // 2
        if drop(sets[middle]) <= max_drop + 1e-9:  # 0.9 - 0.895 is a little more than 0.005
            high = middle
        else:
            low = middle + 1
    return sets[low]


def least_harm(
    found: Found, grouped: Mapping[str, Sequence[str]], harm: Mapping[str, float], time: Timer, speedup: float
) -> frozenset[str]:
    """The fewest groups of `found` with which the network is `speedup` times faster than float.

    A little more, where there is more: what was timed briefly has to hold when it is timed well.
    """
    sets = _retreat(found, grouped, harm)[:-1]
    speeds = time({str(i): chosen for i, chosen in enumerate(sets)})
    for goal in (speedup * MARGIN, speedup):
        reached = [i for i in range(len(sets)) if speeds[str(i)] >= goal]
        if reached:
            return sets[max(reached)]
    return sets[0]


def _retreat(found: Found, grouped: Mapping[str, Sequence[str]], harm: Mapping[str, float]) -> list[frozenset[str]]:
    """`found`, then one group less each time, to float at last."""

    def cost(name: str) -> float:
        gain = found.gains.get(name, WORTH)
        return sum(harm.get(path, 0.0) for path in grouped[name]) / max(gain, 1e-4)

    sets = [found.int8]
    for name in sorted((n for n in grouped if found.int8.intersection(grouped[n])), key=cost, reverse=True):
        sets.append(sets[-1].difference(grouped[name]))
    return sets


def _flip(layers: Sequence[str], chosen: Collection[str]) -> frozenset[str]:
    """What changes if a group goes to the other side: float if any of it is int8, else int8."""
    return frozenset(path for path in layers if path in chosen) or frozenset(layers)


def _worth(speedup: float, now: float) -> bool:
    return speedup > now * (1 + WORTH)


def _depthwise(module: nn.Module) -> bool:
    groups_of: Any = getattr(module, "groups", 1)
    return bool(groups_of > 1 and groups_of == getattr(module, "in_channels", 0))


def _width(module: nn.Module) -> int:
    """The smaller of the channels that go in and come out."""
    shape = getattr(module, "weight", torch.zeros(0, 0)).shape
    depthwise = _depthwise(module)
    return int(shape[0] if depthwise else min(shape[:2]))
