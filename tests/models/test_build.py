from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from edgekd.artifact import ModelSpec
from edgekd.errors import RecipeError, StageError, UsageError
from edgekd.models import build, changed_attributes, count, specify

SIZE = [3, 32, 32]


@pytest.mark.parametrize(
    ("use", "args"),
    [
        ("cifar-resnet", {"depth": 14, "width": 8}),
        ("cifar-resnet", {"depth": 8, "shortcut": "conv"}),
        ("mobilenet", {"width": 0.5}),
        ("vit", {"depth": 2, "dim": 48}),
    ],
)
def test_a_spec_read_back_from_json_builds_the_same_network(use: str, args: dict[str, object]) -> None:
    spec = specify(use, args, classes=7, size=[1, 32, 32], where="student")
    again = ModelSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    torch.manual_seed(3)
    first = build(spec)
    torch.manual_seed(3)
    second = build(again)
    x = torch.randn(2, 1, 32, 32)
    assert str(first) == str(second)
    assert first.eval()(x).shape == (2, 7)
    assert torch.equal(first(x), second.eval()(x))
    assert not torch.equal(first(x), build(spec).eval()(x))  # fresh weights come from the random state


def test_what_the_recipe_names_wins_over_the_data_set() -> None:
    spec = specify("vit", {"image_size": 16, "num_classes": 5}, classes=10, size=SIZE, where="student")
    assert (spec.args["image_size"], spec.args["num_classes"], spec.args["in_channels"]) == (16, 5, 3)


def test_all_wrong_arguments_are_reported_with_their_place() -> None:
    with pytest.raises(RecipeError) as caught:
        specify("cifar-resnet", {"depth": 21, "widht": 3}, classes=10, size=SIZE, where="stage[0].model")
    problems = {p.where: p for p in caught.value.problems}
    assert "6n+2" in problems["stage[0].model.depth"].what
    assert "20 and 26" in problems["stage[0].model.depth"].what
    assert problems["stage[0].model.widht"].hint == "did you mean 'width'?"


@pytest.mark.parametrize(("depth", "near"), [(7, "nearest: 8"), (9, "8 and 14"), (55, "50 and 56"), (57, "56 and 62")])
def test_nearest_depths(depth: int, near: str) -> None:
    with pytest.raises(RecipeError, match=near):
        specify("cifar-resnet", {"depth": depth}, classes=10, size=SIZE, where="m")


def test_unknown_network_and_impossible_sizes() -> None:
    with pytest.raises(UsageError, match="did you mean 'cifar-resnet'"):
        specify("cifar-resnt", {}, classes=10, size=SIZE, where="m")
    with pytest.raises(RecipeError, match="square"):
        specify("vit", {}, classes=10, size=[3, 32, 24], where="m")
    with pytest.raises(UsageError, match="multiple of heads"):
        build(specify("vit", {"dim": 100}, classes=10, size=SIZE, where="m"))
    with pytest.raises(UsageError, match="multiple of patch"):
        build(specify("vit", {"patch": 5}, classes=10, size=SIZE, where="m"))


def test_users_own_functions(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def plain():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.ReLU(inplace=True))\n"
        "def sized(num_classes: int, in_channels: int, hidden: int = 4):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, hidden, 1), nn.Flatten(), nn.LazyLinear(num_classes))\n"
        "def broken():\n    raise ValueError('no luck')\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    own = {"classes": 2, "size": [3, 2, 2], "where": "student"}
    plain = build(specify("my_nets:plain", {}, **own))
    assert plain[2].inplace is False  # an in-place activation would overwrite tapped features
    spec = specify("my_nets:sized", {"hidden": 6}, **own)
    assert spec.args == {"hidden": 6, "num_classes": 2, "in_channels": 3}
    assert build(spec)(torch.zeros(1, 3, 2, 2)).shape == (1, 2)
    with pytest.raises(UsageError, match="ValueError: no luck"):
        build(specify("my_nets:broken", {}, **own))
    with pytest.raises(UsageError, match="returned int"):
        build(specify("my_nets:wrong", {}, **own))
    with pytest.raises(RecipeError, match="unknown key"):
        specify("my_nets:plain", {"hidden": 1}, **own)


def test_changes_are_applied_and_recorded() -> None:
    spec = specify("cifar-resnet", {"depth": 8}, classes=10, size=SIZE, where="m")
    changed = build(spec)
    block = changed.layer1[0]
    block.conv1 = nn.Conv2d(16, 5, 3, 1, 1, bias=False)
    block.bn1 = nn.BatchNorm2d(5)
    block.conv2 = nn.Conv2d(5, 16, 3, 1, 1, bias=False)
    attributes = changed_attributes(build(spec), changed)
    assert attributes["layer1.0.conv1"] == {"out_channels": 5, "weight.shape": [5, 16, 3, 3]}
    assert attributes["layer1.0.conv2"] == {"in_channels": 5, "weight.shape": [16, 5, 3, 3]}
    assert attributes["layer1.0.bn1"]["num_features"] == 5
    assert attributes.keys() == {"layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"}
    rebuilt = build(spec.model_copy(update={"attributes": attributes}))
    assert changed_attributes(changed, rebuilt) == {}
    assert count(rebuilt, SIZE) == count(changed, SIZE)
    assert rebuilt.layer1[0].conv1.weight.std() > 0.05  # fresh weights, not zeros
    assert changed_attributes(build(spec), build(spec)) == {}


def test_replaced_modules_and_foreign_changes_are_refused() -> None:
    spec = specify("cifar-resnet", {"depth": 8}, classes=10, size=SIZE, where="m")
    changed = build(spec)
    changed.bn1 = nn.Identity()
    with pytest.raises(StageError, match="bn1"):
        changed_attributes(build(spec), changed)
    with pytest.raises(StageError, match="nowhere"):
        build(spec.model_copy(update={"attributes": {"nowhere": {"groups": 2}}}))
