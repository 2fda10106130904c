"""Quick copies of a network: as independent as surgery needs them to be."""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgekd.pruning.clone import clone


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))
    made[2].tags = ["a"]
    return made.eval()


def test_surgery_on_a_clone_leaves_the_original_alone() -> None:
    original = network()
    before = copy.deepcopy(original)
    twin = clone(original)
    twin[0].weight = nn.Parameter(twin[0].weight[:2])
    twin[0].out_channels = 2
    twin[1].running_mean = twin[1].running_mean[:2]
    twin[2].tags.append("b")
    twin[2][0] = nn.Identity()
    twin.train()
    twin[2].register_forward_hook(lambda *args: None)
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(original(image), before(image))
    assert (original[0].out_channels, original[2].tags, original[2].training) == (4, ["a"], False)
    assert not original[2]._forward_hooks
    assert twin[2][1].weight is original[2][1].weight


def test_a_module_that_stands_in_two_places_does_so_in_the_clone() -> None:
    original = network()
    original[2].append(original[2][1])
    twin = clone(original)
    assert twin[2][2] is twin[2][1] is not original[2][1]


def test_modules_that_are_known_in_other_ways_than_as_children_are_copied_deeply() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.order = [self.a]  # not a ModuleList: nothing registers it

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.order[0](x)

    twin = clone(original := Listed())
    assert twin.order[0] is twin.a is not original.a
    assert twin.a.weight is not original.a.weight
    hooked = network()
    hooked.register_forward_hook(lambda module, args, result: hooked[0].weight.sum() + result)
    assert clone(hooked)[0].weight is not hooked[0].weight
