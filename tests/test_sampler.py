"""Samplers against the exact probability flow, exact variances and a count of their evaluations.

The target is a Gaussian N(mu, S): its denoiser is linear, so along each eigenvector of S a sampler is a
linear recursion whose result is known in closed form (the flow) or by a float64 recursion (the noise).
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key, keys
from mdiff.nets.denoiser import from_sigma_fn, make_model
from mdiff.process.laws import VarianceExploding
from mdiff.process.times import karras_grid
from mdiff.recipes.experiment import make_generator
from mdiff.sample import sampler

MEAN = np.array([0.3, -0.2])
ANGLE = 0.6
AXES = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])  # columns
STDS = np.array([0.8, 0.25])
SHAPE = (1, 2, 1)


def gaussian_target(x, sigma):
    """E[x0 | x] for N(MEAN, AXES STDS^2 AXES^T)."""
    shrink = jnp.float32(STDS) ** 2 / (jnp.float32(STDS) ** 2 + sigma[:, None] ** 2)
    along = (x.reshape(-1, 2) - jnp.float32(MEAN)) @ jnp.float32(AXES)
    return (jnp.float32(MEAN) + (along * shrink) @ jnp.float32(AXES).T).reshape(x.shape)


def draw(method, process, n, steps, **fields):
    """float64 [n,2] generations and the starting noise they came from."""
    cfg = config.Sample(method=method, steps=steps, **fields)
    step = sampler.METHODS[method](process, cfg)
    grid, sample_keys = karras_grid(process, steps), keys(0, "sample", jnp.arange(n))

    @jax.jit
    def run(sample_keys):
        denoiser = from_sigma_fn(gaussian_target, process)
        return sampler.integrate(process, denoiser, step, grid, sample_keys, SHAPE)

    begin = sampler.start(process, sample_keys, SHAPE)
    return (np.asarray(v, np.float64).reshape(n, 2) for v in (run(sample_keys), begin))


def levels(process, steps):
    """The Karras grid in sigma, float64, by its formula."""
    i = np.arange(steps) / (steps - 1)
    low, high = process.sigma_min ** (1 / process.rho), process.sigma_max ** (1 / process.rho)
    return np.append((high + i * (low - high)) ** process.rho, 0.0)


# ------------------------------------------------------------------------------ deterministic


@pytest.mark.parametrize(("method", "order"), [("heun", 2.0), ("ddim", 1.0)])
def test_error_falls_at_the_methods_order(method, order):
    # A low end of 1e-3 puts the last Euler step's own error, sigma_min^2 / 2 s^2, at 1e-5.
    process = VarianceExploding(1e-3, 20.0, 7.0)
    steps = np.array([16, 32, 64])
    errors = []
    for n in steps:
        end, begin = draw(method, process, 64, int(n))
        # dx/dsigma = sigma (x - mu) / (s^2 + sigma^2) along each axis: solved exactly.
        shrink = STDS / np.sqrt(STDS**2 + process.sigma_max**2)
        exact = MEAN + ((begin - MEAN) @ AXES * shrink) @ AXES.T
        errors.append(np.sqrt(np.mean((end - exact) ** 2)))
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert np.all(np.abs(slopes - order) < 0.3), (errors, slopes)
    assert errors[-1] < {"heun": 2e-3, "ddim": 3e-2}[method]


def test_ddim_without_noise_is_euler():
    process = VarianceExploding()
    end, x = draw("ddim", process, 16, 7)
    sigma = levels(process, 7)
    x = (x - MEAN) @ AXES
    for now, then in pairwise(sigma):
        x = x + (then - now) * now * x / (STDS**2 + now**2)
    np.testing.assert_allclose((end - MEAN) @ AXES, x, atol=2e-5)


# --------------------------------------------------------------------------------- stochastic


def heun_variances(process, cfg):
    """EDM's algorithm 2 on one axis of the target: it is linear, so variances follow a recursion."""
    sigma = levels(process, cfg.steps)
    variance = np.full(2, process.sigma_max**2)
    mean = np.zeros(2) - MEAN @ AXES  # the prior has mean 0, the target MEAN
    gamma = min(cfg.churn / cfg.steps, np.sqrt(2) - 1)
    for now, then in pairwise(sigma):
        raised = now * (1 + (gamma if cfg.churn_min <= now <= cfg.churn_max else 0.0))
        variance = variance + (raised**2 - now**2) * cfg.churn_noise**2
        slope = raised / (STDS**2 + raised**2)
        factor = 1 + (then - raised) * slope
        if then > 0:
            factor = 1 + (then - raised) * 0.5 * (slope + then / (STDS**2 + then**2) * factor)
        variance, mean = variance * factor**2, mean * factor
    return mean, variance


def ddim_variances(process, cfg):
    """DDIM written with VP's alpha-bar (arXiv 2010.02502 eq. 12 and 16), x_vp = sqrt(alpha-bar) x."""
    sigma = levels(process, cfg.steps)
    bar = 1 / (1 + sigma**2)
    mean, variance = -MEAN @ AXES * np.sqrt(bar[0]), bar[0] * process.sigma_max**2 * np.ones(2)
    for i in range(cfg.steps):
        b, c = bar[i], bar[i + 1]
        noise = cfg.eta * np.sqrt((1 - c) / (1 - b)) * np.sqrt(1 - b / c)
        x0 = STDS**2 / (STDS**2 + sigma[i] ** 2) / np.sqrt(b)  # E[x0 | x] per unit of x_vp
        eps = (1 - np.sqrt(b) * x0) / np.sqrt(1 - b)
        factor = np.sqrt(c) * x0 + np.sqrt(1 - c - noise**2) * eps
        mean, variance = mean * factor, variance * factor**2 + noise**2
    return mean, variance


CHURNED = {"churn": 6.0, "churn_min": 0.05, "churn_max": 30.0, "churn_noise": 1.05}


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("heun", CHURNED, heun_variances),
        ("ddim", {"eta": 1.0}, ddim_variances),
        ("ddim", {"eta": 0.5}, ddim_variances),
    ],
)
def test_few_coarse_steps_have_the_exact_moments(method, fields, expected):
    """At 8 steps the methods are far from the target, each in its own known way."""
    process, n, steps = VarianceExploding(), 20_000, 8
    end, _ = draw(method, process, n, steps, **fields)
    along = (end - MEAN) @ AXES
    mean, variance = expected(process, config.Sample(method=method, steps=steps, **fields))
    assert np.all(np.abs(along.var(0) / variance - 1) < 4 * np.sqrt(2 / n)), (along.var(0), variance)
    assert np.all(np.abs(along.mean(0) - mean) < 4 * np.sqrt(variance / n))
    assert abs(np.corrcoef(along.T)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize(("method", "fields"), [("heun", {"churn": 20.0}), ("ddim", {"eta": 1.0})])
def test_noisy_samplers_reach_the_target(method, fields):
    process, n = VarianceExploding(), 20_000
    worst = []
    for steps in (6, 192):
        end, _ = draw(method, process, n, steps, **fields)
        worst.append(np.abs(np.cov((end @ AXES).T) / np.outer(STDS, STDS) - np.eye(2)).max())
    assert worst[0] > 2 * worst[1]
    assert worst[1] < 0.1
    assert np.all(np.abs(end.mean(0) - MEAN) < 4 * 0.8 / np.sqrt(n) + 2e-3)


# ------------------------------------------------------------------------------------- noise


def test_start_is_one_noise_per_sample_whatever_the_batch():
    process = VarianceExploding()

    @jax.jit
    def begin(index, seed):
        return sampler.start(process, keys(seed, "sample", index), (16, 16, 3))

    def start(index, seed=0):
        return np.asarray(begin(jnp.asarray(index), seed))

    whole = start(np.arange(12))
    np.testing.assert_array_equal(whole[3:5], start([3, 4]))
    np.testing.assert_array_equal(whole[[5, 0, 11]], start([5, 0, 11]))
    assert len({row.tobytes() for row in (*whole, *start(np.arange(12), seed=1))}) == 24
    assert np.std(whole) == pytest.approx(80.0, rel=0.03)


def assert_same_in_any_batch(generate):
    whole = np.asarray(generate(jnp.arange(6)))
    moved = np.asarray(generate(jnp.array([5, 9, 2, 0, 7, 3])))
    np.testing.assert_allclose(moved[[0, 2, 3, 5]], whole[[5, 2, 0, 3]], atol=1e-3)
    np.testing.assert_allclose(generate(jnp.array([4])), whole[[4]], atol=1e-3)
    np.testing.assert_array_equal(generate(jnp.arange(6)), whole)  # a pure function
    gaps = np.abs(whole[:, None] - whole[None]).max((2, 3, 4)) + np.eye(6)
    assert gaps.min() > 0.01


def test_network_samples_do_not_depend_on_their_batch():
    net = config.Net(channels=16, mults=(1,), blocks=1, attention=())
    model = make_model(config.Config(data=config.Data(size=8), net=net), 1)
    rng = np.random.default_rng(0)  # any parameters do, if every path is active
    params = jax.tree.map(
        lambda leaf: jnp.float32(0.2 * rng.normal(size=leaf.shape)),
        jax.eval_shape(lambda: model.init(key(0, "init"))),
    )
    generate = make_generator(model, config.Sample(steps=4, churn=2.0))
    assert_same_in_any_batch(lambda index: generate(params, index))


def test_ancestral_samples_do_not_depend_on_their_batch():
    process = VarianceExploding()
    step = sampler.ddim(process, config.Sample(method="ddim", steps=4, eta=1.0))
    denoiser, grid = from_sigma_fn(gaussian_target, process), karras_grid(process, 4)

    @jax.jit
    def generate(index):
        return sampler.integrate(process, denoiser, step, grid, keys(0, "sample", index), SHAPE)

    assert_same_in_any_batch(generate)


# -------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize(("method", "steps", "nfe"), [("heun", 18, 35), ("heun", 2, 3), ("ddim", 18, 18)])
def test_number_of_evaluations(method, steps, nfe):
    """EDM reports 35 evaluations for 18 Heun steps: the last step is Euler's."""
    process, seen = VarianceExploding(), []

    def counting(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma[0], ordered=True)
        return gaussian_target(x, sigma)

    step = sampler.METHODS[method](process, config.Sample(method=method, steps=steps))
    grid, sample_keys = karras_grid(process, steps), keys(0, "sample", jnp.arange(3))
    jax.jit(lambda k: sampler.integrate(process, from_sigma_fn(counting, process), step, grid, k, SHAPE))(
        sample_keys
    ).block_until_ready()
    jax.effects_barrier()
    assert len(seen) == nfe
    sigma = levels(process, steps)[:-1]
    where = [0, *np.repeat(np.arange(1, steps), 2)] if method == "heun" else np.arange(steps)
    np.testing.assert_allclose(seen, sigma[where], rtol=1e-5)


def test_last_step_lands_on_the_denoiser():
    """From sigma_min the last Euler step returns D itself, also when it is a step function."""
    process = VarianceExploding()
    denoiser = from_sigma_fn(lambda x, sigma: jnp.where(x > 0, 0.75, -0.25), process)
    for method in sampler.METHODS:
        step = sampler.METHODS[method](process, config.Sample(method=method, steps=5))
        out = sampler.integrate(
            process, denoiser, step, karras_grid(process, 5), keys(0, "sample", jnp.arange(9)), SHAPE
        )
        np.testing.assert_allclose(np.unique(np.round(out, 5)), [-0.25, 0.75], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 1}, "sample.steps = 1"),
        ({"n": 0}, "sample.n = 0"),
        ({"batch": 0}, "sample.batch = 0"),
        ({"churn": -1.0}, "sample.churn = -1.0"),
        ({"eta": 1.5}, "sample.eta = 1.5"),
        ({"method": "euler"}, "sample.method = 'euler'"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        sampler.check(config.Sample(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)
