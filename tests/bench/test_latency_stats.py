from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats as reference

from edgekd.bench import stats
from edgekd.bench.stats import (
    bootstrap_median,
    bootstrap_median_by_round,
    bootstrap_quantile_by_round,
    mcnemar,
    paired_drop,
    paired_ratio,
    speedup,
    summarize,
    unpaired_ratio,
    wilson,
)
from edgekd.errors import UsageError


def test_p99_floor_is_the_least_that_knows_a_99th_percentile():
    """Two samples beyond the true percentile with 99 % confidence: a binomial tail."""
    least = next(n for n in range(1, 2000) if reference.binom.cdf(1, n, 0.01) <= 0.01)
    assert least == stats.MIN_P99_SAMPLES


@pytest.mark.parametrize("degrees", [2, 3, 5, 11, 29, 200])
def test_t_quantile(degrees):
    assert stats._t975(degrees) == pytest.approx(reference.t.ppf(0.975, degrees), rel=0.01)
    assert stats._normal_cdf(-1.3) == pytest.approx(reference.norm.cdf(-1.3), rel=1e-12)


def test_percentiles_are_expanded_for_few_rounds():
    for n in (6, 10, 12, 100):
        expected = reference.norm.cdf(-math.sqrt(n / (n - 1)) * reference.t.ppf(0.975, n - 1))
        assert stats._expanded_tail(n) == pytest.approx(expected, rel=0.01)
    assert stats._expanded_tail(10**6) == pytest.approx(0.025, abs=1e-5)


def test_bootstrap_equals_all_resamples_enumerated():
    """Of five values there are 5^5 resamples: the quantiles of their medians, at expanded levels, are the interval."""
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    medians = np.median(list(product(values, repeat=5)), axis=1)
    tail = reference.norm.cdf(-math.sqrt(5 / 4) * reference.t.ppf(0.975, 4))
    low, high = np.quantile(medians, [tail, 1 - tail])
    found = bootstrap_median(values)
    assert (found.value, found.low, found.high) == (4.0, low, high)
    assert found == bootstrap_median(values)


@pytest.mark.parametrize("scenario", ["log-normal", "bimodal", "bursts"])
def test_interval_covers_about_95_percent(scenario):
    rng = np.random.default_rng(3)
    rounds, n, trials = 12, 60, 500
    shift = {"log-normal": 0.1, "bimodal": 0.02, "bursts": 0.01}[scenario]

    def sample():
        x = rng.normal(0, shift, (rounds, 1)) + rng.normal(0, 0.1, (rounds, n))
        if scenario == "bimodal":
            x += np.where(rng.random((rounds, n)) < 0.3, 0.5, 0)
        if scenario == "bursts":
            x += np.where(rng.random((rounds, 1)) < 0.15, 0.4, 0)
        return np.exp(x)

    truth = np.median(np.concatenate([np.median(sample(), axis=1) for _ in range(3000)]))
    found = [bootstrap_median_by_round(sample(), seed=i) for i in range(trials)]
    covered = np.mean([f.low <= truth <= f.high for f in found])
    assert 0.925 <= covered <= 0.985  # 95 % within three standard errors of 500 trials


def test_rounds_are_what_is_drawn_not_samples():
    """A thousand samples per round do not narrow what differs between rounds."""
    rng = np.random.default_rng(0)
    rounds = [rng.normal(level, 0.001, 1000) for level in (1.0, 2.0, 3.0, 4.0, 5.0)]
    found = bootstrap_median_by_round(rounds)
    assert found.value == pytest.approx(3.0, abs=0.01)
    assert found.high - found.low > 2


def test_paired_ratio_cancels_what_slows_both():
    drift = np.linspace(1.0, 3.0, 12)
    found = paired_ratio(list(2.0 * drift), list(drift))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    with pytest.raises(UsageError, match="12 and 11 rounds"):
        paired_ratio(list(drift), list(drift[1:]))


def test_speedup_of_latencies():
    rng = np.random.default_rng(0)
    drift = np.exp(rng.normal(0, 0.3, 12))
    slow, fast = (
        summarize([m * d * np.exp(rng.normal(0, 0.01, 50)) for d in drift], batch=1, threads=1) for m in (3.0, 1.0)
    )
    found = speedup(slow, fast)
    assert found.low <= 3.0 <= found.high
    assert found.high - found.low < 0.05 < slow.p50.high - slow.p50.low
    assert speedup(slow, slow).value == 1.0


def test_summary_of_samples():
    rounds = np.random.default_rng(0).lognormal(0, 0.3, (10, 67))
    found = summarize(rounds.tolist(), batch=8, threads=2)
    everything = np.sort(rounds.ravel())
    assert found.samples == 670
    assert found.p99.value == pytest.approx(np.percentile(everything, 99))
    assert found.p90.value == pytest.approx(np.percentile(everything, 90))
    assert found.p95.value == pytest.approx(np.percentile(everything, 95))
    assert all(q.low < q.value < q.high for q in (found.p90, found.p95, found.p99))
    assert found.histogram is not None
    assert sum(found.histogram.counts) == 670
    assert found.histogram.counts[-1] >= 6  # beyond p99
    curve = dict(found.curve)
    assert (curve[50.0], curve[99.0]) == pytest.approx((np.median(everything), np.percentile(everything, 99)))
    assert 99.9 not in curve  # of 670 samples less than one lies beyond
    assert found.mean == pytest.approx(everything.mean())
    q1, q2, q3 = np.percentile(everything, [25, 50, 75])
    assert found.spread == pytest.approx((q3 - q1) / q2)
    assert found.round_p50 == pytest.approx(np.median(rounds, axis=1))
    assert found.p50.value == pytest.approx(np.median(found.round_p50))
    assert found.p50.low <= found.p50.value <= found.p50.high
    assert (found.batch, found.threads) == (8, 2)
    assert summarize(rounds[:, :66].tolist(), batch=1, threads=1).p99 is None  # 660 samples


def test_paired_drop_is_agresti_and_mins_interval():
    a = np.array([1] * 85 + [0] * 15, dtype=bool)
    b = a.copy()
    b[:9] = False  # nine lost
    b[85:88] = True  # three gained
    found = paired_drop(a, b)
    assert found.value == pytest.approx(0.06)
    n12, n21, n = 9.5, 3.5, 102  # their +2 adjustment
    centre = (n12 - n21) / n
    half = 1.96 * math.sqrt(n12 + n21 - (n12 - n21) ** 2 / n) / n
    assert found.low == pytest.approx(centre - half, abs=1e-5)
    assert found.high == pytest.approx(centre + half, abs=1e-5)
    assert paired_drop(b, a).value == pytest.approx(-0.06)


def test_paired_drop_covers_about_95_percent():
    rng = np.random.default_rng(0)
    cells = np.array([0.85, 0.05, 0.03, 0.07])  # both right, lost, gained, both wrong
    hits = 0
    for _ in range(1000):
        draw = rng.choice(4, 500, p=cells)
        found = paired_drop(draw <= 1, (draw == 0) | (draw == 2))
        hits += found.low <= 0.02 <= found.high
    assert 0.93 <= hits / 1000 <= 0.97


def test_paired_drop_of_few_images():
    same = paired_drop([True] * 10, [True] * 10)
    assert same.value == 0
    assert same.low < 0 < same.high
    one = paired_drop([True], [False])
    assert one.value == one.high == 1.0
    for a, b in (([], []), ([True], [True, False])):
        with pytest.raises(UsageError, match="same images"):
            paired_drop(a, b)


@pytest.mark.parametrize("rounds_vary", [0.0, 0.02])
@pytest.mark.parametrize("share", [0.9, 0.99])
def test_quantile_interval_covers_about_95_percent(share, rounds_vary):
    rng = np.random.default_rng(5)

    def sample(rounds, n):
        x = rng.normal(0, rounds_vary, (rounds, 1)) + rng.normal(0, 0.1, (rounds, n))
        return np.exp(x + np.where(rng.random((rounds, n)) < 0.2, 0.5, 0))

    truth = np.quantile(sample(4000, 400), share)
    found = [bootstrap_quantile_by_round(sample(16, 80), share, seed=i) for i in range(400)]
    assert 0.91 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.99  # three standard errors of 400 trials
    assert np.median([f.high - f.low for f in found]) < 0.35 * truth


def test_quantile_interval_of_one_round_and_of_nonsense():
    found = bootstrap_quantile_by_round([[1.0, 2.0, 3.0]], 0.5)
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)
    for wrong in ([], [[]], [[1.0, float("inf")]]):
        with pytest.raises(ValueError, match="finite samples"):
            bootstrap_quantile_by_round(wrong, 0.5)


def test_unpaired_ratio_covers_the_ratio_of_independent_sessions():
    rng = np.random.default_rng(0)
    found = [
        unpaired_ratio(3 * np.exp(rng.normal(0, 0.05, 12)), np.exp(rng.normal(0, 0.02, 20)), seed=i) for i in range(400)
    ]
    assert 0.91 <= np.mean([f.low <= 3 <= f.high for f in found]) <= 0.99


@pytest.mark.parametrize(("lost", "gained"), [(9, 3), (0, 0), (0, 7), (40, 41), (500, 400)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    a = np.array([1] * lost + [0] * gained + [1] * 50, dtype=bool)
    b = np.array([0] * lost + [1] * gained + [1] * 50, dtype=bool)
    n = lost + gained
    expected = reference.binomtest(min(lost, gained), n).pvalue if n else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_wilson_solves_its_equation():
    found = wilson(0.92, 500)
    for end in (found.low, found.high):
        assert abs(0.92 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 500), rel=1e-5)
    assert wilson(1.0, 10).high == 1.0
    assert wilson(0.0, 10).low == 0.0


def test_paired_drop_agrees_with_a_bootstrap_of_the_difference():
    rng = np.random.default_rng(2)
    a = rng.random(2000) < 0.92
    b = np.where(rng.random(2000) < 0.06, ~a, a)
    picks = rng.integers(0, 2000, (4000, 2000))
    low, high = np.quantile((a[picks].astype(int) - b[picks]).mean(axis=1), [0.025, 0.975])
    found = paired_drop(a, b)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.0012)


def test_nan_is_no_latency():
    with pytest.raises(ValueError, match="finite"):
        bootstrap_median([1.0, float("nan")])
