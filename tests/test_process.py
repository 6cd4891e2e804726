"""Processes and conversions against float64 closed forms, finite differences and Gaussian conditioning."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from mdiff import config
from mdiff.errors import UserError
from mdiff.process import laws

KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
PROCESS = {kind: laws.make_process(config.Process(kind=kind)) for kind in KINDS}
LEVELS = np.geomspace(1e-3, 100.0, 60)
every_process = pytest.mark.parametrize("kind", KINDS)


def rates(kind, t):
    """float64 (alpha, sigma) at time t, each from the definition of its law."""
    if kind == "ve":
        return 1.0, 80.0 * t**7
    if kind == "vp_linear":
        integral = quad(lambda s: 0.1 + s * (20.0 - 0.1), 0.0, t)[0]
        return np.exp(-integral / 2), np.sqrt(1.0 - np.exp(-integral))
    if kind == "vp_cosine":
        return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
    return 1.0 - t, t


def images(n, seed=0):
    x0, eps = np.random.default_rng(seed).normal(size=(2, n, 3, 2, 1)).astype(np.float32)
    return 0.5 * x0, eps


# ------------------------------------------------------------------------------- laws and inverses


@every_process
def test_rates_are_those_of_the_law(kind):
    times = np.linspace(0.002, 0.998, 41)
    alpha, sigma = np.array([rates(kind, np.float64(np.float32(t))) for t in times]).T
    np.testing.assert_allclose(PROCESS[kind].alpha(jnp.float32(times)), alpha, rtol=2e-6)
    np.testing.assert_allclose(PROCESS[kind].sigma(jnp.float32(times)), sigma, rtol=2e-6)
    np.testing.assert_allclose(PROCESS[kind].noise_level(jnp.float32(times)), sigma / alpha, rtol=3e-6)


@every_process
def test_time_runs_from_data_to_noise(kind):
    process = PROCESS[kind]
    assert float(process.sigma(jnp.float32(0.0))) == 0.0
    assert float(process.alpha(jnp.float32(0.0))) == 1.0
    t = np.asarray(process.time(jnp.float32(LEVELS)))
    assert np.all(np.diff(t) > 0) and t[0] > 0
    assert float(process.time(jnp.float32(0.0))) == 0.0


@every_process
def test_noise_level_and_time_are_inverse_over_the_range(kind):
    process = PROCESS[kind]
    level = np.float32(np.geomspace(1e-4, 150.0, 500))
    # A float32 time near 1 resolves the level of flow and cosine to eps (1 + level), whatever the formula.
    tolerance = 2e-6 + 2e-7 * level * (kind in ("flow", "vp_cosine"))
    assert np.all(np.abs(np.asarray(process.noise_level(process.time(level))) / level - 1) < tolerance)
    logsnr = process.logsnr(process.time(level))
    np.testing.assert_allclose(logsnr, -2 * np.log(level), atol=2 * tolerance.max())
    np.testing.assert_allclose(process.time_of_logsnr(-2 * np.log(level)), process.time(level), rtol=5e-6)


def test_small_noise_keeps_its_digits():
    """1 - alpha^2 in float32 would lose all digits below sigma = 3e-4."""
    t = np.float64(np.float32(1e-7))
    expected = np.sqrt(0.1 * t + 9.95 * t**2)  # sigma^2 = 1 - exp(-integral), to second order below 1e-16
    assert float(PROCESS["vp_linear"].sigma(jnp.float32(t))) == pytest.approx(expected, rel=1e-6)


def test_noise_above_sigma_max_is_a_time_above_1():
    for kind, level in (("ve", 160.0), ("vp_linear", 200.0)):
        t = PROCESS[kind].time(jnp.float32(level))
        assert float(t) > 1
        assert float(PROCESS[kind].noise_level(t)) == pytest.approx(level, rel=1e-5)


@every_process
def test_derivatives_in_time(kind):
    step = 1e-5
    for t in (0.05, 0.3, 0.5, 0.77, 0.95):
        slope = (np.array(rates(kind, t + step)) - rates(kind, t - step)) / (2 * step)
        made = [PROCESS[kind].alpha_dot(jnp.float32(t)), PROCESS[kind].sigma_dot(jnp.float32(t))]
        np.testing.assert_allclose(made, slope, rtol=2e-5, atol=1e-6)


@every_process
def test_prior_is_noise_at_sigma_max(kind):
    process = laws.make_process(config.Process(kind=kind, sigma_max=3.0))
    drawn = process.prior(jax.random.key(0), (200_000,))
    sigma = {"ve": 3.0, "flow": 0.75}.get(kind, 3.0 / np.sqrt(10.0))  # sigma / alpha = 3
    assert float(drawn.std()) == pytest.approx(sigma, rel=0.01)


# ------------------------------------------------------------------------------------- conversions


@every_process
def test_every_parameterization_determines_the_prediction(kind):
    """From x0 and eps, in float64, to each quantity and back through the process."""
    process, levels = PROCESS[kind], np.array([0.002, 0.05, 0.5, 1.0, 5.0, 80.0])
    x0, eps = images(len(levels))
    t = process.time(jnp.float32(levels))
    time = np.asarray(t, np.float64)
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in np.array([rates(kind, each) for each in time]).T)
    step = 1e-6 * time
    ahead, behind = (np.array([rates(kind, at) for at in times]).T for times in (time + step, time - step))
    alpha_dot, sigma_dot = (a.reshape(-1, 1, 1, 1) for a in (ahead - behind) / (2 * step))
    xt = alpha * x0 + sigma * eps
    quantities = {
        "x0": x0,
        "eps": eps,
        "score": -eps / sigma,
        "v": alpha * eps - sigma * x0,
        "velocity": alpha_dot * x0 + sigma_dot * eps,
    }
    np.testing.assert_allclose(process.corrupt(x0, eps, t), xt, rtol=1e-5, atol=1e-6)
    for name, value in quantities.items():
        made = getattr(process, f"from_{name}")(jnp.float32(xt), jnp.float32(value), t)
        # Dividing by sigma or alpha magnifies rounding of xt; nothing else may.
        limit = 1e-5 * np.broadcast_to(1 + levels, x0.T.shape).T
        assert np.all(np.abs(made.x0 - x0) < limit), name
        limit = 1e-5 * np.broadcast_to(1 + 1 / levels, x0.T.shape).T
        assert np.all(np.abs(made.eps - eps) < limit), name
        if name in ("score", "v", "velocity"):
            again = getattr(process, name)(made, t)
            scale = np.abs(value).max(axis=(1, 2, 3), keepdims=True)
            assert np.all(np.abs(again - value) < 2e-3 * scale), name


def test_velocity_of_the_flow_points_from_image_to_noise():
    x0, eps = images(4)
    t = jnp.float32([0.1, 0.4, 0.6, 0.9])
    made = PROCESS["flow"].velocity(PROCESS["flow"].from_x0(PROCESS["flow"].corrupt(x0, eps, t), x0, t), t)
    np.testing.assert_allclose(made, eps - x0, atol=1e-5)


@every_process
def test_score_is_the_slope_of_the_log_density(kind):
    """x0 is one of two points with normal noise around; density and posterior mean in float64."""
    process, centers, weights, spread = PROCESS[kind], np.array([-0.6, 0.5]), np.array([0.3, 0.7]), 0.2
    for level in (0.05, 0.6, 4.0):
        t = process.time(jnp.float32(level))
        alpha, sigma = rates(kind, float(t))
        x = np.linspace(-1.5, 1.5, 9) * (alpha + sigma)

        def log_density(x, scale=np.hypot(alpha * spread, sigma), alpha=alpha):
            return np.log(norm.pdf(x[:, None], alpha * centers, scale) @ weights)

        h = 1e-4 * (alpha + sigma)
        score = (log_density(x + h) - log_density(x - h)) / (2 * h)
        # E[x0 | x] by quadrature over x0.
        grid = np.linspace(-2.5, 2.5, 20_001)
        joint = norm.pdf(x[:, None], alpha * grid, sigma) * (
            norm.pdf(grid[:, None], centers, spread) @ weights
        )
        mean = (joint @ grid) / joint.sum(axis=1)
        shape, times = (len(x), 1, 1, 1), jnp.full((len(x),), t)
        xt = jnp.float32(x).reshape(shape)
        prediction = process.from_x0(xt, jnp.float32(mean).reshape(shape), times)
        scale = np.abs(score).max()
        np.testing.assert_allclose(process.score(prediction, times).ravel(), score, atol=2e-4 * scale)
        back = process.from_score(xt, jnp.float32(score).reshape(shape), times)
        np.testing.assert_allclose(back.x0.ravel(), mean, atol=2e-4 * (1 + level))


@every_process
def test_ends_of_time_stay_finite(kind):
    """At t = 0 there is no noise, at t = 1 of flow and cosine no image: no NaN in values or gradients."""
    process, x = PROCESS[kind], jnp.full((2, 2, 2, 1), 0.5)
    for name in ("x0", "eps", "v", "velocity"):

        def total(value, t, name=name):
            return sum(jnp.sum(part) for part in getattr(process, f"from_{name}")(x, value, t))

        for t in (0.0, 1.0):
            value, gradient = jax.value_and_grad(total)(x, jnp.full(2, t))
            assert np.isfinite(value) and np.all(np.isfinite(gradient)), (name, t)
    start = process.from_velocity(x, x, jnp.zeros(2))
    np.testing.assert_array_equal(start.x0, x)
    np.testing.assert_array_equal(process.from_x0(x, x, jnp.zeros(2)).eps, 0 * x)


# --------------------------------------------------------------------------------------- posterior


@every_process
def test_posterior_is_gaussian_conditioning(kind):
    """Given x0, (x_s, x_t) is normal: x_t = a x_s + noise. Condition x_s on x_t in float64."""
    process = PROCESS[kind]
    for high, low in ((80.0, 30.0), (5.0, 0.5), (0.6, 0.55), (0.1, 0.002)):
        t, s = (process.time(jnp.float32(level)) for level in (high, low))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (rates(kind, float(at)) for at in (t, s))
        a, x0, xt = alpha_t / alpha_s, 0.3, 0.8 * (alpha_t + sigma_t)
        covariance = np.array([[sigma_s**2, a * sigma_s**2], [a * sigma_s**2, sigma_t**2]])
        gain = covariance[0, 1] / covariance[1, 1]
        mean = alpha_s * x0 + gain * (xt - alpha_t * x0)
        std = np.sqrt(covariance[0, 0] - gain * covariance[0, 1])
        made = process.posterior(jnp.full((1, 1, 1, 1), xt), jnp.full((1, 1, 1, 1), x0), t[None], s[None])
        np.testing.assert_allclose(float(made[0].squeeze()), mean, rtol=2e-5)
        np.testing.assert_allclose(float(made[1].squeeze()), std, rtol=2e-5)


@every_process
def test_posterior_at_the_data_is_x0(kind):
    xt, x0 = jnp.full((1, 2, 2, 1), 0.9), jnp.full((1, 2, 2, 1), -0.4)
    mean, std = PROCESS[kind].posterior(xt, x0, jnp.float32([0.5]), jnp.float32([0.0]))
    np.testing.assert_array_equal(mean, x0)
    assert float(std.squeeze()) == 0.0


def test_posterior_from_pure_noise():
    """At t = 1 the flow's xt says nothing of x0: the posterior is the marginal at s."""
    xt, x0 = jnp.full((1, 1, 1, 1), 0.9), jnp.full((1, 1, 1, 1), -0.4)
    mean, std = PROCESS["flow"].posterior(xt, x0, jnp.float32([1.0]), jnp.float32([0.25]))
    assert float(mean.squeeze()) == pytest.approx(0.75 * -0.4)
    assert float(std.squeeze()) == pytest.approx(0.25)


# ------------------------------------------------------------------------------------------ config


def test_config_fields_reach_the_process():
    cfg = config.Process(
        kind="vp_linear", sigma_min=0.01, sigma_max=50.0, rho=5.0, beta_min=0.2, beta_max=18.0
    )
    process = laws.make_process(cfg)
    assert (process.sigma_min, process.sigma_max, process.rho) == (0.01, 50.0, 5.0)
    assert float(process.alpha(jnp.float32(1.0))) == pytest.approx(np.exp(-(18.0 + 0.2) / 4), rel=1e-5)
    ve = laws.make_process(config.Process(sigma_max=40.0, rho=3.0))
    assert float(ve.sigma(jnp.float32(0.5))) == pytest.approx(40.0 / 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sigma_min": 0.0}, "sigma_min = 0.0"),
        ({"sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"sigma_max": float("inf")}, "sigma_max = inf"),
        ({"sigma_max": float("nan")}, "sigma_max = nan"),
        ({"rho": 0.0}, "rho = 0.0"),
        ({"kind": "vp_linear", "beta_min": 0.0}, "process.beta_min = 0.0"),
        ({"kind": "vp_linear", "beta_min": 30.0}, "beta_max = 20.0"),
        ({"kind": "vp_linear", "sigma_max": 160.0}, "reaches noise level 152.1"),
        ({"kind": "flow", "sigma_max": 1e6}, "reaches noise level 10000"),
        ({"kind": "flow", "beta_max": 10.0}, "process.beta_max = 10.0: applies to kind vp_linear only"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        laws.check(config.Process(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_of_every_kind_are_valid():
    for kind in KINDS:
        laws.check(replace(config.Process(), kind=kind))
    laws.check(config.Process(kind="vp_linear", sigma_max=152.0))
