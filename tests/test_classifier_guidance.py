"""Classifier guidance against known scores, finite differences and the exact flow; stepwise sampling against the scan."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import one_line
from scipy.integrate import solve_ivp
from scipy.special import logsumexp
from scipy.stats import norm

from mdiff import config
from mdiff.keys import keys
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.process import laws
from mdiff.sample import guidance, sampler, stepwise
from mdiff.sample.steps import METHODS

KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
PROCESS = {kind: laws.make_process(config.Process(kind=kind)) for kind in KINDS}
MEANS, PRIOR, STD = np.array([-0.5, 0.7, 0.1]), np.array([0.3, 0.5, 0.2]), np.array([0.2, 0.1, 0.3])


def fits(process, xt, t):
    """log p(class, xt) [B,3] up to a constant, in float32."""
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    variance = alpha**2 * jnp.float32(STD) ** 2 + sigma**2
    z = xt.reshape(-1, 1) - alpha * jnp.float32(MEANS)
    return jnp.log(jnp.float32(PRIOR)) - 0.5 * jnp.log(variance) - 0.5 * z**2 / variance


def mixture(process):
    """The exact denoiser of a mixture of three normal laws, unconditional."""

    def denoise(xt, t, cond=None):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        gain = alpha * jnp.float32(STD) ** 2 / (alpha**2 * jnp.float32(STD) ** 2 + sigma**2)
        each = jnp.float32(MEANS) + gain * (xt.reshape(-1, 1) - alpha * jnp.float32(MEANS))
        x0 = jnp.sum(jax.nn.softmax(fits(process, xt, t)) * each, axis=1)
        return process.from_x0(xt, x0.reshape(xt.shape), t)

    return denoise


def classifier(process):
    """Its exact classifier: log p(label | xt)."""

    def log_prob(xt, t, label):
        return jnp.take_along_axis(jax.nn.log_softmax(fits(process, xt, t)), label[:, None], 1)[:, 0]

    return log_prob


def states(kind, level, n=9):
    """n noisy values at one noise level, their times, and float64 x, alpha and sigma."""
    process = PROCESS[kind]
    t = process.time(jnp.float32(level))
    alpha, sigma = (np.float64(np.float32(a)) for a in (process.alpha(t), process.sigma(t)))
    x = np.float64(np.float32(np.linspace(-1.2, 1.2, n) * np.hypot(alpha, sigma)))
    return jnp.float32(x).reshape(n, 1, 1, 1), jnp.full((n,), t), x, alpha, sigma


def log_densities(x, alpha, sigma):
    """float64 log p(x, class) [n,3] of the noised mixture."""
    return np.log(PRIOR) + norm.logpdf(x[:, None], alpha * MEANS, np.hypot(alpha * STD, sigma))


@cache
def programs(kind):
    """`(xt, t, label, scale) -> (unguided, guided, guided score)` and the mixture's denoiser, compiled."""
    process = PROCESS[kind]

    @jax.jit
    def both(xt, t, label, scale):
        guided = guidance.by_classifier(mixture(process), classifier(process), label, scale, process)(xt, t)
        return mixture(process)(xt, t), guided, process.score(guided, t)

    return both


# ----------------------------------------------------------------------------- against the known score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
def test_guided_score_is_the_power_priors(kind, scale):
    """(1 - scale) s + scale s_class, and s + scale grad log p(class | xt) by finite differences."""
    process = PROCESS[kind]
    for level, label in ((0.1, 1), (1.0, 0), (6.0, 2)):
        xt, t, x, alpha, sigma = states(kind, level)
        variance = (alpha * STD) ** 2 + sigma**2
        each = (alpha * MEANS - x[:, None]) / variance
        joint = log_densities(x, alpha, sigma)
        plain = np.sum(np.exp(joint - logsumexp(joint, axis=1, keepdims=True)) * each, axis=1)
        expected = (1 - scale) * plain + scale * each[:, label]

        before, prediction, score = programs(kind)(xt, t, jnp.full(len(x), label), scale)
        score = np.asarray(score).ravel()
        # Float32 x0 of size 1 has this much of a score: alpha / sigma^2 times its rounding.
        size = np.abs(expected).max() + (1 + scale) * np.abs(each).max()
        np.testing.assert_allclose(score, expected, atol=1e-5 * size)

        h = 1e-4 * np.hypot(alpha, sigma)

        def posterior(x, label=label, alpha=alpha, sigma=sigma):
            joint = log_densities(x, alpha, sigma)
            return joint[:, label] - logsumexp(joint, axis=1)

        slope = (posterior(x + h) - posterior(x - h)) / (2 * h)
        np.testing.assert_allclose(score, plain + scale * slope, atol=1e-5 * size)
        # eps form and x0 form, each from the unguided prediction and the slope.
        for made, plainly, push in (
            (prediction.eps, before.eps, -sigma * slope),
            (prediction.x0, before.x0, sigma**2 / alpha * slope),
        ):
            close = dict(rtol=1e-4, atol=2e-5 * (1 + np.abs(scale * push).max()))
            np.testing.assert_allclose(np.ravel(made), np.ravel(plainly) + scale * push, **close)
        # x0 and eps still belong to the same xt.
        np.testing.assert_allclose(process.corrupt(*prediction, t), xt, atol=1e-5 * (1 + sigma) * (1 + scale))


@pytest.mark.parametrize("kind", KINDS)
def test_the_push_at_one_noise_level_is_that_of_every_process(kind):
    """EDM's form: D + scale s^2 grad_u log p, and what `watch` hears of is s ||grad_u log p||."""
    level = 0.8
    process, u = PROCESS[kind], jnp.linspace(-1, 1, 5).reshape(5, 1, 1, 1)
    t, label = jnp.full(5, process.time(jnp.float32(level))), jnp.full(5, 2)
    xt = u * process.alpha(t)[:, None, None, None]

    @jax.jit
    def push(xt, t):
        heard = []
        pair = mixture(process), classifier(process)
        guided = guidance.by_classifier(*pair, label, 2.0, process, heard.append)(xt, t)
        return guided.x0 - pair[0](xt, t).x0, *heard

    found, heard = push(xt, t)
    h, x = 1e-4, np.float64(u).ravel()
    joint = [log_densities(x + d, 1.0, level) for d in (h, -h)]
    slope = np.subtract(*(j[:, 2] - logsumexp(j, axis=1) for j in joint)) / (2 * h)
    np.testing.assert_allclose(np.ravel(found), 2.0 * level**2 * slope, atol=2e-5)
    np.testing.assert_allclose(heard, level * np.abs(slope), rtol=1e-3, atol=1e-6)


def test_pure_noise_stays_finite():
    """At t = 1 the rectified flow and the cosine law have alpha = 0: nothing to push, and no inf or NaN on the way."""
    for kind in ("flow", "vp_cosine"):
        xt, label = jnp.linspace(-2, 2, 5).reshape(5, 1, 1, 1), jnp.zeros(5, int)

        for t in (1.0, 1.0 - 2.0**-24, 0.9995):
            plain, made, _ = programs(kind)(xt, jnp.full(5, t), label, 50.0)
            assert all(np.isfinite(part).all() for part in made), (kind, t)
            push = np.ravel(made.x0 - plain.x0)
            if t == 1:
                np.testing.assert_array_equal(push, 0.0)
        # Near it the push is that of E[x0 | class] - E[x0], which does not depend on how near.
        np.testing.assert_allclose(push, 50 * (MEANS[0] - PRIOR @ MEANS), rtol=0.01)


# -------------------------------------------------------------------------------------------- sampling

PRIOR_STD, PRIOR_MEAN, NOISE_STD, SEEN = 0.8, -0.2, 0.5, 0.9


def gaussian_pair(process):
    """Denoiser of x0 ~ N(PRIOR_MEAN, PRIOR_STD^2) and log p(y = SEEN | xt), y = x0 + NOISE_STD n."""

    def x0_of(u, sigma):
        return PRIOR_MEAN + PRIOR_STD**2 / (PRIOR_STD**2 + sigma[:, None, None, None] ** 2) * (u - PRIOR_MEAN)

    def log_prob(xt, t, label):
        sigma = process.noise_level(t)
        u = xt / process.alpha(t)[:, None, None, None]
        variance = PRIOR_STD**2 * sigma**2 / (PRIOR_STD**2 + sigma**2) + NOISE_STD**2
        return -0.5 * (SEEN - x0_of(u, sigma).reshape(-1)) ** 2 / variance

    return from_sigma_fn(x0_of, process), log_prob


@pytest.mark.parametrize("kind", ["ve", "flow"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guided_samples_are_those_of_the_guided_flow(kind, scale):
    """What is sampled is not the power prior p(x0) p(y|x0)^scale, since the score of a noised power is not the power's.

    It is the end of du/ds = -s [(1 - scale) score of p_s + scale score of p_s(.|y)], both normal with variances S^2 + s^2 and
    P^2 + s^2, P the posterior's: a linear flow, whose std ends at S^(1-scale) P^scale for every start s -> infinity.
    The power prior has 1 / (1/S^2 + scale/R^2) for variance: the same for scale 0 and 1 alone.
    """
    process, n, last = PROCESS[kind], 64, 80.0
    denoiser, log_prob = gaussian_pair(process)
    label, cfg = jnp.zeros(n, int), config.Sample(method="heun", steps=120)
    sample_keys = keys(0, "sample", jnp.arange(n))

    @jax.jit
    def draw(scale):
        guided = guidance.by_classifier(denoiser, log_prob, label, scale, process)
        return sampler.sample(process, cfg, guided, sample_keys, (1, 1, 1))

    begin = np.asarray(sampler.start(last, sample_keys, (1, 1, 1)), np.float64).ravel()
    share = PRIOR_STD**2 / (PRIOR_STD**2 + NOISE_STD**2)
    mean, var = PRIOR_MEAN + share * (SEEN - PRIOR_MEAN), share * NOISE_STD**2

    def slope(s, u):
        away, towards = (u - PRIOR_MEAN) / (PRIOR_STD**2 + s**2), (u - mean) / (var + s**2)
        return s * ((1 - scale) * away + scale * towards)

    exact = solve_ivp(slope, (last, 0.0), begin, rtol=1e-9, atol=1e-11).y[:, -1]
    made = np.asarray(draw(scale)).ravel()
    np.testing.assert_allclose(made, exact, atol=5e-3)

    shrink = np.polyfit(begin / last, made, 1)[0]
    assert shrink == pytest.approx(PRIOR_STD ** (1 - scale) * var ** (scale / 2), rel=0.01)
    power = (1 / PRIOR_STD**2 + scale / NOISE_STD**2) ** -0.5
    assert (abs(shrink / power - 1) < 0.01) == (scale == 1)


def run_steps(process, cfg, denoiser, log_prob, sample_keys, label, scale, shape=(1, 1, 1)):
    """The stepwise form with its step compiled."""
    traces = []

    def advance(walk, when, label, scale, last):
        traces.append(last)
        return stepwise.advance(
            process, cfg, denoiser, log_prob, walk, when, sample_keys, label, scale, last=last
        )

    step = jax.jit(advance, static_argnames="last")
    walk = stepwise.begin(process, cfg, sample_keys, shape)
    for when, last in stepwise.whens(process, cfg):
        walk = step(walk, when, label, scale, last=last)
    return walk, traces


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_the_scan(method):
    """One step at a time, as a scan of steps, and the sampler given a guided denoiser: one result."""
    process, n = PROCESS["vp_cosine"], 6
    fields = {"heun": {"churn": 3.0}, "ddim": {"eta": 0.5}}.get(method, {})
    cfg = config.Sample(method=method, steps=7, **fields)
    sample_keys, label, scale = keys(0, "sample", jnp.arange(n)), jnp.arange(n) % 3, jnp.float32(2.0)
    pair = mixture(process), classifier(process)

    @jax.jit
    def by_sampler():
        guided = guidance.by_classifier(*pair, label, scale, process)
        return sampler.sample(process, cfg, guided, sample_keys, (1, 1, 1))

    @jax.jit
    def by_scan():
        def step(walk, when, last):
            return stepwise.advance(process, cfg, *pair, walk, when, sample_keys, label, scale, last=last)

        walk = stepwise.begin(process, cfg, sample_keys, (1, 1, 1))
        return stepwise.scan(step, walk, stepwise.whens(process, cfg))

    walk, traces = run_steps(process, cfg, *pair, sample_keys, label, scale)
    whole = by_scan()
    np.testing.assert_allclose(walk.state.u, by_sampler(), atol=3e-5)
    np.testing.assert_allclose(walk.state.u, whole.state.u, atol=3e-5)
    np.testing.assert_allclose(walk.gap, whole.gap, rtol=1e-4)
    assert traces == ([False] if method in ("euler", "ddim") else [False, True])
    assert float(walk.calls) == (2 * 7 - 1 if method == "heun" else 7)


def test_gap_is_the_mean_push_along_the_way():
    """Euler's walk redone in float64, with the push by finite differences."""
    process, n = PROCESS["ve"], 5
    cfg = config.Sample(method="euler", steps=8)
    sample_keys, label = keys(3, "sample", jnp.arange(n)), jnp.arange(n) % 3
    walk, _ = run_steps(
        process, cfg, mixture(process), classifier(process), sample_keys, label, jnp.float32(1.5)
    )
    grid = np.float64(sampler.grid_of(process, cfg))
    sigmas = 80 * grid**7
    u, pushes = np.asarray(sampler.start(80.0, sample_keys, (1, 1, 1)), np.float64).ravel(), []
    rows, h = np.arange(n), 1e-5

    def log_posterior(u, s):
        joint = log_densities(u, 1.0, s)
        return joint[rows, np.asarray(label)] - logsumexp(joint, axis=1)

    def score(u, s):
        return (logsumexp(log_densities(u + h, 1.0, s), 1) - logsumexp(log_densities(u - h, 1.0, s), 1)) / (
            2 * h
        )

    for s, target in pairwise(sigmas):
        slope = (log_posterior(u + h, s) - log_posterior(u - h, s)) / (2 * h)
        pushes.append(s * np.abs(slope))
        u = u - (target - s) * s * (score(u, s) + 1.5 * slope)
    np.testing.assert_allclose(np.ravel(walk.state.u), u, atol=2e-3)
    np.testing.assert_allclose(walk.gap, np.mean(pushes, 0), rtol=0.02)


# ------------------------------------------------------------------------------------------- contracts


def test_the_number_0_is_the_denoiser_itself():
    process = PROCESS["ve"]
    denoiser = mixture(process)
    for zero in (0, 0.0):
        assert (
            guidance.by_classifier(denoiser, classifier(process), jnp.zeros(3, int), zero, process)
            is denoiser
        )


def test_each_image_has_its_own_strength_and_class():
    process = PROCESS["flow"]
    xt, t, *_ = states("flow", 1.0, 4)
    pair = mixture(process), classifier(process)
    label, scale = jnp.array([0, 1, 2, 1]), jnp.float32([0.0, 0.5, 3.0, 0.5])
    made = jax.jit(lambda scale: guidance.by_classifier(*pair, label, scale, process)(xt, t).x0)(scale)

    @jax.jit
    def one(xt, label, scale):
        return guidance.by_classifier(*pair, label, scale, process)(xt, t[:1]).x0

    for i in range(4):
        alone = one(xt[i : i + 1], label[i : i + 1], scale[i])
        np.testing.assert_allclose(made[i : i + 1], alone, atol=1e-6)
    np.testing.assert_allclose(made[0], pair[0](xt[:1], t[:1]).x0[0], atol=1e-6)


def test_both_guidances_at_once():
    """A denoiser guided without a classifier is guided by one like any other."""
    process = PROCESS["ve"]
    xt, t, *_ = states("ve", 1.0, 4)

    def told(xt, t, cond):
        found = mixture(process)(xt, t)
        return process.from_x0(xt, found.x0 + 0.1 * cond[:, :, None, None], t)

    free = guidance.classifier_free(told, jnp.zeros((1, 1)), 2.0, process)
    both = guidance.by_classifier(free, classifier(process), jnp.ones(4, int), 1.5, process)
    plain = guidance.by_classifier(mixture(process), classifier(process), jnp.ones(4, int), 1.5, process)
    made = jax.jit(lambda: both(xt, t, jnp.ones((4, 1))).x0 - plain(xt, t).x0)()
    np.testing.assert_allclose(made, 0.2, atol=1e-5)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_bad_strengths_are_named(scale):
    process = PROCESS["ve"]
    with one_line(f"scale = {scale}", "0 (no guidance) or above"):
        guidance.by_classifier(mixture(process), classifier(process), jnp.zeros(1, int), scale, process)


def test_unrolled_heun_is_heun():
    process, cfg = PROCESS["ve"], config.Sample(method="heun", steps=5, churn=4.0)
    sample_keys = keys(1, "sample", jnp.arange(4))
    walk, _ = run_steps(
        process, cfg, mixture(process), classifier(process), sample_keys, jnp.zeros(4, int), jnp.float32(0.0)
    )
    plain = jax.jit(lambda: sampler.sample(process, cfg, mixture(process), sample_keys, (1, 1, 1)))()
    np.testing.assert_allclose(walk.state.u, plain, atol=2e-5)
