"""A manifest or earlier results that lack something, and sessions that are given up, end in one message."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import run

from edgekd.bundle.runner import trtexec, work
from edgekd.bundle.runner.contents import load_arrays, read_manifest
from edgekd.bundle.runner.errors import Failed
from edgekd.bundle.runner.onnx_runtime import OnnxRuntime


@pytest.mark.parametrize("key", ["edgekd", "files", "networks", "profile", "rows"])
@pytest.mark.parametrize("value", [None, []])
def test_a_manifest_that_lacks_something_is_damaged(made: Path, tmp_path: Path, key: str, value: object) -> None:
    told = {**json.loads((made / "bundle.json").read_text()), key: {} if key == "networks" else value}
    (tmp_path / "bundle.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    with pytest.raises(Failed, match=f"bundle.json is damaged: `{key}` is missing or wrong"):
        read_manifest(str(tmp_path))


def test_a_damaged_manifest_is_no_bug_of_the_runner(fresh: Callable[[], Path]) -> None:
    bundle = fresh()
    (bundle / "bundle.json").write_text('{"format": 1}')
    assert "hint: copy the whole bundle again" in run(bundle, code=3).stderr


def nothing(event: str, words: str, **_: object) -> None:
    """Nobody listens."""


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("sessions"),
        lambda t: t.pop("runtime"),
        lambda t: t.update(rounds={}),
        lambda t: t.update(rounds=[{"networks": {"fp32": {"p50": 1.0, "ns": []}}}]),
        lambda t: t.update(rounds=[{}]),
        lambda t: t["networks"].update(fp32={}),
    ],
)
def test_earlier_results_that_lack_something_are_made_anew(
    made: Path, tmp_path: Path, change: Callable[[dict], object]
) -> None:
    first = work.Run(str(made), str(tmp_path), "auto", False, nothing)
    first.results["rounds"] = [{"networks": {"fp32": {"p50": 1.0, "ns": [1000000]}}}]
    first.write()
    assert work.Run(str(made), str(tmp_path), "auto", False, nothing).results["rounds"] == first.results["rounds"]
    change(first.results)
    first.write()
    said = []
    again = work.Run(str(made), str(tmp_path), "auto", False, lambda event, words, **_: said.append(words))
    assert said[-1] == "the old results.json is damaged and is made anew"
    assert (again.results["rounds"], again.results["networks"]) == ([], {})


def test_a_network_whose_outputs_are_wrong_holds_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(OnnxRuntime, "close", lambda session: closed.append(session.network["name"]))
    running = work.Run(str(made), str(tmp_path), "auto", False, nothing)
    inputs, expected = load_arrays(str(made), "inputs.npz"), load_arrays(str(made), "expected.npz")
    expected["int8.logits"] = np.negative(expected["int8.logits"])
    opened = [running._checked(network, inputs, expected) for network in running.manifest["networks"]]
    assert [session is None for session in opened] == [False, True]
    assert closed == ["int8"]


def test_where_neither_tensorrt_nor_trtexec_is_the_hint_names_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trtexec, "PLACES_OF_TRTEXEC", ("/nowhere",))
    with pytest.raises(Failed, match=r"TensorRT is not here: .*; and no trtexec") as raised:
        work.chosen("auto", "tensorrt")
    assert raised.value.hint == "on a Jetson: sudo apt install nvidia-jetpack python3-libnvinfer"
