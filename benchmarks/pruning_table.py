"""A trained ResNet-56 pruned to half of its measured latency and healed: edgekd, uniform, and Torch-Pruning's own.

    python benchmarks/pruning_table.py --data data --teacher data/resnet56.th --into docs/compression.md

The rows differ in the stage that prunes: the same checkpoint, the same healing (epochs, learning rate, objectives,
views of the cached teacher, seeds). `torch-pruning` is that library's MagnitudePruner with its group importance, its
ratio bisected to the wanted *measured* latency, as it is and with `round_to`; `... equal MACs` has its ratio bisected
to the MACs that edgekd's network has. `healed 4 times as long` says how far it comes, and compares with nothing. The
parameter-free shortcuts of this ResNet shift channels, which its dependency graph does not see: layers that write to
the residual stream are left to it as ignored, as edgekd leaves them alone.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch_pruning
from pydantic import BaseModel, ConfigDict
from rows import PROFILE, Stages, fill, healing, manifest_of, options_of
from torch import nn

from edgekd.artifact import Artifact, ModelSpec, Preprocessing, write_atomically
from edgekd.bench import paired_ratio, round_medians, side_by_side
from edgekd.data import Dataset
from edgekd.learner import Student
from edgekd.models import changed_attributes
from edgekd.onnx_file import export_onnx
from edgekd.profile import load_profile
from edgekd.pruning import count_macs
from edgekd.registry import register
from edgekd.stages import Workspace
from edgekd.stages.teaching import Context, Heal, Teaching, load_network, teaching

LATENCY = {"latency": {"profile": PROFILE, "speedup": 2.0}}
#: name -> the stage that prunes.
ROWS: dict[str, dict[str, Any]] = {
    "edgekd": {"use": "prune", "target": LATENCY},
    "edgekd, healed 4 times as long": {"use": "prune", "target": LATENCY},
    "edgekd, channels only": {"use": "prune", "target": LATENCY, "depth": False},
    "uniform": {"use": "prune", "target": LATENCY, "strategy": "uniform", "channel_multiple": 2},
    "torch-pruning": {"use": "torch-pruning", "budget": "latency"},
    "torch-pruning, rounded": {"use": "torch-pruning", "budget": "latency", "round_to": 16},
    "torch-pruning, equal MACs": {"use": "torch-pruning", "budget": "macs"},
}


@register("stages", "torch-pruning")
class TorchPruning(BaseModel):
    """Torch-Pruning's MagnitudePruner, its ratio bisected, then the same healing as edgekd's stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "torch-pruning"
    follows: ClassVar[tuple[str, ...]] = ("teacher",)

    budget: Literal["latency", "macs"]
    share: float = 0.5
    round_to: int | None = None
    heal: Heal = Heal()
    after: str | None = None

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Any]]:
        return context.source, []

    def inputs(self) -> dict[str, str]:
        return {}

    def resolved(self, profiles: Sequence[Any], distilled: Teaching) -> TorchPruning:
        return self.model_copy(update={"heal": self.heal.after(distilled)})

    def run(self, workspace: Workspace) -> Artifact:
        torch.manual_seed(workspace.recipe.seed)
        kept = workspace.destination.parent / "ratio.json"
        source = workspace.parents["source"]
        original = load_network(source)
        if not kept.is_file():
            write_atomically(kept, json.dumps(self.ratio(original, workspace)))
        network = self.pruned(original, workspace.example[:1], json.loads(kept.read_text()))
        spec = source.manifest.model.model_copy(update={"attributes": changed_attributes(original, network)})
        student = Student(network, self.heal.objectives)
        [fit] = workspace.train(workspace.learner([student], teaching(self.heal)), self.heal)
        return workspace.save(network, spec, metrics=fit.metrics)

    def pruned(self, original: nn.Module, example: torch.Tensor, ratio: float) -> nn.Module:
        network = copy.deepcopy(original)
        stream = [m for path, m in network.named_modules() if path.endswith("conv2") or path in ("conv1", "linear")]
        importance = torch_pruning.importance.GroupMagnitudeImportance()
        torch_pruning.pruner.MagnitudePruner(
            network, example, importance, pruning_ratio=ratio, ignored_layers=stream, round_to=self.round_to
        ).step()
        return network

    def ratio(self, original: nn.Module, workspace: Workspace) -> float:
        """The smallest ratio, to a 64th, that meets the budget; the largest where none does."""
        example = workspace.example[:1]

        def left(ratio: float) -> float:
            network = self.pruned(original, example, ratio)
            if self.budget == "macs":
                return count_macs(network, example) / count_macs(original, example)
            files = {
                "before": workspace.destination.parent / "a.onnx",
                "after": workspace.destination.parent / "b.onnx",
            }
            for made, file in zip((original, network), files.values(), strict=True):
                exported(made, file, workspace.data)
            medians = round_medians(side_by_side(files, load_profile(PROFILE)).samples)
            return paired_ratio(medians["after"], medians["before"]).value

        low, high = 0, 62
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if left(middle / 64) <= self.share else (middle, high)
        return high / 64


def exported(network: nn.Module, file: Path, data: Dataset) -> None:
    seen = Preprocessing(size=data.size, mean=data.mean, std=data.std)
    whole = copy.deepcopy(network).eval()
    export_onnx(whole, file, size=data.size, opset=18, classes=data.classes, preprocessing=seen)


def stages_of(row: str, seed: int, options: argparse.Namespace) -> Stages:
    epochs = options.epochs * (4 if "4 times" in row else 1)
    stage = {**ROWS[row], "heal": healing(options, seed, epochs, options.lr)}
    if "equal MACs" in row:
        before = manifest_of("edgekd", seed, options, "teacher").manifest.metrics["macs"]
        stage["share"] = manifest_of("edgekd", seed, options, "prune").manifest.metrics["macs"] / before
    return [stage]


def main() -> None:
    parser = options_of(__doc__, rows=list(ROWS), runs="pruning-table", out="pruning_table.json")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.05)
    fill(parser.parse_args(), stages_of, "pruning")


if __name__ == "__main__":
    main()
