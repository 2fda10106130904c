from __future__ import annotations

import gc
import os
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import tiny_onnx

from edgekd.bench import (
    layer_times,
    measure,
    measure_latency,
    offline,
    pinned,
    ratios_known,
    speedup,
    throughput,
    unsteadiness,
)
from edgekd.errors import EdgekdError, UsageError
from edgekd.profile import Protocol
from edgekd.runtimes import open_session

QUICK = Protocol(rounds=6, block_s=0.004, warmup_s=0.004, precision=10.0)


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
    found = measure_latency(
        sessions, dict.fromkeys(names, feed()), protocol, threads=1, progress=lambda *step: seen.append(step)
    )
    latencies, raw = found.latencies, found.samples
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
    protocol = Protocol(rounds=8, block_s=0.01, warmup_s=0.01, precision=10.0)
    latencies = measure_latency(sessions, dict.fromkeys(sessions, feed(32)), protocol, threads=1).latencies
    found = speedup(latencies["teacher"], latencies["student"])
    assert found.low > 2  # twelve times the layers, less what a call costs by itself
    assert found.high < 30
    assert latencies["teacher"].batch == 32


def test_a_network_against_itself_is_about_1(files):
    session = open_session(files[24])
    found = []
    for seed in range(5):
        latencies = measure_latency(
            {"a": session, "b": session}, {"a": feed(8), "b": feed(8)}, QUICK, threads=1, seed=seed
        ).latencies
        found.append(speedup(latencies["a"], latencies["b"]))
    assert sum(f.low <= 1 <= f.high for f in found) >= 3
    assert np.median([f.value for f in found]) == pytest.approx(1, abs=0.15)


def test_the_time_cap_ends_the_rounds_but_three_are_always_done(files):
    sessions = {"a": open_session(files[2])}
    found = measure_latency(sessions, {"a": feed()}, QUICK.model_copy(update={"cap_s": 1e-6}), threads=1)
    assert len(found.samples["a"]) == 3


def test_a_slow_network_still_has_three_samples_per_round(files):
    log = []
    sessions = {"slow": Watched(open_session(files[2]), "slow", log, slow_s=0.01)}
    found = measure_latency(sessions, {"slow": feed()}, QUICK, threads=1)
    assert {len(samples) for samples in found.samples["slow"]} == {3}
    assert 10 <= found.latencies["slow"].p50.value < 100


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


def test_rounds_go_on_until_the_caller_is_content(files):
    looks = []

    def settled(samples):
        looks.append(len(samples["a"]))
        return len(looks) == 4

    found = measure_latency({"a": open_session(files[2])}, {"a": feed()}, QUICK, threads=1, settled=settled)
    assert looks == [6, 8, 10, 13]  # a quarter more each time
    assert len(found.samples["a"]) == 13


def test_rounds_end_when_medians_and_ratios_are_known():
    def samples(spread_a, spread_b, rounds=12):
        rng = np.random.default_rng(0)
        return {n: [[m] for m in np.exp(rng.normal(0, s, rounds))] for n, s in (("a", spread_a), ("b", spread_b))}

    assert measure._known(samples(0.002, 0.002), 0.01)
    assert not measure._known(samples(0.05, 0.05), 0.01)
    together = np.exp(np.random.default_rng(1).normal(0, 0.2, 12))  # drift that both share: the ratio is exact
    shared = {"a": [[x] for x in together], "b": [[2 * x] for x in together]}
    assert ratios_known(shared, 0.001)
    assert not measure._known(shared, 0.01)


def test_warm_up_goes_on_until_windows_agree(files):
    """The first 60 calls are ever faster; a fixed warm-up of 6 windows of 3 calls would keep slow ones."""
    session, calls = open_session(files[2]), []

    class Cooling(Watched):
        def bound(self, feed):
            def call():
                calls.append(0)
                time.sleep(max(0.0, 0.006 - 0.0001 * len(calls)) + 0.0005)

            return call

    protocol = QUICK.model_copy(update={"warmup_s": 0.05})
    found = measure_latency({"a": Cooling(session, "a", [])}, {"a": feed()}, protocol, threads=1).latencies["a"]
    assert found.warmup_s > 0.15  # three times what was asked for at least
    assert found.p50.value < 3  # the first calls took 6 ms


def test_a_network_that_never_settles_is_told(files):
    calls = []

    class Restless(Watched):
        def bound(self, feed):
            def call():
                calls.append(0)
                time.sleep(0.0002 * (1 + len(calls) / 20))

            return call

    protocol = QUICK.model_copy(update={"warmup_s": 0.01})
    latencies = measure_latency(
        {"a": Restless(open_session(files[2]), "a", [])}, {"a": feed()}, protocol, threads=1
    ).latencies
    assert not latencies["a"].steady
    told = unsteadiness(latencies, protocol)
    assert any("not steady" in text for text in told)
    assert any("slower from the first third" in text for text in told)


def test_sessions_are_opened_anew_every_fourth_round(files):
    opened, log = [], []

    def reopen(name):
        opened.append(Watched(open_session(files[2]), f"{name}{len(opened)}", log))
        return opened[-1]

    protocol = QUICK.model_copy(update={"rounds": 9})
    sessions = {"a": Watched(open_session(files[2]), "first", log)}
    measure_latency(sessions, {"a": feed()}, protocol, threads=1, reopen=reopen)
    used = list(dict.fromkeys(name for name, _ in log))
    assert used == ["first", "a0", "a1"]
    with pytest.raises(EdgekdError, match="closed"):
        opened[0].run(feed())
    sessions["a"].run(feed())  # the caller's own stays open


def test_pinning_holds_for_threads_begun_meanwhile_and_ends():
    before = os.sched_getaffinity(0)
    core = min(before)
    with pinned([core]):
        assert os.sched_getaffinity(0) == {core}
        seen = []
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert seen == [{core}]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(UsageError, match="no core 4095"), pinned([4095]):
        pass


def test_throughput_by_batch_size(files):
    log = []
    session = Watched(open_session(files[2]), "a", log, slow_s=0.005)
    found = throughput({"a": session}, lambda name, batch: feed(batch), [1, 8], 0.02)["a"]
    assert list(found) == ["1", "8"]
    assert 40 < found["1"].value < 200
    assert found["8"].value == pytest.approx(8 * found["1"].value, rel=0.5)
    assert found["1"].low <= found["1"].value <= found["1"].high


def test_throughput_leaves_out_what_a_static_network_refuses(tmp_path):
    file, _ = tiny_onnx.linear_classifier(tmp_path / "static.onnx", batch=4)
    sessions = {"a": open_session(file)}
    found = throughput(sessions, lambda _, n: {"image": np.ones((n, 1, 4, 4), np.float32)}, [1, 4, 8], 0.01)["a"]
    assert list(found) == ["4"]
    assert found["4"].value > 0


def test_offline_counts_the_images_of_whole_passes(files):
    class Slow(Watched):
        def run(self, feed):
            time.sleep(0.005)
            return self.session.run(feed)

    sessions = {"a": Slow(open_session(files[2]), "a", [])}
    found = offline(sessions, {"a": [feed(8), feed(8), feed(4)]})["a"]
    assert 100 < found.value < 20 / 0.015  # 20 images in three sleeps of 5 ms


def test_time_per_operator_adds_up(files):
    found = layer_times(files[24], feed(), 1)
    assert 10 < len(found) <= 20
    assert all(a.ms >= b.ms for a, b in pairwise(found))
    assert 0.3 < sum(t.share for t in found) <= 1.0  # 48 operators, of which the slowest 20 are told
    assert found[0].share == pytest.approx(found[0].ms / found[1].ms * found[1].share)
    assert {t.op for t in found} & {"Gemm", "MatMul", "FusedMatMul", "FusedGemm"}
