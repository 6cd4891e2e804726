"""Delta M and its relatives, against laws whose divergences are known: Gaussians, mixtures, perfect memorizers."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evidence_helper import drawn, tiny_model
from scipy import integrate, stats

from mdiff.errors import UserError
from mdiff.nets import closed_form
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.probes import divergence, gap
from mdiff.process.laws import VarianceExploding
from mdiff.recipes import evidence

PROCESS = VarianceExploding()
LEVELS = divergence.make_levels(0.01, 80, 48)


def of_mixture(shares, means, spreads):
    """The denoiser of a mixture of normal laws on the line, as `(x [B,1,1,1], sigma [B]) -> x0`."""
    shares, means, spreads = (np.asarray(v, np.float32) for v in (shares, means, spreads))

    def denoise(x, sigma):
        variance = spreads**2 + sigma[:, None] ** 2
        away = x.reshape(-1, 1) - means
        weight = jax.nn.softmax(jnp.log(shares) - 0.5 * away**2 / variance - 0.5 * jnp.log(variance))
        return jnp.sum(weight * (means + spreads**2 / variance * away), axis=1).reshape(x.shape)

    return denoise


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _errors(fn, x0, ids, levels, draws, seed):
    return gap.errors(PROCESS, from_sigma_fn(fn, PROCESS), x0, ids, levels, draws=draws, seed=seed)


def errors(fn, x0, levels=LEVELS, draws=1, seed=0, first=0):
    """[L,N] squared errors, summed over pixels."""
    x0 = np.asarray(x0, np.float32)
    x0 = x0.reshape(-1, 1, 1, 1) if x0.ndim == 1 else x0
    found = _errors(fn, x0, np.arange(first, first + len(x0), dtype=np.int32), levels, draws, seed)
    return np.asarray(found, np.float64) * x0[0].size


# ------------------------------------------------------------------------------------- Delta M

PART, WHOLE = ((1.0,), (-1.0,), (0.5,)), ((0.4, 0.6), (-1.0, 1.5), (0.5, 0.7))


def kl_by_quadrature():
    """KL(p_i || p) of one part of the mixture from the whole, by scipy."""
    ours = stats.norm(-1.0, 0.5)

    def log_whole(x):
        return np.log(0.4 * ours.pdf(x) + 0.6 * stats.norm(1.5, 0.7).pdf(x))

    return integrate.quad(lambda x: ours.pdf(x) * (ours.logpdf(x) - log_whole(x)), -6, 4)[0]


def test_delta_m_of_a_part_is_minus_its_divergence():
    truth = kl_by_quadrature()
    x0 = np.random.default_rng(0).normal(-1.0, 0.5, 4000)
    found = divergence.delta_m(errors(of_mixture(*PART), x0), errors(of_mixture(*WHOLE), x0), LEVELS).train
    assert found.value < 0 and found.low - 0.02 < -truth < found.high + 0.02
    assert found.value == pytest.approx(-truth, abs=0.05)
    assert truth <= np.log(1 / 0.4) and found.value >= -np.log(1 / 0.4)  # p >= pi_i p_i


def test_the_bound_is_reached_by_parts_far_apart():
    far = ((0.4, 0.6), (-1.0, 9.0), (0.5, 0.5))
    x0 = np.random.default_rng(1).normal(-1.0, 0.5, 3000)
    found = divergence.delta_m(errors(of_mixture(*PART), x0), errors(of_mixture(*far), x0), LEVELS).train
    assert found.value == pytest.approx(-np.log(1 / 0.4), abs=0.06)


def test_delta_m_is_minus_the_log_density_ratio_of_each_image():
    """Per image: log p2(x) - log p1(x), both normal, noise averaged over many draws."""
    x0 = np.array([-1.5, -0.3, 0.4, 2.0])
    first, second = ((1.0,), (0.0,), (0.5,)), ((1.0,), (0.5,), (1.0,))
    rows = [errors(of_mixture(*law), x0, draws=800) for law in (first, second)]
    found = divergence.delta_m(*rows, LEVELS).images
    wide = np.hypot(1.0, 0.01), np.hypot(0.5, 0.01)
    expected = stats.norm(0.5, wide[0]).logpdf(x0) - stats.norm(0.0, wide[1]).logpdf(x0)
    np.testing.assert_allclose(found, expected, atol=0.15)


def test_common_noise_makes_the_difference_sharp():
    x0 = np.random.default_rng(0).normal(-1.0, 0.5, 400)
    ours = errors(of_mixture(*PART), x0)
    same = divergence.delta_m(ours, errors(of_mixture(*WHOLE), x0), LEVELS).train
    other = divergence.delta_m(ours, errors(of_mixture(*WHOLE), x0, seed=7), LEVELS).train
    assert other.high - other.low > 3 * (same.high - same.low)


def test_what_is_better_everywhere_is_not_memorization():
    """A better law is better on held-out points too; a memorizer is better on its own alone."""
    rng = np.random.default_rng(2)
    train, heldout = rng.normal(0, 0.5, (2, 300))
    broad = of_mixture((1.0,), (1.0,), (1.0,))

    def of(fn):
        rows = [(errors(f, train), errors(f, heldout, first=1000)) for f in (fn, broad)]
        return divergence.delta_m(rows[0][0], rows[1][0], LEVELS, heldout=(rows[0][1], rows[1][1]))

    law = of(of_mixture((1.0,), (0.0,), (0.5,)))
    assert law.train.high < 0 and law.heldout.high < 0 and law.excess.low < 0 < law.excess.high
    few = train[:20]
    memory = closed_form.empirical(few.reshape(-1, 1, 1, 1).astype(np.float32))
    rows = [(errors(f, few), errors(f, heldout, first=1000)) for f in (memory, broad)]
    found = divergence.delta_m(rows[0][0], rows[1][0], LEVELS, heldout=(rows[0][1], rows[1][1]))
    assert found.train.high < 0 and found.excess.high < 0 < found.heldout.low
    np.testing.assert_allclose(sum(found.by_level), found.train.value)


def test_the_weights_integrate():
    levels = divergence.make_levels(0.1, 10, 200)
    sigma = np.array(levels)
    # int sigma^2 (1 + sigma) / sigma^3 = ln(100) + 9.9
    assert divergence.weights(levels) @ (sigma**2 * (1 + sigma)) == pytest.approx(np.log(100) + 9.9, rel=1e-3)


def test_m_point_diverges_for_a_perfect_memorizer_and_delta_m_does_not():
    """On five points, p = q_e: M_point as its closed form with no overlap, and e^-2; Delta M is ln 5 at every e."""
    points = np.array([-2.0, -0.9, 0.1, 1.2, 2.3])
    squares = np.mean(np.square(points[:, None] - points), axis=0)
    rng, old, new = np.random.default_rng(3), [], []
    for width in (0.1, 0.03, 0.01, 0.003):
        samples = rng.choice(points, 4000) + width * rng.normal(size=4000)
        log_p = np.log(np.mean([stats.norm(x, width).pdf(samples) for x in points], axis=0))
        old.append(divergence.m_point(points[:, None], samples[:, None], log_p, width))
        expected = np.sum(squares / (2 * width**2) - np.log(5))
        assert old[-1] == pytest.approx(expected, rel=0.05)
        levels = divergence.make_levels(width, 80, 60)
        x0 = np.full(200, points[1], np.float32)
        one, all_ = (
            closed_form.empirical(p.reshape(-1, 1, 1, 1).astype(np.float32)) for p in (points[1:2], points)
        )
        rows = [errors(fn, x0, levels, draws=4) for fn in (one, all_)]
        new.append(divergence.delta_m(*rows, levels).train.value)
    np.testing.assert_allclose(np.diff(np.log(old)) / np.log([0.3, 1 / 3, 0.3]), -2, atol=0.1)
    np.testing.assert_allclose(new, -np.log(5), atol=0.15)


def test_conditioning_may_raise_the_norm_of_the_covariance():
    rows, labels = np.array([[-1.0], [0.0], [0.0], [1.0]]), np.array([1, 0, 0, 1])
    whole, each = divergence.covariance_norms(rows, labels)
    np.testing.assert_allclose([whole, *each], [0.5, 0, 1])
    random = np.random.default_rng(0).normal(size=(40, 5)) * [3, 1, 1, 1, 1]
    labels = np.random.default_rng(1).integers(0, 3, 40)
    whole, each = divergence.covariance_norms(random, labels)
    assert whole == pytest.approx(np.linalg.eigvalsh(np.cov(random.T, bias=True))[-1])
    sizes = np.bincount(labels) / 40
    mean = sum(s * np.cov(random[labels == k].T, bias=True) for k, s in enumerate(sizes))
    assert np.linalg.eigvalsh(mean)[-1] <= whole  # on average it does shrink
    found = divergence.conditioning_spreads(random, parts=3, trials=300)
    assert found.low > 0.5 and found.n == 300


# ---------------------------------------------------------------------- the empirical optimum


def test_errors_of_a_network_split_at_the_optimum():
    """Pythagoras: E||D - x0||^2 = E||D* - x0||^2 + E||D - D*||^2, over images and noise; both from a network."""
    model = tiny_model()
    params = drawn(model)
    images = evidence.images_of(np.random.default_rng(1).integers(0, 256, (12, 4, 4, 1), np.uint8))
    levels, draws = (0.2, 1.0, 5.0), 200
    apart, scale = evidence.optimum_errors(model, params, images, levels, draws=draws)
    whole = evidence.elbo_errors(model, params, images, levels, draws=draws)
    x0 = images.x.astype(np.float32) / 127.5 - 1
    best = errors(closed_form.empirical(x0), x0, levels, draws=draws)
    np.testing.assert_allclose(whole.mean(1), best.mean(1) + apart.mean(1), rtol=0.04)
    spread = np.sum(np.var(x0, axis=0))
    assert scale[0].mean() == pytest.approx(spread, rel=1e-3)  # at low noise D* is the image itself
    found = divergence.optimum(apart, scale, levels)
    assert found.distance.value == pytest.approx(np.mean(divergence.weights(levels) @ apart))
    assert found.by_level[0].value == pytest.approx(apart[0].mean() / scale[0].mean())


def test_the_distance_of_a_law_from_its_points():
    """KL(q_e || p) of points smoothed by e from a normal law, by quadrature in float64; and 0 for the memorizer."""
    points, width = np.array([-1.0, -0.2, 0.7]), 0.2
    levels = divergence.make_levels(width, 80, 60)
    smooth, spread = [stats.norm(x, width) for x in points], np.hypot(0.8, width)

    def integrand(x):
        q = np.mean([s.pdf(x) for s in smooth])
        return q * (np.log(q) - stats.norm(0.3, spread).logpdf(x))

    truth = integrate.quad(integrand, -3, 3, limit=200)[0]
    x0 = np.repeat(points, 1500).astype(np.float32).reshape(-1, 1, 1, 1)
    best, law = closed_form.empirical(points.reshape(-1, 1, 1, 1)), of_mixture((1.0,), (0.3,), (0.8,))

    @jax.jit
    def apart(ids):
        def one(sigma):
            at = jnp.full(len(x0), sigma)
            u = x0 + sigma * gap.fixed_noise(0, 0, ids, (1, 1, 1))
            return jnp.sum((law(u, at) - best(u, at)) ** 2, axis=(1, 2, 3))

        return jax.lax.map(one, jnp.asarray(levels, jnp.float32))

    rows = np.asarray(apart(np.arange(len(x0))))
    found = divergence.optimum(rows, np.ones_like(rows), levels)
    assert found.distance.value == pytest.approx(truth, rel=0.05)
    assert divergence.optimum(0 * rows, np.ones_like(rows), levels).distance.value == 0


def test_bad_input_is_one_line():
    ones = np.ones((2, 3))
    for call, words in (
        (lambda: divergence.delta_m(ones, ones, (0.1, 1.0, 2.0)), "for 3 levels"),
        (lambda: divergence.delta_m(ones, ones[:, :2], (0.1, 1.0)), "the same images"),
        (lambda: divergence.delta_m(ones * np.nan, ones, (0.1, 1.0)), "not finite"),
        (lambda: divergence.delta_m(ones, ones, (1.0, 0.1)), "that rise"),
        (lambda: divergence.make_levels(0.0, 1.0), "0 < lowest"),
        (lambda: divergence.make_levels(0.1, 1.0, 1), "2 or more"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_conditions_reach_the_network():
    model = tiny_model(classes=2)
    params = drawn(model)
    images = evidence.images_of(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1], np.int32))
    swapped = replace(images, label=images.label[::-1].copy())
    ours, theirs = (evidence.elbo_errors(model, params, i, (0.5, 1.0)) for i in (images, swapped))
    assert np.abs(ours - theirs).min() > 1e-4
