"""Files compared briefly: interleaved, by name, and a tenfold difference shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_onnx import chain

from edgekd.bench import paired_ratio, round_medians, side_by_side
from edgekd.errors import UsageError
from edgekd.profile import load_profile


def test_ten_times_the_layers_are_seen_to_take_longer(tmp_path: Path) -> None:
    files = {
        "one": chain(tmp_path / "a.onnx", width=128, layers=4),
        "ten": chain(tmp_path / "b.onnx", width=128, layers=40),
    }
    measured = side_by_side(files, load_profile("cpu-x86"), rounds=3, cap_s=3.0)
    assert list(measured.samples) == ["one", "ten"]
    assert all(len(rounds) >= 3 for rounds in measured.samples.values())
    medians = round_medians(measured.samples)
    assert paired_ratio(medians["ten"], medians["one"]).value > 3


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.onnx"):
        side_by_side({"a": tmp_path / "none.onnx"}, load_profile("cpu-x86"))
