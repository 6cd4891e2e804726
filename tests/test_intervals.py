"""Intervals against scipy, published tables and their own promise: coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from mdiff.probes import intervals


def table(both, first, second, neither):
    """Paired verdicts with these counts."""
    a = np.repeat([True, True, False, False], [both, first, second, neither])
    b = np.repeat([True, False, True, False], [both, first, second, neither])
    return a, b


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 256), (256, 256), (3, 10), (77, 256), (1, 5000)])
def test_wilson_is_scipys(hits, n, confidence):
    ours = intervals.wilson(hits, n, confidence)
    theirs = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert (ours.value, ours.n) == (hits / n, n)
    assert ours.low < ours.high


def test_wilson_of_nothing_knows_nothing():
    empty = intervals.wilson(0, 0)
    assert math.isnan(empty.value)
    assert (empty.low, empty.high, empty.n) == (0.0, 1.0, 0)
    with pytest.raises(ValueError, match="hits"):
        intervals.wilson(3, 2)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Altman et al., Statistics with Confidence (2000), table 6.2
        ((14, 5, 0, 22), 0.011, 0.226),
        # Fagerland, Lydersen & Laake, Statistics in Medicine 33:2850 (2014): Bentur et al.
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_newcombe_gives_the_published_intervals(counts, low, high):
    found = intervals.newcombe(*table(*counts))
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)
    assert found.value == pytest.approx((counts[1] - counts[2]) / sum(counts))


def test_newcombe_changes_sign_with_the_order():
    a, b = table(14, 5, 1, 22)
    there, back = intervals.newcombe(a, b), intervals.newcombe(b, a)
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))


def test_newcombe_of_two_zeros_has_wilsons_width():
    none = np.zeros(256, bool)
    found = intervals.newcombe(none, none)
    high = stats.binomtest(0, 256).proportion_ci(method="wilson").high
    assert (found.value, found.low, found.high) == pytest.approx((0, -high, high))


@pytest.mark.parametrize("cells", [(0.0, 0.02, 0.01, 0.97), (0.3, 0.3, 0.05, 0.35), (0.6, 0.1, 0.1, 0.2)])
def test_newcombe_covers(cells):
    rng = np.random.default_rng(0)
    truth, n = cells[1] - cells[2], 100
    covered = []
    for counts in rng.multinomial(n, cells, size=1500):
        found = intervals.newcombe(*table(*counts))
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) >= 0.935


def test_invisible_below():
    rate = intervals.invisible_below(256)
    assert rate == pytest.approx(0.0116, abs=1e-4)
    assert 1 - (1 - rate) ** 256 == pytest.approx(0.95)
    assert intervals.invisible_below(0) == 1.0


def test_weights_count_draws_and_do_not_depend_on_the_other_sample():
    seen = []

    def keep(a, b):
        seen.append((a, b))
        return a[:, 0]

    first = intervals.resample(keep, 7, 5, n_resamples=40, seed=3)
    second = intervals.resample(keep, 7, 900, n_resamples=40, seed=3)
    other = intervals.resample(keep, 7, 5, n_resamples=40, seed=4)
    a, b = seen[0]
    assert a.shape == (40, 7)
    assert (a.sum(1) == 7).all()
    assert (b.sum(1) == 5).all()
    assert not np.array_equal(a[:, :5], b)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_large_samples_are_resampled_in_parts(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = intervals.resample(intervals.mean(values), 50, n_resamples=30, seed=1)
    monkeypatch.setattr(intervals, "_ELEMENTS", 350)  # seven resamples at once
    np.testing.assert_allclose(intervals.resample(intervals.mean(values), 50, n_resamples=30, seed=1), whole)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = intervals.bootstrap(intervals.mean(values), 400, n_resamples=4000, confidence=0.9, seed=0)
    half = 1.645 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert found.n == 400


def test_one_row_has_no_interval():
    found = intervals.bootstrap(intervals.mean(np.array([2.0])), 1, n_resamples=10)
    assert found.value == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
