"""The consistency loss against normal laws, whose posterior means and reverse diffusions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mdiff import config
from mdiff.nets.denoiser import make_model
from mdiff.objectives import ambient, consistency
from mdiff.process import laws
from mdiff.process.times import make_times

STD, TN = 0.6, 0.5
KEY = jax.random.key(3)


def linear(gain):
    """D(x, sigma) = gain(sigma) x; the posterior mean of N(0, STD^2) has gain STD^2 / (STD^2 + sigma^2)."""
    return lambda x, sigma, key: gain(sigma).reshape(-1, 1, 1, 1) * x


exact = linear(lambda sigma: STD**2 / (STD**2 + sigma**2))


def column(value, n):
    return jnp.full(n, value, jnp.float32)


def test_the_reverse_run_ends_in_the_noisy_law():
    """From x0 + sigma n the exact denoiser's reverse diffusion draws from the law of x0 + sigma' n.

    Its steps are of first order: 64 of them end with a spread 1.4 % too small, 256 with 0.4 %.
    """
    n, sigma, target = 20_000, 2.0, 0.3
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.hypot(STD, sigma) * rng.normal(size=(n, 1, 1, 1)), jnp.float32)
    found = np.asarray(
        jax.jit(lambda x: consistency.reverse(exact, x, column(sigma, n), column(target, n), 256, KEY))(x)
    ).ravel()
    assert found.std() == pytest.approx(np.hypot(STD, target), rel=0.02)
    assert stats.kstest(found[:2000] / found.std(), "norm").pvalue > 1e-3
    # It remembers where it began: covariance of x at sigma with x at sigma' is STD^2 + sigma'^2.
    covariance = np.cov(found, np.asarray(x).ravel())[0, 1]
    assert covariance == pytest.approx(STD**2 + target**2, rel=0.05)
    same = consistency.reverse(exact, x[:5], column(1.0, 5), jnp.array([1.0, 1.2, 2.0, 9.0, 1.0]), 4, KEY)
    np.testing.assert_array_equal(same, x[:5])  # there is nothing to run


def test_levels_follow_their_laws():
    cfg, span = config.Loss(p_mean=-0.3, p_std=0.8), config.Process()
    times = make_times(cfg, laws.make_process(span), span)
    sigma, target = (np.asarray(x, np.float64) for x in consistency.levels(KEY, times, 20_000))
    assert (target < sigma).all()
    u = stats.norm.cdf((np.log(sigma) + 0.3) / 0.8)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(stats.norm.cdf((np.log(target) + 0.3) / 0.8) / u, "uniform").pvalue > 1e-3


def errors_of(denoise, sigma, target, n=20_000, steps=24, cutoff=TN):
    """Two-sample errors for noisy copies of n draws from N(0, STD^2)."""
    rng = np.random.default_rng(1)
    y = jnp.asarray(np.hypot(STD, cutoff) * rng.normal(size=(n, 1, 1, 1)), jnp.float32)
    args = (y, column(cutoff, n), column(sigma, n), column(target, n), steps, KEY)
    return np.asarray(jax.jit(lambda: consistency.consistency_error(denoise, denoise, *args))(), np.float64)


@pytest.mark.parametrize(("sigma", "target"), [(0.4, 0.1), (0.5, 0.05), (1.5, 0.2)])
def test_the_posterior_mean_is_consistent(sigma, target):
    found = errors_of(exact, sigma, target)
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found)) + 4e-4  # what 24 steps leave over
    assert found.min() < 0  # a product of two draws, not a square


def test_the_error_of_a_wrong_denoiser_is_the_squared_mean_difference():
    """D(x, s) = c x at all levels: E[D(x', s') | x] = c r x, with r from the linear reverse SDE, so the error is known."""
    c, sigma, target, steps = 0.3, 0.4, 0.1, 5
    ratio = (target / sigma) ** (1 / steps)
    mean = (c + ratio**2 * (1 - c)) ** steps  # what is left of x in the mean of x'
    found = errors_of(linear(lambda s: jnp.full_like(s, c)), sigma, target, steps=steps)
    # x at sigma comes from y by such a run too: its variance by the same recursion.
    first = (sigma / TN) ** (1 / steps)
    variance, level = STD**2 + TN**2, TN
    for _ in range(steps):
        below = level * first
        variance = (c + first**2 * (1 - c)) ** 2 * variance + below**2 * (1 - first**2)
        level = below
    expected = (c * (mean - 1)) ** 2 * variance
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / np.sqrt(len(found)))
    assert expected > 10 * found.std() / np.sqrt(len(found))  # told apart from 0


def test_it_teaches_the_levels_below_the_cutoff():
    """The gain at a level below the cutoff that minimises the error, with the right one above, is the posterior's."""
    n, sigma = 20_000, 0.6  # starts above the cutoff, where D is known
    y = jnp.asarray(np.hypot(STD, TN) * np.random.default_rng(2).normal(size=(n, 1, 1, 1)), jnp.float32)

    def mean_error(gain, target):
        def denoise(x, s, key):
            return linear(lambda s: jnp.where(s < TN * 0.999, gain, STD**2 / (STD**2 + s**2)))(x, s, key)

        args = (y, column(TN, n), column(sigma, n), column(target, n), 1, KEY)
        return consistency.consistency_error(denoise, exact, *args).mean()

    for target in (0.45, 0.3):
        # One ancestral step is exact only in the limit; its own x' law decides what gain fits best.
        ratio2 = (target / sigma) ** 2
        known = STD**2 / (STD**2 + sigma**2)
        left = known + ratio2 * (1 - known)
        slope, curve = (
            jax.jit(f, static_argnums=1) for f in (jax.grad(mean_error), jax.grad(jax.grad(mean_error)))
        )
        best = -slope(0.0, target) / curve(0.0, target)
        assert float(best) == pytest.approx(known / left, rel=0.02)
        # ... which, as for the exact reverse process, is the posterior's own gain.
        assert known / left == pytest.approx(STD**2 / (STD**2 + target**2), rel=0.25)


def test_no_clean_pixel_and_no_path_is_differentiated():
    cfg = config.Config(
        data=config.Data(size=4),
        net=config.Net(channels=8, mults=(1,), blocks=1, attention=()),
        loss=config.Loss(cutoff=0.5, clean="never", consistency=2.0, consistency_steps=2),
    )
    model = make_model(cfg, 1)
    params = jax.jit(model.init)(jax.random.key(0))
    # The last layer begins at 0; moved, so that D depends on everything.
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(KEY, leaf.shape), params)
    x = jax.random.normal(KEY, (6, 4, 4, 1))
    batch = {"x": jnp.full_like(x, jnp.nan), "y": x, "cutoff": jnp.array([0.5] * 6), "id": jnp.arange(6)}
    objective = ambient.make(model, cfg)

    @jax.jit
    def found(params):
        (total, aux), grads = jax.value_and_grad(
            lambda p: (lambda out: (out[0].mean(), (out[0], out[1])))(objective(p, KEY, batch)), has_aux=True
        )(params)
        return total, aux, grads

    total, (loss, aux), grads = found(params)
    assert np.isfinite(total)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert loss.shape == aux["consistency"].shape == (6,)
    assert (np.asarray(aux["above"])).all()
    without = ambient.make(
        model, config.Config(data=cfg.data, net=cfg.net, loss=config.Loss(cutoff=0.5, clean="never"))
    )
    alone = jax.jit(lambda p: without(p, KEY, batch)[0])(params)
    np.testing.assert_allclose(loss, alone + 2.0 * aux["consistency"], rtol=2e-5)
