"""The loss gap by noise level, against float64 brute force, denoisers known in closed form, scipy, and simulated coverage."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from mdiff import config
from mdiff.nets import closed_form
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.probes import gap as gaps
from mdiff.process.laws import VarianceExploding, make_process

KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
SHAPE = (4, 4, 1)
LEVELS = (0.05, 0.5, 3.0)


def images(n, seed=0, spread=0.5):
    """float32 [n,4,4,1] from a normal law with correlated pixels."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(16, 16)) / 4
    return (spread * rng.normal(size=(n, 16)) @ mix).astype(np.float32).reshape(n, *SHAPE)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _errors(fn, x0, ids, levels, process, draws):
    return gaps.errors(process, from_sigma_fn(fn, process), x0, ids, levels, draws=draws)


def errors(fn, x0, ids, levels=LEVELS, process=VarianceExploding(), draws=2):
    return np.asarray(_errors(fn, x0, np.asarray(ids, np.int32), levels, process, draws), np.float64)


def shrink(x, sigma):
    return x / (1 + sigma[:, None, None, None] ** 2)


_noise = jax.jit(gaps.fixed_noise, static_argnums=3)


def noise_of(ids, draw, seed=0):
    return np.asarray(_noise(seed, draw, np.asarray(ids, np.int32), SHAPE), np.float64)


# ------------------------------------------------------------------------------------------ the errors


@pytest.mark.parametrize("kind", KINDS)
def test_errors_by_brute_force_under_every_law(kind):
    x0, ids = images(5), [7, 3, 900, 0, 41]
    process = make_process(config.Process(kind=kind))
    found = errors(shrink, x0, ids, process=process, draws=3)
    for row, sigma in zip(found, LEVELS, strict=True):
        wrong = [(x0 + sigma * noise_of(ids, d)) / (1 + sigma**2) - x0 for d in range(3)]
        np.testing.assert_allclose(row, np.mean(np.square(wrong), axis=(0, 2, 3, 4)), rtol=2e-4)


def test_errors_over_many_draws_are_their_expectation():
    """E (c (x + s n) - x)^2 = (c - 1)^2 x^2 + c^2 s^2: the noise has mean 0 and variance 1."""
    x0, draws = images(3), 400
    found = errors(shrink, x0, range(3), (0.7,), draws=draws)[0]
    c = 1 / (1 + 0.7**2)
    expected = (c - 1) ** 2 * np.mean(x0.astype(np.float64) ** 2, axis=(1, 2, 3)) + c**2 * 0.7**2
    np.testing.assert_allclose(found, expected, rtol=4 * np.sqrt(2 / (draws * 16)))


def test_noise_belongs_to_the_image():
    x0, ids = images(6), np.array([5, 9, 2, 70, 8, 1])
    once = errors(shrink, x0, ids)
    np.testing.assert_array_equal(once, errors(shrink, x0, ids))  # the same at every call
    order = [4, 1, 0]
    np.testing.assert_allclose(once[:, order], errors(shrink, x0[order], ids[order]), rtol=1e-5)
    two, three = noise_of([5, 9], 0), noise_of([5, 9, 2], 0)
    np.testing.assert_array_equal(two, three[:2])
    others = [two[:1], two[1:], noise_of([5, 9], 1)[:1], noise_of([5, 9], 0, seed=1)[:1]]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(others) for b in others[:i])


# ------------------------------------------------------------------- denoisers that are known to memorize


def test_the_empirical_denoiser_at_both_ends_of_noise():
    train, heldout = images(20), images(20, seed=1)
    fn = closed_form.empirical(train)
    levels = (1e-3, 50.0)
    found = gaps.gap(
        errors(fn, train, range(20), levels), errors(fn, heldout, range(100, 120), levels), levels
    )
    flat, other = (x.reshape(len(x), -1).astype(np.float64) for x in (train, heldout))
    # Hardly any noise: what is not trained on becomes the nearest training image.
    assert found.heldout[0] == pytest.approx(np.mean(cdist(other, flat).min(1) ** 2 / 16), rel=1e-4)
    assert found.train[0] < 1e-12 and found.ratio[0].low > 1e8 and np.isfinite(found.ratio[0].high)
    # Nothing but noise: both become the mean of the training images.
    for side, rows in ((found.train, flat), (found.heldout, other)):
        assert side[1] == pytest.approx(np.mean((rows - flat.mean(0)) ** 2), rel=0.05)
    assert 0.5 < found.ratio[1].value < 2
    assert found.overall.value == pytest.approx(np.sqrt(found.ratio[0].value * found.ratio[1].value))


def test_a_denoiser_that_knows_the_law_alone_has_no_gap():
    fn = closed_form.gaussian(images(20000, seed=5), ridge=1e-6)
    known, new = (errors(fn, images(200, seed=s), range(1000 * s, 1000 * s + 200)) for s in (1, 2))
    found = gaps.gap(known, new, LEVELS)
    for each in (*found.ratio, found.overall):
        assert each.low < 1 < each.high and each.high / each.low < 1.6


def test_held_out_is_above_training():
    """Which way round: a Gaussian fitted on 20 images does better on these, and its gap falls with noise."""
    train, heldout = images(20), images(20, seed=1)
    fn = closed_form.gaussian(train)
    levels = (0.05, 10.0)
    found = gaps.gap(errors(fn, train, range(20), levels), errors(fn, heldout, range(50, 70), levels), levels)
    assert found.ratio[0].low > 1 and found.ratio[0].value > found.ratio[1].value
    assert found.heldout[0] > found.train[0]


# ------------------------------------------------------------------------------------------ intervals


def test_intervals_are_welchs_of_relative_errors():
    rng = np.random.default_rng(0)
    train, heldout = rng.gamma(2, size=(1, 9)), rng.gamma(1, size=(1, 30))
    found = gaps.gap(train, heldout, (1.0,), 0.9).ratio[0]
    ours, theirs = train[0] / train.mean(), heldout[0] / heldout.mean()
    ends = stats.ttest_ind(theirs, ours, equal_var=False).confidence_interval(0.9)
    assert found.value == pytest.approx(heldout.mean() / train.mean())
    assert (found.low, found.high) == pytest.approx(found.value * np.exp([ends.low, ends.high]))
    assert found.n == 9


@pytest.mark.parametrize(("n", "m", "least"), [(8, 40, 0.91), (50, 50, 0.93), (128, 128, 0.935)])
def test_intervals_cover(n, m, least):
    """The truth lies within in about 95 % of draws, at each level and over levels whose errors go together."""
    rng, levels, covered = np.random.default_rng(3), (0.1, 1.0, 10.0), []
    scale = np.array([[1.0], [4.0], [0.1]])
    for _ in range(1500):
        sides = [rng.gamma(3, size=(1, k)) * rng.gamma(20, size=(3, k)) for k in (n, m)]
        found = gaps.gap(scale * sides[0], 2 * scale * sides[1], levels)
        covered.append([each.low < 2 < each.high for each in (*found.ratio, found.overall)])
    shares = np.mean(covered, 0)
    assert (shares > least).all() and (shares < 0.97).all(), shares


def test_levels_that_say_the_same_add_nothing():
    rng = np.random.default_rng(1)
    train, heldout = rng.gamma(2, size=(1, 12)), rng.gamma(2, size=(1, 12))
    one = gaps.gap(train, heldout, (1.0,))
    five = gaps.gap(np.repeat(train, 5, 0), np.repeat(heldout, 5, 0), (1.0,) * 5)
    assert (five.overall.low, five.overall.high) == pytest.approx((one.overall.low, one.overall.high))


def test_errors_below_rounding_give_finite_ratios():
    zero, some = np.zeros((1, 3)), np.full((1, 4), 0.1)
    found = gaps.gap(zero, some, (0.1,)).ratio[0]
    assert 1e11 < found.value < np.inf and (found.low, found.high) == (found.value, found.value)
    assert gaps.gap(zero, zero[:, :2], (0.1,)).ratio[0].value == 1.0
    assert np.isnan(gaps.gap(zero + np.nan, some, (0.1,)).overall.value)  # a broken network is not hidden
