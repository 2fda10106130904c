from __future__ import annotations

import gc
import time

import numpy as np
import pytest
import tiny_onnx

from edgekd.bench import measure_latency, speedup, throughput
from edgekd.errors import UsageError
from edgekd.profile import Protocol
from edgekd.runtimes import open_session

QUICK = Protocol(rounds=6, block_s=0.004, warmup_s=0.004)


class Watched:
    """A real session that notes every call in a list which all sessions share."""

    def __init__(self, session, name, log, slow_s=0.0):
        self.session, self.name, self.log, self.slow_s = session, name, log, slow_s
        self.inputs, self.outputs, self.metadata = session.inputs, session.outputs, session.metadata

    def run(self, feed):
        return self.session.run(feed)

    def close(self):
        self.session.close()

    def bound(self, feed):
        call = self.session.bound(feed)

        def noted():
            self.log.append((self.name, gc.isenabled()))
            if self.slow_s:
                time.sleep(self.slow_s)
            call()

        return noted


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {n: tiny_onnx.chain(directory / f"{n}.onnx", width=64, layers=n) for n in (2, 24)}


def feed(batch=1):
    return {"x": np.ones((batch, 64), np.float32)}


def test_each_variant_has_one_block_per_round_in_random_order(files):
    log = []
    names = list("abc")
    sessions = {name: Watched(open_session(files[2]), name, log) for name in names}
    seen = []
    protocol = QUICK.model_copy(update={"rounds": 12})
    latencies, raw = measure_latency(
        sessions, dict.fromkeys(names, feed()), protocol, threads=1, progress=lambda *step: seen.append(step)
    )
    assert seen == [(i + 1, 12) for i in range(12)]
    per_round = {name: {len(samples) for samples in raw[name]} for name in names}
    assert all(len(counts) == 1 for counts in per_round.values())  # the same number of calls in every round
    assert all(len(raw[name]) == 12 and latencies[name].samples == sum(map(len, raw[name])) for name in names)
    size = {name: (kept := counts.pop()) + max(2, -(-kept // 10)) for name, counts in per_round.items()}
    calls = [name for name, _ in log]
    orders = []
    position = len(calls) - 12 * sum(size.values())
    for _ in range(12):
        order = []
        for _ in names:
            name = calls[position]
            assert calls[position : position + size[name]] == [name] * size[name]
            order.append(name)
            position += size[name]
        assert sorted(order) == names
        orders.append("".join(order))
    assert len(set(orders)) >= 3
    assert len({order[0] for order in orders}) == 3
    assert not any(collecting for _, collecting in log[len(names) * 2 :])
    assert gc.isenabled()


def test_the_order_depends_on_the_seed(files):
    def order(seed):
        log = []
        sessions = {name: Watched(open_session(files[2]), name, log, 0.001) for name in "ab"}
        measure_latency(sessions, dict.fromkeys("ab", feed()), QUICK, threads=1, seed=seed)
        return [name for name, _ in log][-6 * 2 * 5 :]  # blocks have at least five calls

    assert len({"".join(order(seed)) for seed in range(4)}) > 1


def test_a_larger_network_is_slower_by_about_its_size(files):
    sessions = {"teacher": open_session(files[24]), "student": open_session(files[2])}
    latencies, _ = measure_latency(
        sessions, dict.fromkeys(sessions, feed(32)), Protocol(rounds=8, block_s=0.01, warmup_s=0.01), threads=1
    )
    found = speedup(latencies["teacher"], latencies["student"])
    assert found.low > 2  # twelve times the layers, less what a call costs by itself
    assert found.high < 30
    assert latencies["teacher"].batch == 32


def test_a_network_against_itself_is_about_1(files):
    session = open_session(files[24])
    found = []
    for seed in range(5):
        latencies, _ = measure_latency(
            {"a": session, "b": session}, {"a": feed(8), "b": feed(8)}, QUICK, threads=1, seed=seed
        )
        found.append(speedup(latencies["a"], latencies["b"]))
    assert sum(f.low <= 1 <= f.high for f in found) >= 3
    assert np.median([f.value for f in found]) == pytest.approx(1, abs=0.15)


def test_the_time_cap_ends_the_rounds_but_three_are_always_done(files):
    sessions = {"a": open_session(files[2])}
    _, raw = measure_latency(sessions, {"a": feed()}, QUICK.model_copy(update={"cap_s": 1e-6}), threads=1)
    assert len(raw["a"]) == 3


def test_a_slow_network_still_has_three_samples_per_round(files):
    log = []
    sessions = {"slow": Watched(open_session(files[2]), "slow", log, slow_s=0.01)}
    latencies, raw = measure_latency(sessions, {"slow": feed()}, QUICK, threads=1)
    assert {len(samples) for samples in raw["slow"]} == {3}
    assert 10 <= latencies["slow"].p50.value < 100


def test_garbage_collection_is_restored_after_a_failure(files):
    with pytest.raises(UsageError, match="nothing to feed to 'a'"):
        measure_latency({"a": open_session(files[2])}, {}, QUICK, threads=1)
    with pytest.raises(UsageError, match="must be float32"):
        measure_latency({"a": open_session(files[2])}, {"a": {"x": np.ones((1, 64))}}, QUICK, threads=1)

    class Failing(Watched):
        def bound(self, feed):
            return lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        measure_latency({"a": Failing(open_session(files[2]), "a", [])}, {"a": feed()}, QUICK, threads=1)
    assert gc.isenabled()


def test_throughput_by_batch_size(files):
    log = []
    session = Watched(open_session(files[2]), "a", log, slow_s=0.005)
    found = throughput(session, feed, [1, 8], seconds=0.05)
    assert list(found) == ["1", "8"]
    assert 40 < found["1"] < 200
    assert found["8"] == pytest.approx(8 * found["1"], rel=0.5)


def test_throughput_leaves_out_what_a_static_network_refuses(tmp_path):
    file, _ = tiny_onnx.linear_classifier(tmp_path / "static.onnx", batch=4)
    found = throughput(
        open_session(file), lambda n: {"image": np.ones((n, 1, 4, 4), np.float32)}, [1, 4, 8], seconds=0.01
    )
    assert list(found) == ["4"]
    assert found["4"] > 0
