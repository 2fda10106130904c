from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import tiny_onnx

from edgekd.artifact import TensorInfo
from edgekd.errors import StageError, UsageError
from edgekd.registry import names
from edgekd.runtimes import open_session


@pytest.fixture
def classifier(tmp_path):
    return tiny_onnx.linear_classifier(tmp_path / "model.onnx")


def images(n, dtype=np.float32):
    return np.random.default_rng(0).integers(0, 255, (n, 1, 4, 4)).astype(dtype)


def test_describes_inputs_outputs_and_metadata(classifier):
    session = open_session(classifier[0])
    assert session.inputs == [TensorInfo(name="image", dtype="float32", axes=["batch", 1, 4, 4])]
    assert session.outputs == [TensorInfo(name="logits", dtype="float32", axes=["batch", 5])]
    assert session.metadata == {"classes": '["a", "b"]'}


@pytest.mark.parametrize("threads", [1, 2])
def test_run_equals_numpy(classifier, threads):
    file, weights = classifier
    x = images(3)
    out = open_session(file, threads=threads).run({"image": x})
    np.testing.assert_allclose(out["logits"], x.reshape(3, -1) @ weights, rtol=1e-5, atol=1e-3)


def test_bound_call_works_on_its_own_buffers(classifier, monkeypatch):
    """The arrays behind a binding must outlive `bound`: nothing else refers to the feed here."""
    import onnxruntime as ort

    kept = []
    original = ort.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(
        ort.OrtValue, "ortvalue_from_numpy", staticmethod(lambda array: kept.append(array) or original(array))
    )
    file, weights = classifier
    call = open_session(file).bound({"image": images(2)})
    gc.collect()
    fed, result = kept
    result[:] = 0
    call()
    np.testing.assert_allclose(result, fed.reshape(2, -1) @ weights, rtol=1e-5, atol=1e-3)
    assert any(held is fed for value in vars(call)["kept"][0].values() for held in gc.get_referents(value.__dict__))


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"imag": images(1)}, "has no input 'imag'.*\n.*did you mean 'image'"),
        ({}, r"input 'image' is missing.*\n.*float32 \[batch, 1, 4, 4\]"),
        ({"image": images(1, np.float64)}, "must be float32, got float64"),
        ({"image": images(1)[:, :, :3]}, r"must be 'image': float32 \[batch, 1, 4, 4\], got shape \[1, 1, 3, 4\]"),
        ({"image": images(1)[0]}, r"got shape \[1, 4, 4\]"),
        ({"image": [[1.0]]}, "must be a NumPy array, got list"),
    ],
)
def test_a_feed_that_does_not_fit_is_a_usage_error(classifier, feed, message):
    session = open_session(classifier[0])
    for method in (session.run, session.bound):
        with pytest.raises(UsageError, match=message) as caught:
            method(feed)
        assert caught.value.problem.where == str(classifier[0])


def test_a_named_axis_has_one_size(tmp_path):
    session = open_session(tiny_onnx.two_inputs(tmp_path / "sum.onnx"))
    a, b = np.ones((3, 2), np.float32), np.ones((1, 2), np.float32)
    assert (session.run({"a": a, "b": a})["sum"] == 2).all()
    with pytest.raises(UsageError, match="axis 'n' is 3 in 'a' but 1 in 'b'"):
        session.run({"a": a, "b": b})


def test_bad_files_are_usage_errors(classifier, tmp_path):
    file, _ = classifier
    whole = file.read_bytes()
    cases = {
        "truncated.onnx": (whole[: len(whole) // 2], "not a model that ONNX Runtime"),
        "noise.onnx": (bytes(range(256)) * 4, "not a model that ONNX Runtime"),
        "empty.onnx": (b"", "is empty"),
    }
    for name, (content, message) in cases.items():
        bad = tmp_path / name
        bad.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            open_session(bad)
        assert caught.value.exit_code == 2
        assert caught.value.problem.where == str(bad)
        assert caught.value.problem.hint
        assert "\n" not in caught.value.problem.what
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        open_session(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="is a directory"):
        open_session(tmp_path)


def test_unknown_runtime_lists_the_known_ones(classifier):
    assert "onnxruntime" in names("runtimes")
    with pytest.raises(UsageError, match="no runtimes called 'onnxrt'") as caught:
        open_session(classifier[0], runtime="onnxrt")
    assert "onnxruntime" in caught.value.problem.hint


def test_a_closed_session_says_so(classifier):
    session = open_session(classifier[0])
    session.close()
    session.close()
    with pytest.raises(StageError, match="closed"):
        session.run({"image": images(1)})


def test_profile_dir_gets_a_trace(classifier, tmp_path):
    session = open_session(classifier[0], profile_dir=tmp_path / "new" / "traces")
    session.run({"image": images(1)})
    session.close()
    (trace,) = (tmp_path / "new" / "traces").glob("model*.json")
    assert any(event.get("args", {}).get("op_name") == "MatMul" for event in json.loads(trace.read_text()))
