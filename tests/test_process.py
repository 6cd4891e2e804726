"""Processes, conversions and grids against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff.process.laws import VarianceExploding
from mdiff.process.times import karras_grid, lognormal_sigma

PROCESS = VarianceExploding(0.002, 80.0, 7.0)


def test_time_and_sigma_are_inverse():
    sigma = np.geomspace(1e-3, 1e3, 200).astype(np.float32)
    np.testing.assert_allclose(PROCESS.sigma(PROCESS.time(sigma)), sigma, rtol=3e-6)
    assert float(PROCESS.sigma(jnp.float32(0.0))) == 0.0
    assert float(PROCESS.sigma(jnp.float32(1.0))) == 80.0


def test_grid_is_the_one_of_edm():
    steps, rho = 18, 7.0
    i = np.arange(steps, dtype=np.float64)
    expected = (80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    sigma = np.asarray(PROCESS.sigma(karras_grid(PROCESS, steps)))
    np.testing.assert_allclose(sigma[:-1], expected, rtol=1e-5)
    assert sigma[-1] == 0.0
    assert np.all(np.diff(sigma) < 0)


def test_predictions_convert_both_ways():
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 5, 4, 4, 1)).astype(np.float32)
    t = PROCESS.time(np.array([0.01, 0.1, 1, 10, 80], np.float32))
    xt = PROCESS.corrupt(x0, eps, t)
    np.testing.assert_allclose(PROCESS.from_eps(xt, eps, t).x0, x0, atol=2e-5)
    np.testing.assert_allclose(PROCESS.from_x0(xt, x0, t).eps, eps, rtol=2e-3, atol=2e-3)


def test_score_of_a_gaussian():
    # x0 ~ N(m, s^2): the marginal at sigma is N(m, s^2 + sigma^2), its score (m - x) / (s^2 + sigma^2).
    m, s, sigma = 0.3, 0.7, 1.9
    x = jnp.linspace(-3, 3, 7).reshape(7, 1, 1, 1)
    t = jnp.full((7,), PROCESS.time(jnp.float32(sigma)))
    x0 = m + s**2 / (s**2 + sigma**2) * (x - m)
    prediction = PROCESS.from_x0(x, x0, t)
    np.testing.assert_allclose(PROCESS.score(prediction, t), (m - x) / (s**2 + sigma**2), atol=1e-5)
    back = PROCESS.from_score(x, (m - x) / (s**2 + sigma**2), t)
    np.testing.assert_allclose(back.x0, x0, atol=1e-5)


def test_no_noise_leaves_eps_finite():
    x = jnp.ones((2, 2, 2, 1))
    assert np.all(np.asarray(PROCESS.from_x0(x, x, jnp.zeros(2)).eps) == 0)


def test_lognormal_moments():
    log = np.log(np.asarray(lognormal_sigma(jax.random.key(0), 200_000, -1.2, 1.2)))
    assert log.mean() == pytest.approx(-1.2, abs=0.01)
    assert log.std() == pytest.approx(1.2, abs=0.01)
