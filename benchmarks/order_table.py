"""In which order? A trained ResNet-20 pruned, taught and quantized on the same number of epochs, in every order.

    python benchmarks/order_table.py --data data --teacher data/resnet56.th --start data/resnet20.th \\
        --into docs/compression.md

P prunes to 0.7 of the MACs, D distils from the ResNet-56, Q quantizes. Every row trains for the same number of epochs
in all; a stage without epochs of its own hands its damage to the next one. `P, Q+D` is to distil while quantized:
quantization-aware training with the teacher for the whole budget. `labels only` has no teacher anywhere.
Nothing can be pruned after it was quantized: shapes are fixed by then.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rows import Stages, fill, healing, options_of

#: name -> (kind, share of the epochs) of each stage.
ROWS: dict[str, list[tuple[str, float]]] = {
    "P, Q+D": [("prune", 0.0), ("quantize", 1.0)],
    "P+D, Q+D": [("prune", 2 / 3), ("quantize", 1 / 3)],
    "P+D, Q": [("prune", 1.0), ("quantize", 0.0)],
    "D, P+D, Q+D": [("distill", 1 / 3), ("prune", 1 / 3), ("quantize", 1 / 3)],
    "D, P, Q+D": [("distill", 2 / 3), ("prune", 0.0), ("quantize", 1 / 3)],
    "labels only: P, Q": [("prune", 2 / 3), ("quantize", 1 / 3)],
}
RATES = {"distill": 0.05, "prune": 0.05, "quantize": 0.01}


def stages_of(row: str, seed: int, options: argparse.Namespace) -> Stages:
    made: Stages = []
    for kind, share in ROWS[row]:
        settings: dict[str, Any] = healing(options, seed, round(share * options.epochs), RATES[kind])
        if "labels" in row:
            settings |= {"objectives": ["ce"], "source": {"use": "frozen"}}
        stage: dict[str, Any] = {"use": kind, **settings} if kind == "distill" else {"use": kind, "heal": settings}
        if kind == "prune":
            stage["target"] = {"macs": 0.7}
        if not made:
            stage["after"] = "teacher-2"
        made.append(stage)
    return made


def main() -> None:
    parser = options_of(__doc__, rows=list(ROWS), runs="order-table", out="order_table.json")
    parser.add_argument("--start", type=Path, default=Path("data/resnet20.th"), help="the trained ResNet-20")
    parser.add_argument("--epochs", type=int, default=6)
    fill(parser.parse_args(), stages_of, "order")


if __name__ == "__main__":
    main()
