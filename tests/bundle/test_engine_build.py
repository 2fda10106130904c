"""The runner builds through TensorRT's API: here with the real one of TensorRT-RTX, which compiles without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

SCRIPT = Path(__file__).with_name("rtx_build.py")


def built(bundle: Path, path: Path, batch: int, cache: Path) -> dict:
    """In a process of its own, as TensorRT heeds the first logger only."""
    pytest.importorskip("tensorrt_rtx_bindings")
    command = [sys.executable, str(SCRIPT), str(bundle / "run.py"), str(path), str(batch), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_int8_file_with_a_free_batch_becomes_an_engine_whatever_timings_are_there(
    made: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another version")
    assert built(made, made / "int8.onnx", 4, cache)["bytes"] > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["timing.cache"]


def test_a_file_that_the_parser_refuses_is_told_with_its_reason(made: Path, tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    node = helper.make_node("Abracadabra", ["x"], ["y"], domain="my.own")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.own", 1)]
    model = helper.make_model(helper.make_graph([node], "own", value[:1], value[1:]), opset_imports=opsets)
    onnx.save(model, tmp_path / "own.onnx")
    problem = built(made, tmp_path / "own.onnx", 1, tmp_path / "timing.cache")["problem"]
    assert problem.startswith("TensorRT 11.0.0 refuses it: ")
    assert "Abracadabra" in problem
