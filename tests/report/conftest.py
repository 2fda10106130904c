"""A run's results as they come out of a chain on CIFAR-10: the figures are made up, the shape is real."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekd.bench import class_figures
from edgekd.bench.results import Histogram, Interval, Latency, LayerTime, Lineage, ProfileResults, Results, Variant

Build = Callable[..., Results]

#: name, precision, accuracy, p50 ms, size MB, parameters, MACs, memory MB, (int8, float) layers
CHAIN: list[tuple[Any, ...]] = [
    ("teacher", "fp32", 0.9440, 1.213, 3.452, 855_770, 126_562_432, 148.0, (0, 58)),
    ("distill", "fp32", 0.9203, 0.397, 1.118, 272_474, 41_214_592, 139.0, (0, 22)),
    ("prune", "fp32", 0.9168, 0.231, 0.642, 155_130, 20_513_920, 137.0, (0, 22)),
    ("quantize", "int8", 0.9151, 0.118, 0.201, 155_130, 20_513_920, 134.0, (22, 0)),
]


def around(value: float, wobble: float = 0.01) -> Interval:
    return Interval(value=value, low=value * (1 - wobble), high=value * (1 + wobble))


def latency(p50: float, wobble: float = 0.01, rounds: int = 12) -> Latency:
    noise = random.Random(round(p50 * 1e6))
    tail = [(50.0, 1.0), (75.0, 1.02), (90.0, 1.04), (95.0, 1.07), (99.0, 1.21), (99.9, 1.9)]
    return Latency(
        p50=around(p50, wobble),
        p90=around(p50 * 1.04, wobble),
        p95=around(p50 * 1.07, 2 * wobble),
        p99=around(p50 * 1.21, 5 * wobble),
        curve=[(0.0, p50 * 0.97), *((at, p50 * factor) for at, factor in tail)],
        histogram=Histogram(low=p50 * 0.95, high=p50 * 1.25, counts=[40, 1200, 2000, 500, 160, 60, 20, 10, 5, 5]),
        warmup_s=0.3,
        mean=p50 * 1.01,
        spread=0.03,
        samples=4000,
        round_p50=[p50 * noise.gauss(1, wobble) for _ in range(rounds)],
        batch=1,
        threads=1,
    )


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def judged(accuracy: float, names: list[str]) -> dict[str, Any]:
    """Per-class figures of a classifier whose mistakes fall on the next class twice as often as on the one after."""
    k = len(names)
    if k < 3:
        return {}
    confusion = np.zeros((k, k), np.int64)
    for i in range(k):
        wrong = round(1000 * (1 - accuracy) * (0.5 + i / (k - 1)))
        confusion[i, (i + 1) % k], confusion[i, (i + 2) % k] = wrong - wrong // 3, wrong // 3
        confusion[i, i] = 1000 - wrong
    return {"classes": class_figures(confusion, names), "confusion": confusion.tolist()}


def chain(names: dict[str, str], classes: list[str]) -> list[Variant]:
    variants = []
    for name, precision, accuracy, p50, size, parameters, macs, memory, layers in CHAIN:
        first = name == "teacher"
        lost, ratio = CHAIN[0][2] - accuracy, CHAIN[0][3] / p50
        variants.append(
            Variant(
                name=names.get(name, name),
                key=f"{name}-1c9e77ab52cd",
                file=f"runs/cifar10-edge/{name}/model.onnx",
                precision=precision,
                metrics={"accuracy": accuracy, "top5": min(0.999, accuracy + 0.07), "ece": 0.031},
                mcnemar=None if first else 0.004,
                **judged(accuracy, classes),
                layer_times=[
                    LayerTime(name=f"/layer{i}/conv", op="QLinearConv", ms=p50 / (i + 2), share=1 / (i + 2))
                    for i in range(14)
                ],
                drop=None if first else Interval(value=lost, low=lost - 0.0041, high=lost + 0.0040),
                agreement=None if first else 0.96 - lost / 2,
                latency=latency(p50),
                speedup=None if first else Interval(value=ratio, low=ratio * 0.994, high=ratio * 1.006),
                throughput={"1": around(950 / p50), "8": around(1210 / p50), "32": around(1330 / p50)},
                offline=around(1290 / p50),
                load_ms=around(4 * p50 + 3, 0.1),
                size_mb=size,
                parameters=parameters,
                macs=macs,
                peak_memory_mb=memory,
                layers={"int8": layers[0], "float": layers[1]},
            )
        )
    return variants


def lineage(names: dict[str, str]) -> list[Lineage]:
    entries, parents = [], {}
    for name, epochs, start, end in (("teacher", 0, 0, 0), ("distill", 30, 0.41, 0.921), ("prune", 10, 0.80, 0.918)):
        history = [
            {
                "epoch": i,
                "loss": 2.1 * math.exp(-i / 8) + 0.25,
                "loss.kl": 1.2 * math.exp(-i / 8),
                "val.accuracy": end - (end - start) * math.exp(-i / 5) + 0.006 * math.sin(2.1 * i),
                "images_per_s": 1490.0,
            }
            for i in range(epochs)
        ]
        key = f"{name[:2].encode().hex()}1c9e77ab52cd88b13f9a"
        config = {"use": name, "model": {"use": "cifar-resnet", "depth": 20}, "epochs": epochs}
        entries.append(
            Lineage(stage=names.get(name, name), key=key, parents=dict(parents), config=config, history=history)
        )
        parents = {names.get(name, name): key}
    return entries


@pytest.fixture
def build() -> Build:
    return build_results


def build_results(
    *, names: dict[str, str] | None = None, profiles: tuple[str, ...] = ("cpu-x86",), **changes: Any
) -> Results:
    """Results of a whole chain; `names` renames variants and stages, `changes` replaces fields of the document."""
    names = names or {}
    table: dict[str, Any] = {
        "name": "cifar10-edge",
        "command": "edgekd run runs/cifar10-edge/recipe.toml",
        "seed": 0,
        "headline": "accuracy",
        "test_images": 10_000,
        "classes": NAMES,
        "profiles": [
            ProfileResults(
                profile=profile,
                device="AMD EPYC 9B45",
                runtime="ONNX Runtime 1.32.0",
                rounds=12,
                variants=chain(names, changes.get("classes", NAMES)),
                warnings=["load average 1.4 on 2 cores: something else is running; end it or wait"],
            )
            for profile in profiles
        ],
        "lineage": lineage(names),
        "environment": {
            "edgekd": "0.1.0",
            "cpu": {"model": "AMD EPYC 9B45", "cores": 2, "vnni": True, "governor": None},
            "os": "Linux 6.1 x86_64",
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
            "onnxruntime": "1.32.0",
            "load_average": [0.4, 0.6, 0.8],
        },
    }
    return Results(**{**table, **changes})
