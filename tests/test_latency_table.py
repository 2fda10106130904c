"""The table of layers' latencies: measured once, kept, interpolated, and summed up to what the network takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
import torch

from edgekd.models import build, specify
from edgekd.onnx_file import optimised_layers
from edgekd.profile import Profile, load_profile
from edgekd.pruning import latency
from edgekd.pruning.candidates import find
from edgekd.pruning.costs import Predicted
from edgekd.pruning.latency import LatencyTable, timed_layers
from edgekd.pruning.one_layer import Precision, Shape, layer_file, measure_layers

CPU = load_profile("cpu-x86")
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, side: int, groups: int = 1) -> Shape:
    return Shape("conv", inputs, outputs, (side, side), (3, 3), (1, 1), (1, 1), (1, 1), groups)


class Clock:
    """Says that a layer takes 1 us and 1 ns per MAC of a pixel, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Shape] = []

    def __call__(self, shapes: Sequence[Shape], profile: Profile, precision: Precision) -> list[float]:
        self.asked += shapes
        return [1e-3 + 1e-6 * s.inputs * s.outputs / s.groups for s in shapes]


def test_a_layer_is_measured_once_and_kept_on_disk(tmp_path: Path) -> None:
    clock = Clock()
    shapes = [conv(16, 16, 8), conv(16, 32, 8), conv(16, 16, 8)]
    table = LatencyTable(CPU, directory=tmp_path, measure=clock)
    assert table.get(shapes) == {shapes[0]: 1e-3 + 256e-6, shapes[1]: 1e-3 + 512e-6}
    assert clock.asked == shapes[:2]
    again = LatencyTable(CPU, directory=tmp_path, measure=clock)
    assert again.get([*shapes, conv(3, 16, 8)])[shapes[1]] == 1e-3 + 512e-6
    assert clock.asked == [*shapes[:2], conv(3, 16, 8)]
    assert len(LatencyTable(CPU, directory=tmp_path, measure=clock)._known) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"layers": 3}', '{"layers": {"conv": "x"}}', "\x00\xff"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    clock = Clock()
    LatencyTable(CPU, directory=tmp_path, measure=clock).get([conv(16, 16, 8)])
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert LatencyTable(CPU, directory=tmp_path, measure=clock).get([conv(16, 16, 8)])
    assert len(clock.asked) == 2
    assert LatencyTable(CPU, directory=tmp_path, measure=clock).get([conv(16, 16, 8)])
    assert len(clock.asked) == 2


def test_a_directory_that_cannot_be_written_keeps_nothing_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock()
    assert LatencyTable(CPU, directory=tmp_path / "file", measure=clock).get([conv(16, 16, 8)])


def test_what_changes_times_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(profile: Profile = CPU, precision: Precision = "fp32") -> Path:
        return LatencyTable(profile, precision, directory=tmp_path).file

    protocol = CPU.protocol.model_copy(update={"batch": 8})
    others = [
        file(CPU.model_copy(update={"threads": 2})),
        file(CPU.model_copy(update={"protocol": protocol})),
        file(precision="int8"),
        file(CPU.model_copy(update={"scheme": "arm-s8s8"}), "int8"),
    ]
    assert len({file(), *others}) == 5
    same = CPU.model_copy(update={"name": "mine", "description": "other", "scheme": "arm-s8s8", "budgets": {"a": 1}})
    assert file(same) == file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert LatencyTable(CPU).file.parent == tmp_path / "cache" / "edgekd" / "latency"


def test_what_was_measured_on_a_busy_machine_is_measured_again_on_a_quiet_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, one, two = Clock(), conv(16, 16, 8), conv(16, 32, 8)

    def get(shapes: list[Shape], cores: float) -> int:
        monkeypatch.setattr(latency, "others_busy", lambda: lambda: cores)
        before = len(clock.asked)
        LatencyTable(CPU, directory=tmp_path, measure=clock).get(shapes)
        return len(clock.asked) - before

    monkeypatch.setattr(latency, "LOOK_S", 0.0)
    assert get([one], 1.5) == 1
    assert get([one, two], 1.5) == 1, "there is no better time yet"
    assert get([one], 0.0) == 1
    assert get([one], 0.0) == 0
    assert get([one, two], 0.0) == 1
    (file,) = tmp_path.iterdir()
    stored = json.loads(file.read_text())["layers"]
    assert {entry["busy"] for entry in stored.values()} == {0.0}
    assert all(datetime.fromisoformat(entry["measured"]).tzinfo for entry in stored.values())


def test_layers_sum_up_to_the_network_and_shrink_as_the_table_says(tmp_path: Path) -> None:
    network = build(specify("cifar-resnet", {"depth": 8, "width": 16}, classes=10, size=[3, 32, 32], where="m")).eval()
    found = find(network, IMAGE, importance="magnitude", channel_multiple=4, keep_outputs=10)
    clock = Clock()
    table = LatencyTable(CPU, directory=tmp_path, measure=clock)
    layers = timed_layers(network, IMAGE, found.candidates, table, 1.0, 4)
    predicted = Predicted(layers, found.candidates)
    assert predicted.total({}) == pytest.approx(1.0)
    # What the clock says of the two layers whose shared width goes from 32 to 20, and their parts of the rest.
    widths = {"layer2.0.conv1": 3}
    before = 2e-3 + 1e-6 * 32 * (16 + 32)
    after = 2e-3 + 1e-6 * 20 * (16 + 32)
    known = sum(1e-3 + 1e-6 * i * o for i, o in [(3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)])
    known += 1e-3 + 1e-6 * 640
    gives = 16 * 1024 * 3 + 32 * 256 * 2 + 64 * 64 * 2 + 10
    rest = (1.0 - known) * 32 * 256 * 12 / 32 / gives
    assert 1.0 - predicted.total(widths) == pytest.approx(before - after + rest)
    block = next(c.name for c in found.candidates if not c.sizes)
    assert block == "layer1.0"
    both = 2 * (1e-3 + 256e-6) + (1.0 - known) * 2 * 16 * 1024 / gives
    assert 1.0 - predicted.total({block: 1}) == pytest.approx(both)
    # Both sides of a layer at no more than five counts each, all of which the kernels like.
    assert all(shape.inputs % 4 == 0 or shape.inputs == 3 for shape in clock.asked)
    assert len(clock.asked) == len(set(clock.asked)) < 40
    faster = timed_layers(network, IMAGE, found.candidates, table, 0.5 * known, 4)
    assert Predicted(faster, found.candidates).total({}) == pytest.approx(0.5 * known)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_real_layers_are_timed_beyond_the_call_that_runs_them(precision: Precision) -> None:
    small, large, depthwise = conv(16, 16, 8), conv(64, 64, 32), conv(32, 32, 8, groups=32)
    token = Shape("linear", 32, 64, (16,))
    row = Shape("linear", 64, 10, ())
    ms = measure_layers([small, large, depthwise, token, row], CPU, precision)
    assert all(0 < one < 50 for one in ms)
    assert ms[1] > 10 * ms[0]  # 256 times the work


def test_int8_layers_are_computed_in_integers(tmp_path: Path) -> None:
    for i, shape in enumerate([conv(16, 16, 8), Shape("linear", 32, 64, (16,)), Shape("linear", 64, 10, ())]):
        file = tmp_path / f"{i}.onnx"
        file.write_bytes(layer_file(shape, 3, CPU, "int8").SerializeToString())
        assert optimised_layers(file) == {"int8": 3, "float": 0}
        file.write_bytes(layer_file(shape, 1, CPU, "fp32").SerializeToString())
        assert optimised_layers(file) == {"int8": 0, "float": 1}
