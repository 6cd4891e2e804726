"""Fréchet distance against scipy's matrix root and normal laws whose distance is known."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from mdiff.probes import frechet, intervals


def spd(rng, size):
    mix = rng.normal(size=(size, size))
    return mix @ mix.T + 0.1 * np.eye(size)


@pytest.mark.parametrize("size", [1, 5, 20])
def test_normal_distance_is_that_of_scipys_root(size):
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.normal(size=size), rng.normal(size=size), spd(rng, size), spd(rng, size)
    truth = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2)))
    assert frechet.normal_distance(m1, s1, m2, s2) == pytest.approx(truth, rel=1e-8)
    assert frechet.normal_distance(m2, s2, m1, s1) == pytest.approx(truth, rel=1e-8)


def test_commuting_covariances_in_closed_form():
    # sum (s1 - s2)^2 of standard deviations, plus the means
    a, b, shift = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 0.0]), np.array([0.0, 1.0, 2.0])
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    s1, s2 = turn @ np.diag(a**2) @ turn.T, turn @ np.diag(b**2) @ turn.T
    truth = np.sum((a - b) ** 2) + 5
    assert frechet.normal_distance(turn @ shift, s1, np.zeros(3), s2) == pytest.approx(truth, rel=1e-10)


def test_rows_by_hand_and_equal_sets():
    # means 1 and 5, variances 2 and 8 (n - 1 = 1): 16 + (sqrt 2 - sqrt 8)^2 = 18
    assert frechet.frechet_distance([[0.0], [2.0]], [[3.0], [7.0]]) == pytest.approx(18)
    rows = np.random.default_rng(2).normal(size=(30, 50))  # fewer rows than features
    assert frechet.frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet.frechet_distance(rows, rows + 2) == pytest.approx(200, rel=1e-9)
    assert frechet.frechet_distance(np.ones((5, 3)), np.ones((7, 3))) == 0


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_bias_is_removed_and_the_interval_covers(shift):
    rng = np.random.default_rng(3)
    scale = np.linspace(0.5, 2, 8)
    means = np.zeros(8)
    means[0] = shift
    other = scale if shift == 0 else np.ones(8)
    truth = frechet.normal_distance(np.zeros(8), np.diag(scale**2), means, np.diag(other**2))
    found = [
        frechet.frechet(rng.normal(size=(60, 8)) * scale, rng.normal(size=(60, 8)) * other + means, seed=s)
        for s in range(60)
    ]
    plain = np.array([f.plain.value for f in found])
    fixed = np.array([f.corrected.value for f in found])
    assert plain.mean() > truth + 0.6  # what comparing at equal n is for
    assert fixed.mean() == pytest.approx(truth, abs=3 * fixed.std() / np.sqrt(60))
    assert np.mean([f.corrected.low <= truth <= f.corrected.high for f in found]) >= 0.88
    assert found[0].plain.n == 60


def test_jackknife_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(4).normal(2.0, 3.0, size=(200, 1))
    found = intervals.jackknife(lambda x: float(x.mean()), values, groups=200)
    half = 1.972 * values.std(ddof=1) / np.sqrt(200)  # Student's t with 199 degrees
    assert found.plain.value == pytest.approx(values.mean())
    assert found.corrected.value == pytest.approx(values.mean())
    assert found.plain.high - found.plain.value == pytest.approx(half, rel=1e-3)


def test_jackknife_takes_the_bias_of_a_variance_away():
    values = np.random.default_rng(5).normal(size=(40, 1))
    found = intervals.jackknife(lambda x: float(x.var()), values, groups=40)
    assert found.plain.value == pytest.approx(values.var())
    assert found.corrected.value == pytest.approx(values.var(ddof=1))


def test_jackknife_of_two_samples_adds_their_variances():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(100, 1)), rng.normal(0, 4, size=(50, 1))
    found = intervals.jackknife(lambda x, y: float(y.mean() - x.mean()), a, b, groups=50)
    half = 2.01 * np.sqrt(a.var(ddof=1) / 100 + b.var(ddof=1) / 50)
    assert found.plain.value == pytest.approx(b.mean() - a.mean())
    assert found.plain.high - found.plain.value == pytest.approx(half, rel=0.1)
