"""How often the gate is wrong: the same model against itself (false alarms), and one that is 8 % slower (power).

    python benchmarks/gate_trials.py aa    --trials 200 --out benchmarks/results/gate_aa.json
    python benchmarks/gate_trials.py power --trials 100 --out benchmarks/results/gate_power.json

Each trial is one `edgekd gate HEAD.onnx --baseline BASE.onnx` in a process of its own, at a limit of 5 % on the median.
In every second one another process keeps a core busy meanwhile. The slower model is a real one: ResNet-20 with one more
convolution, whose width is chosen so that it costs about 8 %; what it really costs is measured at length and recorded.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd.artifact import ModelSpec, write_atomically
from edgekd.bench import environment, measure_latency, paired_ratio
from edgekd.models import build
from edgekd.profile import Protocol
from edgekd.runtimes import open_session

LIMIT = 0.05
RULES = '[gate]\nlatency = { p50 = { regress = "5%" } }\n'
PROFILE = 'extends = "cpu-x86"\n[protocol]\ncap_s = 8\n'


class Slower(nn.Module):
    """A network with one more convolution on its input, whose output only just matters."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network = network
        self.widen = nn.Conv2d(3, width, 3, padding=1)
        self.narrow = nn.Conv2d(width, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image + 1e-3 * self.narrow(torch.relu(self.widen(image))))


def export(network: nn.Module, file: Path) -> Path:
    torch.onnx.export(
        network.eval(), (torch.zeros(1, 3, 32, 32),), file, dynamo=True, opset_version=18, input_names=["image"],
        output_names=["logits"], external_data=False, verbose=False,
    )  # fmt: skip
    return file


def slowdown(base: Path, head: Path, rounds: int) -> list[float]:
    """The head's median latency over the base's, minus 1, with its interval."""
    sessions = {"base": open_session(base), "head": open_session(head)}
    feed = {"image": np.random.default_rng(0).random((1, 3, 32, 32), np.float32)}
    protocol = Protocol(rounds=rounds, block_s=0.1, cap_s=120, precision=1.0)
    found = measure_latency(sessions, dict.fromkeys(sessions, feed), protocol, 1).latencies
    ratio = paired_ratio(found["head"].round_p50, found["base"].round_p50)
    return [ratio.value - 1, ratio.low - 1, ratio.high - 1]


def slower_by(network: nn.Module, base: Path, directory: Path, wanted: float) -> tuple[Path, int]:
    """A file about `wanted` slower: the extra layer's width that comes nearest (cost rises in steps)."""

    def miss(width: int) -> float:
        return abs(slowdown(base, export(Slower(network, width), directory / "try.onnx"), 12)[0] - wanted)

    width = min(range(4, 65, 4), key=miss)
    return export(Slower(network, width), directory / "slower.onnx"), width


def trial(head: Path, base: Path, directory: Path, loaded: bool) -> dict[str, object]:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if loaded else None
    command = [str(Path(sys.executable).with_name("edgekd")), "gate", str(head), "--baseline", str(base)]
    command += ["--rules", str(directory / "gate.toml"), "--profile", str(directory / "profile.toml"), "--json"]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        seconds = time.monotonic() - start
        if busy is not None:
            busy.kill()
            busy.wait()
    if done.returncode not in (0, 1, 4):
        raise SystemExit(f"the gate failed with {done.returncode}: {done.stderr}")
    (verdict,) = json.loads(done.stdout)["verdicts"]
    found = {key: verdict[key] for key in ("verdict", "found", "low", "high")}
    return {"exit_code": done.returncode, "loaded": loaded, "seconds": round(seconds, 2), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["aa", "power"])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--slower", type=float, default=0.08)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = build(ModelSpec(use="cifar-resnet", args={"depth": 20, "num_classes": 10}))
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        (directory / "gate.toml").write_text(RULES)
        (directory / "profile.toml").write_text(PROFILE)
        base = export(network, directory / "base.onnx")
        head, width = export(network, directory / "head.onnx"), None
        if options.kind == "power":
            head, width = slower_by(network, base, directory, options.slower)
        before = slowdown(base, head, 60)
        print(f"true difference {before[0]:+.2%} [{before[1]:+.2%}, {before[2]:+.2%}]", flush=True)
        trials = []
        for i in range(options.trials):
            trials.append(trial(head, base, directory, loaded=i % 2 == 1))
            print(i + 1, trials[-1], flush=True)
        after = slowdown(base, head, 60)
    counts = Counter(str(t["verdict"]) for t in trials)
    loaded = Counter(str(t["verdict"]) for t in trials if t["loaded"])
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "limit": LIMIT,
        "kind": options.kind,
        "extra_layer_width": width,
        "true_difference": {"before": before, "after": after},
        "trials": options.trials,
        "verdicts": counts,
        "verdicts_with_a_core_loaded": loaded,
        "seconds": {"median": float(np.median([t["seconds"] for t in trials])),
                    "longest": max(t["seconds"] for t in trials)},
        "environment": environment(),
        "each": trials,
    }  # fmt: skip
    print(json.dumps({k: v for k, v in document.items() if k not in ("each", "environment")}, indent=1))
    if options.out is not None:
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
