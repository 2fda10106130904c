"""The whole front: students that a ResNet-56 teaches, quantized, against its float file at p50 on one thread.

    python benchmarks/edge_front.py --data data --teacher data/resnet56.th --start data/resnet20.th \\
        --into docs/compression.md

Each student is distilled from the cached teacher for `--epochs`, then trained with fake quantization for
`--qat-epochs`, and exported. `trained` rows start from the weights given as `--start` instead. `pruned` rows prune the
ResNet-20 to the named speed-up of its int8 file first, and heal it with the teacher; `quantized at once` rows give the
epochs of both to the quantized network, which is the best order in `order_table.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rows import Stages, fill, healing, options_of


def faster(speedup: float) -> dict[str, Any]:
    return {"latency": {"profile": "cpu-x86", "speedup": speedup, "precision": "int8"}}


#: name -> the student (none: the trained ResNet-20), and what its int8 form is pruned to.
ROWS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "trained ResNet-20": (None, None),
    "trained ResNet-20, 0.7 of the MACs, quantized at once": (None, {"macs": 0.7}),
    "trained ResNet-20, pruned 1.25x": (None, faster(1.25)),
    "trained ResNet-20, pruned 1.4x": (None, faster(1.4)),
    "trained ResNet-20, pruned 1.7x": (None, faster(1.7)),
    "trained ResNet-20, pruned 2.2x": (None, faster(2.2)),
    "ResNet-20": ({"depth": 20}, None),
    "ResNet-20, pruned 1.35x": ({"depth": 20}, faster(1.35)),
    "ResNet-20, pruned 1.7x": ({"depth": 20}, faster(1.7)),
    "ResNet-14": ({"depth": 14}, None),
    "ResNet-8, width 32": ({"depth": 8, "width": 32}, None),
    "ResNet-8": ({"depth": 8}, None),
}


def stages_of(row: str, seed: int, options: argparse.Namespace) -> Stages:
    student, target = ROWS[row]
    at_once = "at once" in row
    stages: Stages = []
    if student is not None:
        model = {"use": "cifar-resnet", **student}
        stages.append({"use": "distill", "model": model, **healing(options, seed, options.epochs, 0.2)})
    if target is not None:
        heal = healing(options, seed, 0 if at_once else options.heal_epochs, 0.05)
        stages.append({"use": "prune", "target": target, "heal": heal})
    last = (options.heal_epochs + options.qat_epochs, 0.02) if at_once else (options.qat_epochs, 0.01)
    stages.append({"use": "quantize", "heal": healing(options, seed, *last)})
    if student is None:
        stages[0]["after"] = "teacher-2"
    return stages


def main() -> None:
    parser = options_of(__doc__, rows=list(ROWS), runs="edge-front", out="edge_front.json")
    parser.add_argument("--start", type=Path, default=Path("data/resnet20.th"), help="the trained ResNet-20")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--heal-epochs", type=int, default=16)
    parser.add_argument("--qat-epochs", type=int, default=4)
    fill(parser.parse_args(), stages_of, "front")


if __name__ == "__main__":
    main()
