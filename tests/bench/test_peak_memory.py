from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny_onnx

from edgekd.bench import footprint, footprint_of, memory
from edgekd.errors import StageError, UsageError

FEED = {"x": np.ones((1, 1), np.float32)}


def test_peak_memory_counts_buffers_and_not_this_process(tmp_path):
    small = tiny_onnx.expanding(tmp_path / "small.onnx", megabytes=1)
    large = tiny_onnx.expanding(tmp_path / "large.onnx", megabytes=200)
    ballast = np.ones(60_000_000)  # 480 MB here: Linux hands ru_maxrss over to a child
    first, second = (footprint_of(file, FEED, 1).peak_memory_mb for file in (small, large))
    assert ballast.sum() > 0
    assert 20 < first < 300
    assert second - first > 190


def test_load_time_is_that_of_opening_the_file(tmp_path):
    few, many = (tiny_onnx.chain(tmp_path / f"{n}.onnx", width=512, layers=n) for n in (1, 60))
    fast, slow = (footprint_of(file, {"x": np.ones((1, 512), np.float32)}, 1).load_ms for file in (few, many))
    assert 0 < fast.low <= fast.value <= fast.high
    assert slow.low > 3 * fast.value  # sixty times the weights


def test_the_child_does_not_import_torch():
    import subprocess

    code = "import sys, edgekd.bench.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_failures_keep_their_kind(tmp_path, monkeypatch):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"noise")
    with pytest.raises(UsageError, match="not a model") as caught:
        footprint_of(broken, FEED, 1)
    assert caught.value.problem.where == str(broken)
    monkeypatch.setattr(footprint, "TIMEOUT_S", 0.001)
    with pytest.raises(StageError, match="did not end within"):
        footprint_of(broken, FEED, 1)


def test_inputs_are_written_out_and_read_back():
    feed = memory._feed(["a=b=uint8:2x3", "scalar=float32:"])
    assert feed["a=b"].shape == (2, 3)
    assert feed["a=b"].dtype == np.uint8
    assert feed["scalar"].shape == ()
