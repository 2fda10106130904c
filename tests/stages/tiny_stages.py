"""Names and configurations that the tests of stages share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from edgekd.artifact import Artifact
from edgekd.recipe import Recipe, parse_recipe
from edgekd.stages import Workspace

RESNET = {"use": "cifar-resnet", "depth": 8, "width": 8}
HINT = {"use": "hint", "student": "layer2", "teacher": "layer2", "weight": 0.5}
TAUGHT = [{"use": "ce", "weight": 0.1}, {"use": "kl", "weight": 0.9}, HINT]


@dataclass(frozen=True)
class Saving(Workspace):
    """Remembers each network that was stored."""

    saved: dict[str, nn.Module] = field(default_factory=dict)

    def save(self, network: nn.Module, *args: Any, **options: Any) -> Artifact:
        self.saved[self.name] = network
        return super().save(network, *args, **options)


class Chain(NamedTuple):
    artifacts: dict[str, Artifact]
    saved: dict[str, nn.Module]


def made_recipe(**data: Any) -> Recipe:
    return parse_recipe(
        {
            "version": 1,
            "name": "tiny",
            "data": {"use": "digits", "batch": 50, **data},
            "teacher": {"model": RESNET, "epochs": 1},
        }
    )
