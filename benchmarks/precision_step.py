"""Is bf16 the faster precision to train in? Steps in bf16 over steps in fp32, for networks of each family here.

    python benchmarks/precision_step.py

edgekd's own training loop with `precision = "bf16"` and with `"fp32"`, labels only, alternating in one process.
`auto` chooses bf16 on CPUs with AMX: on those without, this shows why not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from blocks import ENDLESS, SEED, in_turn, noise, options_of, parsed, ratio, spread, steps, watched

from edgekd.artifact import ModelSpec
from edgekd.data import Dataset
from edgekd.learner import Learner
from edgekd.models import build
from edgekd.precision import keep_freed_memory, precision_of

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar-resnet": {"depth": 20},
    "mobilenet": {},
    "vit": {},
}
PRECISIONS = ("fp32", "bf16")


def contender(use: str, precision: str, data: Dataset, batch: int) -> Iterator[None]:
    """Steps without end."""
    torch.manual_seed(SEED)
    made = build(ModelSpec(use=use, args={**NETWORKS[use], "num_classes": 10, "in_channels": 3}))
    learner = Learner.of(made, objectives=["ce"], example=torch.zeros(2, *data.size))
    return steps(learner, data, batch, settings=ENDLESS.model_copy(update={"precision": precision}))


def main() -> None:
    options = parsed(options_of(__doc__, rounds=8, count=4, out="precision_step.json"))
    keep_freed_memory()
    write = watched()
    data = noise(options.steps * options.batch)
    found: dict[str, Any] = {}
    for use in NETWORKS:
        pair = {precision: contender(use, precision, data, options.batch) for precision in PRECISIONS}
        taken = in_turn(pair, options.rounds, options.steps)
        found[use] = {"bf16_over_fp32": ratio(taken, "bf16", "fp32"), "ms_per_step": spread(taken)}
    chosen = precision_of(ENDLESS)
    write(options, {"auto": chosen, "amx": torch.cpu._is_amx_tile_supported(), "networks": found})


if __name__ == "__main__":
    main()
