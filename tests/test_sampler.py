"""Samplers against the exact probability flow, exact variances and a count of their evaluations.

The target is a Gaussian N(mu, S) and, beside it, a mixture in one dimension. The Gaussian's denoiser is
linear, so along each eigenvector of S a sampler is a linear recursion whose result is known in closed form
(the flow) or by a float64 recursion (the noise). In one dimension the flow keeps quantiles.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key, keys
from mdiff.nets.denoiser import from_sigma_fn, make_model
from mdiff.process.laws import VarianceExploding, make_process
from mdiff.process.times import make_grid
from mdiff.recipes.generate import make_generator
from mdiff.sample import sampler
from mdiff.sample.steps import METHODS

MEAN = np.array([0.3, -0.2])
ANGLE = 0.6
AXES = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])  # columns
STDS = np.array([0.8, 0.25])
SHAPE = (1, 2, 1)
WEIGHTS, CENTERS, WIDTHS = np.array([0.6, 0.4]), np.array([-0.4, 0.5]), np.array([0.3, 0.2])
KINDS = ("ve", "vp_linear", "vp_cosine", "flow")


def gaussian_target(x, sigma):
    """E[x0 | x] for N(MEAN, AXES STDS^2 AXES^T)."""
    shrink = jnp.float32(STDS) ** 2 / (jnp.float32(STDS) ** 2 + sigma[:, None] ** 2)
    along = (x.reshape(-1, 2) - jnp.float32(MEAN)) @ jnp.float32(AXES)
    return (jnp.float32(MEAN) + (along * shrink) @ jnp.float32(AXES).T).reshape(x.shape)


def mixture_target(x, sigma):
    """E[x0 | x] for the mixture; x [B]."""
    variance = jnp.float32(WIDTHS) ** 2 + sigma[:, None] ** 2
    logits = (
        jnp.log(jnp.float32(WEIGHTS)) - 0.5 * jnp.log(variance) - 0.5 * (x[:, None] - CENTERS) ** 2 / variance
    )
    each = CENTERS + jnp.float32(WIDTHS) ** 2 / variance * (x[:, None] - CENTERS)
    return jnp.sum(jax.nn.softmax(logits) * each, axis=-1)


def both_targets(x, sigma):
    """Gaussian in the first two pixels, mixture in the third."""
    rows = x.reshape(-1, 3)
    parts = [gaussian_target(rows[:, :2], sigma), mixture_target(rows[:, 2], sigma)[:, None]]
    return jnp.concatenate(parts, axis=1).reshape(x.shape)


def process_of(kind, sigma_min=0.002, sigma_max=80.0):
    return make_process(config.Process(kind=kind, sigma_min=sigma_min, sigma_max=sigma_max))


def grid_of(process, steps, kind="karras"):
    return make_grid(process, kind, steps, process.sigma_min, process.sigma_max, process.rho)


def draw(method, process, n, steps, target=gaussian_target, shape=SHAPE, **fields):
    """float64 [n,pixels] generations and the starting noise they came from."""
    cfg = config.Sample(method=method, steps=steps, **fields)
    denoiser = from_sigma_fn(target, process)

    @jax.jit
    def run(sample_keys):
        end = sampler.sample(process, cfg, denoiser, sample_keys, shape)
        return end, sampler.start(process.sigma_max, sample_keys, shape)

    end, begin = run(keys(0, "sample", jnp.arange(n)))
    return (np.asarray(v, np.float64).reshape(n, -1) for v in (end, begin))


def levels(process, steps):
    """The Karras grid in sigma, float64, by its formula."""
    i = np.arange(steps) / (steps - 1)
    low, high = process.sigma_min ** (1 / 7), process.sigma_max ** (1 / 7)
    return np.append((high + i * (low - high)) ** 7, 0.0)


# ------------------------------------------------------------------------------ deterministic


def exact_flow(begin, sigma_max):
    """float64 [n,3] end points of the probability flow from `begin` at sigma_max."""
    # dx/dsigma = sigma (x - mu) / (s^2 + sigma^2) along each axis: solved exactly.
    shrink = STDS / np.sqrt(STDS**2 + sigma_max**2)
    gaussian = MEAN + ((begin[:, :2] - MEAN) @ AXES * shrink) @ AXES.T

    def cdf(x, sigma):
        return norm.cdf(x, CENTERS, np.hypot(WIDTHS, sigma)) @ WEIGHTS

    mixture = [brentq(lambda x, p=cdf(b, sigma_max): cdf(x, 0.0) - p, -5, 5, xtol=1e-12) for b in begin[:, 2]]
    return np.column_stack([gaussian, mixture])


ORDERS = {"euler": 1.0, "ddim": 1.0, "heun": 2.0, "dpmpp2m": 2.0}


@pytest.mark.parametrize(
    # DDIM is Euler's method draw by draw, in every process: tested below.
    ("method", "kind"),
    [("ddim", "ve"), *((method, kind) for method in ("euler", "heun", "dpmpp2m") for kind in KINDS)],
)
def test_error_falls_at_the_methods_order(method, kind):
    # A low end of 1e-3 puts the last Euler step's own error, sigma_min^2 / 2 s^2, at 1e-5.
    process, n = process_of(kind, 1e-3, 20.0), 64
    denoiser, sample_keys = from_sigma_fn(both_targets, process), keys(0, "sample", jnp.arange(n))
    steps = np.array([24, 48, 96])

    @jax.jit
    def ends(sample_keys):
        cfgs = [config.Sample(method=method, steps=int(k)) for k in steps]
        return [sampler.sample(process, cfg, denoiser, sample_keys, (1, 3, 1)) for cfg in cfgs]

    begin = np.asarray(sampler.start(20.0, sample_keys, (1, 3, 1)), np.float64).reshape(n, 3)
    exact = exact_flow(begin, 20.0)
    for target, pixels in (("Gaussian", slice(2)), ("mixture", slice(2, 3))):
        gaps = [(np.asarray(end).reshape(n, 3) - exact)[:, pixels] for end in ends(sample_keys)]
        errors = np.sqrt([np.mean(gap**2) for gap in gaps])
        slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
        assert np.all(np.abs(slopes - ORDERS[method]) < 0.35), (target, errors, slopes)
        assert errors[-1] < {1.0: 3e-2, 2.0: 2e-3}[ORDERS[method]], (target, errors)


@pytest.mark.parametrize("kind", KINDS)
def test_euler_and_ddim_without_noise_are_eulers_method(kind):
    process = process_of(kind)
    made, begin = draw("euler", process, 16, 7)
    x = (begin - MEAN) @ AXES
    for now, then in pairwise(levels(process, 7)):
        x = x + (then - now) * now * x / (STDS**2 + now**2)
    np.testing.assert_allclose((made - MEAN) @ AXES, x, atol=2e-5)
    np.testing.assert_allclose(next(draw("ddim", process, 16, 7)), made, atol=2e-5)


def test_euler_of_the_flow_is_eulers_method_in_t():
    """dx/dt = E[eps - x0 | x], stepped in t itself from x_t, in float64."""
    process, steps = process_of("flow"), 9
    end, begin = draw("euler", process, 16, steps, grid="uniform")
    times = np.append(np.linspace(80 / 81, 0.002 / 1.002, steps), 0.0)
    x = begin / 81 @ AXES  # xt = (1 - t) u
    for t, s in pairwise(times):
        spread = (1 - t) ** 2 * STDS**2 + t**2
        centered = x - (1 - t) * MEAN @ AXES
        x0 = MEAN @ AXES + (1 - t) * STDS**2 / spread * centered
        x = x + (s - t) * (t / spread * centered - x0)
    np.testing.assert_allclose(end @ AXES, x, atol=3e-5)


@pytest.mark.parametrize(("kind", "grid"), [("vp_cosine", "uniform"), ("flow", "karras"), ("ve", "logsnr")])
def test_dpmpp2m_is_the_papers_algorithm_in_its_own_coordinates(kind, grid):
    """arXiv 2211.01095, algorithm 2, on x_t with alpha, sigma and lambda = ln(alpha / sigma), in float64."""
    process, steps = process_of(kind), 10
    end, begin = draw("dpmpp2m", process, 16, steps, grid=grid)
    t = grid_of(process, steps, grid)[:-1].astype(np.float64)
    alpha, sigma = {
        "vp_cosine": lambda: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
        "flow": lambda: (1 - t, t),
        "ve": lambda: (np.ones_like(t), 80 * t**7),
    }[kind]()
    lam = np.log(alpha / sigma)
    mean = MEAN @ AXES

    def x0_of(x, i):
        spread = alpha[i] ** 2 * STDS**2 + sigma[i] ** 2
        return mean + alpha[i] * STDS**2 / spread * (x - alpha[i] * mean)

    x, old = alpha[0] * begin @ AXES, None
    for i in range(1, steps):
        x0, h = x0_of(x, i - 1), lam[i] - lam[i - 1]
        d = x0
        if 1 < i < steps - 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x, old = sigma[i] / sigma[i - 1] * x - alpha[i] * np.expm1(-h) * d, x0
    np.testing.assert_allclose(end @ AXES, x0_of(x, steps - 1), atol=1e-4)


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


def sde_variances(process, cfg):
    """Euler-Maruyama with drift and diffusion of dx = sqrt(d(sigma^2)/dtau) dw, backwards in tau = sigma^2."""
    tau = levels(process, cfg.steps) ** 2
    mean, variance = -MEAN @ AXES, process.sigma_max**2 * np.ones(2)
    for now, then in pairwise(tau):
        factor = 1 + (then - now) / (STDS**2 + now)  # score = -(x - mu) / (s^2 + tau)
        mean, variance = mean * factor, variance * factor**2 + (now - then if then > 0 else 0.0)
    return mean, variance


CHURNED = {"churn": 6.0, "churn_min": 0.05, "churn_max": 30.0, "churn_noise": 1.05}


@pytest.mark.parametrize(
    ("method", "kind", "fields", "expected"),
    [
        ("heun", "ve", CHURNED, heun_variances),
        ("heun", "flow", CHURNED, heun_variances),
        ("ddim", "ve", {"eta": 1.0}, ddim_variances),
        ("ddim", "vp_linear", {"eta": 0.5}, ddim_variances),
        ("ddpm", "vp_cosine", {}, ddim_variances),
        ("ddpm", "flow", {}, ddim_variances),
        ("sde", "ve", {}, sde_variances),
        ("sde", "vp_linear", {}, sde_variances),
    ],
)
def test_few_coarse_steps_have_the_exact_moments(method, kind, fields, expected):
    """At 8 steps the methods are far from the target, each in its own known way."""
    process, n, steps = process_of(kind), 20_000, 8
    end, _ = draw(method, process, n, steps, **fields)
    along = (end - MEAN) @ AXES
    as_ddim = {"eta": 1.0} if method == "ddpm" else fields  # ancestral sampling is DDIM with eta = 1
    mean, variance = expected(process, config.Sample(method=method, steps=steps, **as_ddim))
    assert np.all(np.abs(along.var(0) / variance - 1) < 4 * np.sqrt(2 / n)), (along.var(0), variance)
    assert np.all(np.abs(along.mean(0) - mean) < 4 * np.sqrt(variance / n))
    assert abs(np.corrcoef(along.T)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize(
    ("method", "kind", "fields"),
    [
        ("heun", "ve", {"churn": 20.0}),
        ("heun", "vp_cosine", {"churn": 20.0}),
        ("ddpm", "vp_linear", {}),
        ("ddim", "vp_cosine", {"eta": 0.5}),
        ("ddim", "flow", {"eta": 0.5}),
        ("sde", "flow", {}),
    ],
)
def test_noisy_samplers_reach_the_target(method, kind, fields):
    """Mean and covariance of the Gaussian, mean, spread and weights of the mixture."""
    process, n, worst = process_of(kind), 6000, []
    for steps in (6, 96):
        end, _ = draw(method, process, n, steps, both_targets, (1, 3, 1), **fields)
        gaussian, mixture = end[:, :2], end[:, 2]
        worst.append(np.abs(np.cov((gaussian @ AXES).T) / np.outer(STDS, STDS) - np.eye(2)).max())
    # The recursions above, at 96 steps, are 13 % off in variance; the rest is the draw of 6,000.
    assert worst[-1] < 0.2
    assert worst[0] > 2 * worst[1]
    assert np.all(np.abs(gaussian.mean(0) - MEAN) < 4 * 0.8 / np.sqrt(n) + 5e-3)
    for point in (-0.7, -0.4, 0.0, 0.3, 0.6):
        expected = norm.cdf(point, CENTERS, WIDTHS) @ WEIGHTS
        assert np.mean(mixture < point) == pytest.approx(expected, abs=0.04)


def test_ancestral_sampling_is_ddim_with_eta_1():
    """Draw by draw: both take the same noise, so the same images come out."""
    for kind in ("vp_linear", "flow"):
        process = process_of(kind)
        ancestral, _ = draw("ddpm", process, 32, 10, grid="uniform")
        ddim, _ = draw("ddim", process, 32, 10, grid="uniform", eta=1.0)
        np.testing.assert_allclose(ancestral, ddim, atol=2e-4)


# ------------------------------------------------------------------------------------- noise


def test_start_is_one_noise_per_sample_whatever_the_batch():
    @jax.jit
    def begin(index, seed):
        return sampler.start(80.0, keys(seed, "sample", index), (16, 16, 3))

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


@pytest.mark.parametrize(
    ("method", "fields"), [("ddim", {"eta": 1.0}), ("dpmpp2m", {}), ("ddpm", {}), ("sde", {})]
)
def test_samples_do_not_depend_on_their_batch(method, fields):
    process, cfg = process_of("vp_cosine"), config.Sample(method=method, steps=5, **fields)
    denoiser = from_sigma_fn(gaussian_target, process)

    @jax.jit
    def generate(index):
        return sampler.sample(process, cfg, denoiser, keys(0, "sample", index), SHAPE)

    assert_same_in_any_batch(generate)


# -------------------------------------------------------------------------------- evaluations


EVALUATIONS = [("heun", 18, 35), ("heun", 2, 3)] + [(m, 6, 6) for m in METHODS if m != "heun"]


@pytest.mark.parametrize(("method", "steps", "nfe"), EVALUATIONS)
def test_number_of_evaluations(method, steps, nfe):
    """EDM reports 35 evaluations for 18 Heun steps: the last step is Euler's."""
    process, seen = VarianceExploding(), []

    def counting(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma[0], ordered=True)
        return gaussian_target(x, sigma)

    next(draw(method, process, 3, steps, counting))
    jax.effects_barrier()
    assert len(seen) == nfe
    sigma = levels(process, steps)[:-1]
    where = [0, *np.repeat(np.arange(1, steps), 2)] if method == "heun" else np.arange(steps)
    np.testing.assert_allclose(seen, sigma[where], rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_last_step_lands_on_the_denoiser(method):
    """From sigma_min the last step returns D itself, also when it is a step function."""
    out, _ = draw(method, process_of("flow"), 9, 2, lambda x, sigma: jnp.where(x > 0, 0.75, -0.25))
    np.testing.assert_allclose(np.unique(np.round(out, 4)), [-0.25, 0.75], atol=1e-4)


def test_start_follows_the_grid():
    """A grid that starts lower gets noise of its own first level."""
    process, cfg = process_of("flow"), config.Sample(method="euler", steps=3)
    grid = make_grid(process, "karras", 3, 0.002, 2.5)
    still = from_sigma_fn(lambda x, sigma: x, process)  # says that there is no noise: nothing moves
    out = sampler.integrate(
        process, still, METHODS["euler"](process, cfg), grid, keys(0, "s", jnp.arange(4000)), SHAPE
    )
    assert float(jnp.std(out)) == pytest.approx(2.5, rel=0.03)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 1}, "sample.steps = 1"),
        ({"n": 0}, "sample.n = 0"),
        ({"batch": 0}, "sample.batch = 0"),
        ({"churn": -1.0}, "sample.churn = -1.0"),
        ({"churn": float("nan")}, "sample.churn = nan"),
        ({"churn": 1.0, "churn_min": 2.0, "churn_max": 1.0}, "churn_min < churn_max"),
        ({"churn": 1.0, "churn_noise": 0.0}, "sample.churn_noise = 0.0"),
        ({"method": "ddim", "eta": 1.5}, "sample.eta = 1.5"),
        ({"method": "leapfrog"}, "sample.method = 'leapfrog'"),
        ({"grid": "linear"}, "sample.grid = 'linear'"),
        ({"eta": 0.5}, "sample.eta = 0.5: has no effect on method heun"),
        ({"method": "ddpm", "eta": 0.5}, "set sample.method to ddim"),
        ({"method": "dpmpp2m", "churn": 5.0}, "sample.churn = 5.0: has no effect on method dpmpp2m"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        sampler.check(config.Sample(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_of_every_method_are_valid():
    for method in METHODS:
        for grid in ("karras", "uniform", "logsnr"):
            sampler.check(config.Sample(method=method, grid=grid))
