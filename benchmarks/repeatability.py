"""How well a speed-up ratio repeats, against the usual way to measure it; and what the harness itself costs.

    python benchmarks/repeatability.py --out benchmarks/results/repeatability.json

Ratio: 20 fresh processes each measure ResNet-20 against ResNet-8 (untrained, float), alternately by edgekd's protocol
and naively: one session after the other, a warm-up call, the mean of 100 calls of `session.run`. The spread is
(largest - smallest) / median of the 20 ratios.

Overhead: a network of about 50 microseconds; medians of edgekd's calls against a bare loop around
`run_with_iobinding`, in the same session and alternating blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from gate_trials import export
from torch import nn

from edgekd.artifact import ModelSpec, write_atomically
from edgekd.bench import environment, measure_latency, paired_ratio
from edgekd.models import build
from edgekd.profile import Protocol
from edgekd.runtimes import open_session

IMAGE = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)


def ours(slow: Path, fast: Path) -> float:
    files = {"slow": slow, "fast": fast}
    sessions = {name: open_session(file) for name, file in files.items()}
    found = measure_latency(
        sessions,
        {name: {"image": IMAGE} for name in sessions},
        Protocol(),
        1,
        reopen=lambda name: open_session(files[name]),
    ).latencies
    return paired_ratio(found["slow"].round_p50, found["fast"].round_p50).value


def naive(slow: Path, fast: Path) -> float:
    means = []
    for file in (slow, fast):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        session.run(None, {"image": IMAGE})
        start = time.perf_counter()
        for _ in range(100):
            session.run(None, {"image": IMAGE})
        means.append((time.perf_counter() - start) / 100)
    return means[0] / means[1]


def spread(ratios: list[float]) -> float:
    return (max(ratios) - min(ratios)) / float(np.median(ratios))


def repeat(directory: Path, runs: int) -> dict[str, object]:
    files = {}
    for depth in (20, 8):
        network = build(ModelSpec(use="cifar-resnet", args={"depth": depth, "num_classes": 10}))
        files[depth] = export(network, directory / f"resnet{depth}.onnx")
    ratios: dict[str, list[float]] = {"edgekd": [], "naive": []}
    for i in range(runs):
        for how in ratios:
            command = [sys.executable, __file__, "--one", how, str(files[20]), str(files[8])]
            ratios[how].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(i + 1, {how: round(found[-1], 4) for how, found in ratios.items()}, flush=True)
    return {
        "ratios": ratios,
        "median": {how: float(np.median(found)) for how, found in ratios.items()},
        "spread": {how: spread(found) for how, found in ratios.items()},
        "standard_deviation": {how: float(np.std(found, ddof=1) / np.mean(found)) for how, found in ratios.items()},
    }


def overhead(directory: Path, blocks: int) -> dict[str, object]:
    """Each block: the harness's rounds, then a bare loop of the same number of calls, in random order."""
    small = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, stride=2))
    file = export(small, directory / "small.onnx")
    session = open_session(file)
    native = session._native
    outputs = session.run({"image": IMAGE})
    binding = native.io_binding()
    kept = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in (IMAGE, outputs["logits"])]
    binding.bind_ortvalue_input("image", kept[0])
    binding.bind_ortvalue_output("logits", kept[1])

    def bare(calls: int) -> float:
        taken = [0] * calls
        for i in range(calls):
            begin = time.perf_counter_ns()
            native.run_with_iobinding(binding)
            taken[i] = time.perf_counter_ns() - begin
        return float(np.median(taken)) / 1e6

    protocol = Protocol(rounds=3, block_s=0.05, warmup_s=0.02, cap_s=0.001)
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(blocks):
        medians = [0.0, 0.0]
        for which in rng.permutation(2):
            if which:
                found = measure_latency({"a": session}, {"a": {"image": IMAGE}}, protocol, 1).latencies["a"]
                medians[1] = found.p50.value
            else:
                bare(500)
                medians[0] = float(np.median([bare(math.ceil(1000)) for _ in range(3)]))
        pairs.append(medians)
    ratio = paired_ratio([ours for _, ours in pairs], [theirs for theirs, _ in pairs])
    return {
        "bare_loop_ms": float(np.median([theirs for theirs, _ in pairs])),
        "edgekd_over_bare_loop": ratio.model_dump(),
        "blocks": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        how, slow, fast = options.one
        print({"edgekd": ours, "naive": naive}[how](Path(slow), Path(fast)))
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as text:
        document = {
            "command": shlex.join(["python", *sys.argv]),
            "repeatability": repeat(Path(text), options.runs),
            "overhead": overhead(Path(text), 20),
            "environment": environment(),
        }
    print(json.dumps({k: v for k, v in document.items() if k != "environment"}, indent=1))
    if options.out is not None:
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
