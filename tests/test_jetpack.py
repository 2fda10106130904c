"""JetPack's versions, against what flashed boards say of themselves."""

from __future__ import annotations

import pytest

from edgekd.errors import UsageError
from edgekd.jetpack import JETPACKS, closest, highest_opset, numbers, of_l4t, of_tensorrt, release, same_line

#: L4T, and the version of Debian's libnvinfer on boards whose owners published both: JetPack 6.0 sysroots and installs,
#: "Jetson Orin Baseline Summary" (April 2026), a survey of an AGX Orin (August 2026), isaac-ros-cli issue 22, a Thor.
BOARDS = [
    ("36.3.0", "8.6.2.3-1+cuda12.2", "6.0"),
    ("36.4.7", "10.3.0.30-1+cuda12.5", "6.2.1"),
    ("36.5.0", "10.3.0.30-1+cuda12.5", "6.2.2"),
    ("38.4.0", "10.13.3.9-1+cuda13.0", "7.1"),
    ("39.2.0", "10.16.2.10-1+cuda13.2", "7.2"),
]


@pytest.mark.parametrize(("l4t", "package", "version"), BOARDS)
def test_a_board_has_what_the_table_says(l4t: str, package: str, version: str) -> None:
    jetpack = of_l4t(l4t)
    assert jetpack is release(version)
    assert package.startswith(jetpack.tensorrt + ".")
    # 6.1 and later pack a TensorRT that was made for the CUDA before theirs.
    cuda = numbers(package.partition("+cuda")[2])
    assert cuda[0] == numbers(jetpack.cuda)[0]
    assert cuda <= numbers(jetpack.cuda)


def test_the_table_is_in_order_and_no_l4t_stands_twice() -> None:
    assert [p.version for p in JETPACKS] == sorted((p.version for p in JETPACKS), key=numbers)
    l4ts = [l4t for p in JETPACKS for l4t in p.l4t]
    assert len(l4ts) == len(set(l4ts))
    assert l4ts == sorted(l4ts, key=numbers)
    for p in JETPACKS:
        assert p.source
        assert {"5": "3.8", "6": "3.10", "7": "3.12"}[p.version[0]] == p.python
        assert set(p.boards) <= {"7.2", "8.7", "11.0"}
        assert all(same_line(line, (p.tensorrt, *p.also)) for line in p.dla)


def test_an_unknown_jetpack_gives_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no JetPack '6\.9' is known") as caught:
        release("6.9")
    assert caught.value.problem.hint == "the nearest is 6.2.3"
    assert [closest(v) for v in ("4.6", "5.1.2", "5.2", "6.1.1", "8.0")] == ["5.1", "5.1.2", "5.1.5", "6.1", "7.2.2"]
    assert of_l4t("40.1.0") is None


@pytest.mark.parametrize(
    ("version", "opset"),
    [("8.5.2", 17), ("8.6", 17), ("10.3", 20), ("10.13.3", 20), ("10.16", 24), ("11.4", 24), ("11.5.0", 25)],
)
def test_what_a_parser_takes(version: str, opset: int) -> None:
    assert highest_opset(version) == opset


def test_nothing_is_said_of_a_tensorrt_before_8_5() -> None:
    assert highest_opset("8.4.1") is None


def test_the_jetpack_of_a_tensorrt_is_the_newest_for_that_board() -> None:
    assert of_tensorrt("8.6").version == "6.0"
    assert of_tensorrt("10.3", "8.7").version == "6.2.3"
    assert of_tensorrt("10.7").version == "6.2.3"
    assert of_tensorrt("10.13", "11.0").version == "7.1"
    assert of_tensorrt("10.13", "8.7") is None
    assert of_tensorrt("11.4", "8.7").version == "7.2.2"
    assert of_tensorrt("11.2") is None  # "NVIDIA JetPack is not supported in TensorRT 11.3.0", nor in 11.2.1


def test_no_jetpack_has_a_dla_between_10_7_and_11_4() -> None:
    lines = {numbers(line) for p in JETPACKS for line in p.dla}
    assert lines == {(8, 5), (8, 6), (10, 3), (10, 6), (10, 7), (11, 4)}
