"""ONNX Runtime's binding to device memory, with the CPU as the device: the same calls, but nothing of CUDA is run."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_onnx

from edgekd.bench import measure_latency
from edgekd.errors import UsageError
from edgekd.profile import Protocol
from edgekd.runtimes import DeviceCall, open_session
from edgekd.runtimes.onnxruntime import open_native
from edgekd.runtimes.onnxruntime_cuda import DeviceSession


@pytest.fixture
def session(tmp_path):
    file, weights = tiny_onnx.linear_classifier(tmp_path / "model.onnx")
    made = DeviceSession(open_native(file, 1, ["CPUExecutionProvider"]), file, "cpu", None)
    made.weights = weights
    return made


def images(n):
    return np.random.default_rng(0).standard_normal((n, 1, 4, 4)).astype(np.float32)


def test_a_bound_call_copies_in_computes_and_copies_out(session):
    x = images(3)
    call = session.bound({"image": x})
    np.testing.assert_allclose(call.answers[0], x.reshape(3, -1) @ session.weights, rtol=1e-4, atol=1e-4)
    x[:] = images(3)[::-1]  # the array that was bound has other values now, and the next call must copy them
    call()
    np.testing.assert_allclose(call.answers[0], x.reshape(3, -1) @ session.weights, rtol=1e-4, atol=1e-4)


def test_two_bound_calls_have_buffers_of_their_own(session):
    one, two = session.bound({"image": images(1)}), session.bound({"image": images(4)})
    one()
    assert one.answers[0].shape == (1, 5)
    assert two.answers[0].shape == (4, 5)
    np.testing.assert_allclose(one.answers[0], images(1).reshape(1, -1) @ session.weights, rtol=1e-4, atol=1e-4)


def test_its_parts_are_of_the_last_call(session):
    call = session.bound({"image": images(1)})
    assert isinstance(call, DeviceCall)
    parts = call.parts()
    assert set(parts) == {"compute", "transfers"}
    assert all(ms > 0 for ms in parts.values())


def test_a_feed_that_does_not_fit_is_refused_before_binding(session):
    with pytest.raises(UsageError, match="must be float32"):
        session.bound({"image": images(1).astype(np.float64)})


def test_measuring_keeps_compute_and_transfers_apart(session, tmp_path):
    protocol = Protocol(rounds=3, block_s=0.01, warmup_s=0.02, cap_s=1)
    host = open_session(tmp_path / "model.onnx")
    feed = {"image": images(2)}
    measured = measure_latency({"device": session, "host": host}, {"device": feed, "host": feed}, protocol, 1)
    parts = measured.latencies["device"].parts
    assert set(parts) == {"compute", "transfers"}
    assert all(part.low <= part.value <= part.high for part in parts.values())
    # Medians of parts need not add up, but what lies within a call is not longer than the call.
    end_to_end = measured.latencies["device"].p50
    assert 0 < parts["compute"].value < end_to_end.high
    assert 0 < parts["transfers"].value < end_to_end.high
    assert measured.latencies["host"].parts == {}
