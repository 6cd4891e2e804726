"""Samplers and audit on denoisers known exactly: what is memorized is known before it is measured.

One pass over everything an untrained model needs: closed-form denoiser, 18 Heun steps, audit with control.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config
from mdiff.data import source
from mdiff.data.split import split
from mdiff.errors import UserError
from mdiff.nets import closed_form
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.probes.intervals import wilson
from mdiff.process.laws import VarianceExploding
from mdiff.recipes.experiment import audit_denoiser
from mdiff.types import to_float

RULES = config.Audit(bootstrap=20)  # the bootstrap is of the quality distances, not looked at here
DRAWS = config.Sample(n=256, batch=256)


@pytest.fixture(scope="module")
def faces():
    cfg = config.Data(source="faces", size=16, n=50, heldout=50)
    subset = split(cfg, source.load(cfg.source, cfg.size))
    return subset.train.x, subset.heldout.x


def audit(denoise, faces, **fields):
    return audit_denoiser(denoise, *faces, sample_as=replace(DRAWS, **fields), rules=RULES)


# ------------------------------------------------------------------------- denoisers and audit


def test_empirical_denoiser_memorizes_everything(faces):
    found = audit(closed_form.empirical(to_float(faces[0])), faces).estimates
    assert found["memorized"].value >= 0.99
    assert found["control"].high <= 0.05
    assert found["unique"].value > 0.9  # all 50 are drawn, not one of them


def test_gaussian_denoiser_memorizes_nothing(faces):
    found = audit(closed_form.gaussian(to_float(faces[0])), faces).estimates
    assert found["memorized"].value <= 0.01
    assert found["control"].value <= 0.01


def test_mixture_memorizes_its_share(faces):
    rates = []
    for share in (0.25, 0.75):
        found = audit(closed_form.mixture(to_float(faces[0]), share), faces).estimates
        wide = wilson(round(found["memorized"].value * 256), 256, 0.999)
        assert wide.low <= share <= wide.high, (share, found["memorized"])
        assert found["control"].value <= 0.05
        rates.append(found["memorized"].value)
    assert rates[0] < rates[1]


def test_planted_duplicates_are_found_at_their_rate(faces):
    """An image with k copies among N points is a generation with probability k / N."""
    train, heldout = faces
    copies = np.ones(50, int)
    copies[[7, 31]] = 11, 21
    points = np.repeat(to_float(train), copies, axis=0)
    result = audit_denoiser(closed_form.empirical(points), train, heldout, sample_as=DRAWS, rules=RULES)
    for image, k in ((7, 11), (31, 21)):
        interval = wilson(int(result.hits[image]), 256, 0.99)
        assert interval.low <= k / 80 <= interval.high, (image, interval)
        assert interval.low > 1 / 50  # seen to be more often than an image's even share
    rest = wilson(int(np.delete(result.hits, [7, 31]).sum()), 256, 0.99)
    assert rest.low <= 48 / 80 <= rest.high


def test_stochastic_samplers_see_the_same_truth(faces):
    copy, smooth = closed_form.empirical(to_float(faces[0])), closed_form.gaussian(to_float(faces[0]))
    noisy = {"method": "ddim", "eta": 1.0, "steps": 40, "n": 64, "batch": 64}
    assert audit(copy, faces, **noisy).estimates["memorized"].value >= 0.98
    assert audit(smooth, faces, **noisy).estimates["memorized"].value <= 0.02


def test_your_own_function(faces):
    """A plain function of (xt, sigma): here, one that always answers training image 3, slightly off."""
    train, heldout = faces
    target = jnp.asarray(to_float(train[3]))

    def denoise(xt, sigma):
        return 0.98 * jnp.broadcast_to(target, xt.shape)

    result = audit_denoiser(denoise, train, heldout, sample_as=config.Sample(n=16, batch=8), rules=RULES)
    assert result.estimates["memorized"].n == 16
    assert result.estimates["memorized"].value == 1.0
    assert np.all(result.rows["nearest_index"] == 3)
    assert result.estimates["control"].value == 0.0


# ------------------------------------------------------------------ the denoisers themselves (T5)


@pytest.fixture(scope="module")
def points():
    return np.float32(np.random.default_rng(0).uniform(-1, 1, size=(9, 3, 2, 1)))


def at(fn, x, sigma):
    return np.asarray(fn(jnp.float32(x), jnp.full(len(x), sigma, jnp.float32)))


def log_marginals(points, share, ridge):
    """float64 x [D], sigma -> log density of x under share * copies + (1 - share) * Gaussian."""
    flat = np.float64(points).reshape(len(points), -1)
    size = flat.shape[1]
    mean, covariance = flat.mean(0), np.cov(flat.T) + ridge * np.eye(size)

    def log_density(x, sigma):
        copies = -((x - flat) ** 2).sum(1) / (2 * sigma**2)
        log_copy = np.log(np.mean(np.exp(copies))) - size / 2 * np.log(2 * np.pi * sigma**2)
        total = covariance + sigma**2 * np.eye(size)
        log_smooth = -0.5 * (
            (x - mean) @ np.linalg.solve(total, x - mean)
            + np.linalg.slogdet(total)[1]
            + size * np.log(2 * np.pi)
        )
        return np.log(share * np.exp(log_copy) + (1 - share) * np.exp(log_smooth))

    return log_density


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.8, 3.0])
def test_score_is_the_slope_of_the_log_density(points, share, sigma):
    process, ridge, step = VarianceExploding(), 0.01, 1e-5
    rng = np.random.default_rng(1)
    x = np.float64(np.float32(points[:4] + sigma * rng.normal(size=(4, 3, 2, 1))))
    fn = {0.0: closed_form.gaussian(points, ridge), 1.0: closed_form.empirical(points)}.get(
        share, closed_form.mixture(points, share, ridge)
    )
    density = log_marginals(points, share, ridge)
    slopes = np.empty((4, 6))
    for i, row in enumerate(x.reshape(4, 6)):
        for j, move in enumerate(step * np.eye(6)):
            slopes[i, j] = (density(row + move, sigma) - density(row - move, sigma)) / (2 * step)
    t = jnp.full(4, process.time(jnp.float32(sigma)))
    score = process.score(from_sigma_fn(fn, process)(jnp.float32(x), t, None), t)
    np.testing.assert_allclose(np.asarray(score).reshape(4, 6), slopes, rtol=2e-3, atol=2e-4 / sigma**2)


def test_limits_of_the_empirical_denoiser(points):
    fn = closed_form.empirical(points)
    x = np.random.default_rng(2).uniform(-1.5, 1.5, size=(20, 3, 2, 1))
    nearest = ((x[:, None] - points[None]) ** 2).sum((2, 3, 4)).argmin(1)
    np.testing.assert_allclose(at(fn, x, 1e-3), points[nearest], atol=1e-6)
    np.testing.assert_allclose(at(fn, x, 1e3), np.broadcast_to(points.mean(0), x.shape), atol=1e-4)


def test_limits_of_the_gaussian_denoiser(points):
    fn = closed_form.gaussian(points)
    x = np.random.default_rng(2).uniform(-1.5, 1.5, size=(5, 3, 2, 1))
    np.testing.assert_allclose(at(fn, x, 1e-4), x, atol=1e-4)
    np.testing.assert_allclose(at(fn, x, 1e3), np.broadcast_to(points.mean(0), x.shape), atol=1e-4)


def test_mixture_at_its_ends(points):
    x = np.random.default_rng(2).uniform(-1.5, 1.5, size=(5, 3, 2, 1))
    for share, end in ((0.0, closed_form.gaussian(points)), (1.0, closed_form.empirical(points))):
        np.testing.assert_array_equal(at(closed_form.mixture(points, share), x, 0.5), at(end, x, 0.5))
    with pytest.raises(UserError, match=r"share = 1\.2"):
        closed_form.mixture(points, 1.2)


def test_matrix_products_ask_for_full_precision(points):
    """Accelerators round float32 factors to bfloat16 or TF32 unless asked not to."""
    for fn in (closed_form.empirical(points), closed_form.mixture(points, 0.5)):
        program = str(jax.make_jaxpr(fn)(jnp.float32(points), jnp.ones(9)))
        assert program.count("dot_general[") == program.count(
            "precision=(Precision.HIGHEST, Precision.HIGHEST)"
        )
        assert "dot_general[" in program
