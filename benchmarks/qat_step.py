"""A training step with fake quantization against a float step, and the memory of both.

    python benchmarks/qat_step.py

ResNet-20 on CIFAR-10's shape, labels only (a teacher's forward would hide part of the difference), with edgekd's
training loop, its precision and memory format: float, with observed ranges, and with learned ones, alternating in one
process. Peak memory is that of a process of its own for each (Linux), and less what it held with all libraries loaded.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from blocks import SEED, in_turn, network, noise, options_of, parsed, ratio, spread, steps, watched
from torch import nn

from edgekd import quant
from edgekd.data import Dataset
from edgekd.learner import Learner
from edgekd.models import Tapped
from edgekd.precision import keep_freed_memory

CONTENDERS = ("float", "observed", "learned")


def quantized(student: nn.Module, taps: Sequence[str], *, data: Dataset, learned: bool) -> nn.Module:
    """What the stage `quantize` trains: calibrated, quantizing, with ranges that still move."""
    images = (data.train.images[:64].float() / 255 - 0.5) / 0.25
    scheme = quant.SCHEMES["x86-u8s8"]
    prepared = quant.prepare(Tapped(student, taps), images[:2], scheme, qat=True, learned=learned)
    quant.calibrate(prepared, [images])
    quant.enable_fake_quant(prepared)
    return prepared


def contender(name: str, data: Dataset, batch: int) -> Iterator[None]:
    """Steps without end of one of CONTENDERS."""
    torch.manual_seed(SEED)
    tap = Tapped if name == "float" else partial(quantized, data=data, learned=name == "learned")
    learner = Learner.of(network(20), objectives=["ce"], example=torch.zeros(2, *data.size), tap=tap)
    return steps(learner, data, batch)


def alone(name: str, count: int, batch: int) -> None:
    """Print the bytes that this process held before it made the network, and at its peak."""
    keep_freed_memory()
    data = noise(count * batch)
    assert quant.prepare  # torchao is loaded in all of them
    before = held("VmRSS")
    for _ in itertools.islice(contender(name, data, batch), count):
        pass
    print(json.dumps({"before": before, "peak": held("VmHWM")}))


def held(field: str) -> int:
    """VmRSS: what this process holds, VmHWM: the most it ever held; in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def memory(count: int, batch: int) -> dict[str, dict[str, int]]:
    """MB of each contender in a process of its own."""
    found = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--alone", name, "--steps", str(count), "--batch", str(batch)]
        said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        found[name] = {part: round(size / 1e6) for part, size in said.items()}
        found[name]["training"] = found[name]["peak"] - found[name]["before"]
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = options_of(__doc__, rounds=16, count=10, out="qat_step.json")
    parser.add_argument("--alone", choices=CONTENDERS, help="only the memory of one")
    options = parsed(parser)
    if options.alone:
        alone(options.alone, options.steps, options.batch)
        return
    keep_freed_memory()
    write = watched()
    peaks = memory(options.steps, options.batch)
    data = noise(options.steps * options.batch)
    taken = in_turn({name: contender(name, data, options.batch) for name in CONTENDERS}, options.rounds, options.steps)
    document = {
        "network": "ResNet-20",
        "scheme": "x86-u8s8",
        **{f"{name}_over_float": {**ratio(taken, name, "float"), "target": 2.0} for name in CONTENDERS[1:]},
        "memory_over_float": {
            **{name: round(peaks[name]["training"] / peaks["float"]["training"], 3) for name in CONTENDERS[1:]},
            "target": 1.5,
        },
        "process_over_float": {name: round(peaks[name]["peak"] / peaks["float"]["peak"], 3) for name in CONTENDERS[1:]},
        "memory_mb": peaks,
        "ms_per_step": spread(taken),
    }
    write(options, document)


if __name__ == "__main__":
    main()
