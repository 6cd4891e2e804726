"""The losses against float64 numpy, closed-form posteriors and the theory of ambient training.

The reference formulas are written out here from the paper's notation: y = x0 + tn n, xt = y + sqrt(sigma^2
- tn^2) z, and E[y | xt] = (1 - tn^2/sigma^2) E[x0 | xt] + tn^2/sigma^2 xt.
"""

from dataclasses import replace
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import Model
from mdiff.nets.embeddings import Conditions, LevelUncertainty
from mdiff.objectives import ambient
from mdiff.objectives import denoise as plain
from mdiff.process.laws import VarianceExploding, make_process
from mdiff.process.times import make_times

SD = 0.5
WEIGHTS = ("edm", "x0", "inverse_variance")
KEY = key(0, "test")  # the closed-form denoisers below have no dropout


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Programs here run once: optimizing them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def fixed(d):
    """A denoiser that answers `d` whatever it is shown."""
    return lambda x, sigma, dropout_key: jnp.broadcast_to(jnp.float32(d), x.shape)


def lam64(sigma):
    """EDM's weight from its other form, 1/sigma^2 + 1/sd^2."""
    return 1 / sigma**2 + 1 / SD**2


def loss_of(denoise, x, y, sigma, eps, cfg, u=None):
    """The ambient loss per example."""
    x, y, sigma, eps = (jnp.float32(v) for v in (x, y, sigma, eps))
    error, a = ambient.routed_error(denoise, x, y, sigma, eps, cfg.cutoff, KEY)
    return ambient.weigh(error, a, plain.level_weight(sigma, cfg, SD), sigma, cfg, u)


def plain_loss(denoise, x, sigma, eps, cfg=config.Loss()):
    """The plain loss per example."""
    x, sigma, eps = (jnp.float32(v) for v in (x, sigma, eps))
    return plain.level_weight(sigma, cfg, SD) * plain.squared_error(denoise, x, sigma, eps, KEY)


def whole(loss: config.Loss, **fields) -> config.Config:
    return config.Config(loss=loss, **fields)


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(0)
    x, n, eps, d = rng.normal(size=(4, 7, 3, 3, 2))
    return x, n, eps, d


# ------------------------------------------------------------------------------- the plain loss


def test_edm_weight_makes_the_network_target_unit():
    sigma = np.geomspace(1e-3, 1e3, 30)
    got = np.asarray(plain.edm_weight(jnp.float32(sigma), SD), np.float64)
    np.testing.assert_allclose(got, lam64(sigma), rtol=1e-5)
    c_out = sigma * SD / np.sqrt(sigma**2 + SD**2)
    np.testing.assert_allclose(got * c_out**2, 1.0, rtol=1e-5)


def test_plain_loss_by_hand(numbers):
    x, _, eps, _ = numbers
    sigma = np.array([0.002, 0.03, 0.2, 0.5, 1.0, 7.0, 80.0])
    got = plain_loss(lambda xt, s, k: 0.3 * xt + s[:, None, None, None], x, sigma, eps)
    assert got.shape == (7,)
    for i, s in enumerate(sigma):
        residual = 0.3 * (x[i] + s * eps[i]) + s - x[i]
        assert float(got[i]) == pytest.approx(lam64(s) * np.mean(residual**2), rel=2e-5)


# ------------------------------------------------------------------------------- level weights

LAWS = {kind: make_process(config.Process(kind=kind)) for kind in ("ve", "vp_linear", "vp_cosine", "flow")}
LEVELS = ("edm", "x0", "eps", "v", "velocity", "min_snr")


def rates64(kind, sigma):
    """alpha and sigma of the process at noise level sigma, in float64 from their defining relation."""
    if kind == "ve":
        return np.ones_like(sigma), sigma
    if kind == "flow":  # alpha + sigma = 1
        return 1 / (1 + sigma), sigma / (1 + sigma)
    return 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)  # alpha^2 + sigma^2 = 1


CLAIMS = [
    *((kind, "eps") for kind in LAWS),
    *((kind, "x0") for kind in LAWS),
    ("vp_linear", "v"),
    ("vp_cosine", "v"),
    ("flow", "velocity"),
]


@pytest.mark.parametrize(("kind", "quantity"), CLAIMS)
def test_a_level_weight_is_the_error_of_its_quantity(kind, quantity, numbers):
    """weight * ||D - x0||^2 equals ||q^ - q||^2, q made from (x0, eps) and q^ from (D, xt) in the process."""
    x, _, eps, d = numbers
    sigma = np.array([0.004, 0.03, 0.2, 0.5, 1.0, 7.0, 60.0])
    loss = plain_loss(fixed(d), x, sigma, eps, config.Loss(level_weight=quantity))
    a, s = (v[:, None, None, None] for v in rates64(kind, sigma))
    xt = a * x + s * eps
    eps_hat = (xt - a * d) / s
    truth = {"eps": eps, "x0": x, "v": a * eps - s * x, "velocity": eps - x}[quantity]
    told = {"eps": eps_hat, "x0": d, "v": a * eps_hat - s * d, "velocity": eps_hat - d}[quantity]
    np.testing.assert_allclose(loss, np.mean((told - truth) ** 2, (1, 2, 3)), rtol=1e-4)
    # And as the process itself converts, in float32.
    process, t = LAWS[kind], LAWS[kind].time(jnp.float32(sigma))
    prediction = process.from_x0(jnp.float32(xt), jnp.float32(d), t)
    converted = {
        "eps": prediction.eps,
        "x0": prediction.x0,
        "v": process.v(prediction, t) if quantity == "v" else None,
        "velocity": process.velocity(prediction, t) if quantity == "velocity" else None,
    }[quantity]
    np.testing.assert_allclose(loss, np.mean((np.float64(converted) - truth) ** 2, (1, 2, 3)), rtol=2e-3)


def test_min_snr_caps_the_weight():
    sigma = np.array([0.01, 0.3, 1 / 5**0.5 * 1.001, 1.0, 10.0])
    got = plain.level_weight(jnp.float32(sigma), config.Loss(level_weight="min_snr", min_snr=5.0), SD)
    np.testing.assert_allclose(got, [5, 5, 5 / 1.001**2, 1, 0.01], rtol=1e-5)


# --------------------------------------------------------------------- the ambient loss, by hand


def reference_loss(x, y, sigma, eps, d, tn, weight, max_gain):
    """Per example in float64, straight from the definitions; weights in their x0-space form."""
    out = []
    for i, s in enumerate(sigma):
        if s < tn:
            out.append(lam64(s) * np.mean((d[i] - x[i]) ** 2))
            continue
        z_scale = np.sqrt(s**2 - tn**2)
        pseudo_target = y[i] - tn**2 / z_scale * eps[i]  # T: an unbiased noisy stand-in for x0
        a = 1 - tn**2 / s**2
        total = {
            "edm": lam64(s) * a**2,
            "x0": lam64(s) if 1 / a <= max_gain else 0.0,
            "inverse_variance": 1 / (1 / lam64(s) + tn**2 / a),
        }[weight]
        out.append(total * np.mean((d[i] - pseudo_target) ** 2))
    return np.array(out)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("tn", [0.1, 0.4, 3.0])
def test_ambient_loss_and_gradient_by_hand(numbers, weight, tn):
    x, n, eps, d = numbers
    y = np.float64(np.float32(x + tn * n))
    sigma = tn * np.array([0.05, 0.9, 1.02, 1.2, 2.0, 10.0, 100.0])
    cfg = config.Loss(cutoff=tn, weight=weight, max_gain=4.0)
    got = loss_of(fixed(d), x, y, sigma, eps, cfg)
    expected = reference_loss(x, y, sigma, eps, d, tn, weight, 4.0)
    assert got.shape == (7,)
    np.testing.assert_allclose(got, expected, rtol=2e-4)
    gradient = jax.grad(lambda d: loss_of(fixed(d), x, y, sigma, eps, cfg).sum())(jnp.float32(d))
    step = 1e-4
    for pixel in ((0, 1, 1, 0), (2, 0, 0, 0), (3, 0, 2, 1), (4, 2, 2, 1), (6, 1, 0, 1)):
        up, down = d.copy(), d.copy()
        up[pixel], down[pixel] = d[pixel] + step, d[pixel] - step
        slope = sum(
            sign * reference_loss(x, y, sigma, eps, at, tn, weight, 4.0)[pixel[0]]
            for sign, at in ((1, up), (-1, down))
        ) / (2 * step)
        assert float(gradient[pixel]) == pytest.approx(slope, rel=1e-3, abs=1e-6), pixel


def test_network_sees_the_right_input(numbers):
    """xt = x + sigma eps below; y + sqrt(sigma^2 - tn^2) eps at and above; sigma itself in both."""
    x, n, eps, _ = numbers
    tn, sigma = 0.5, np.array([0.1, 0.3, 0.4999, 0.5, 0.501, 2.0, 30.0])
    y, seen = x + tn * n, {}

    def spy(xt, s, dropout_key):
        seen["xt"], seen["sigma"] = xt, s
        return xt

    loss_of(spy, x, y, sigma, eps, config.Loss(cutoff=tn))
    for i, s in enumerate(sigma):
        expected = x[i] + s * eps[i] if s < tn else y[i] + np.sqrt(max(s**2 - tn**2, 0)) * eps[i]
        np.testing.assert_allclose(seen["xt"][i], expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(seen["sigma"], np.float32(sigma))
    # Total noise: tn n + sqrt(sigma^2 - tn^2) eps has standard deviation sigma.
    rng = np.random.default_rng(1)
    zero, noise, fresh = np.zeros((1, 400, 400, 1)), *rng.normal(size=(2, 1, 400, 400, 1))
    loss_of(spy, zero, tn * noise, np.array([0.8]), fresh, config.Loss(cutoff=tn))
    assert np.std(seen["xt"]) == pytest.approx(0.8, rel=0.01)


def test_losses_follow_their_examples(numbers):
    x, n, eps, _ = numbers
    sigma = np.array([0.1, 0.3, 0.5, 0.6, 1.0, 5.0, 60.0])
    cfg = config.Loss(cutoff=0.5)
    order = np.array([3, 0, 6, 2, 5, 1, 4])
    straight = loss_of(lambda xt, s, k: 0.5 * xt, x, x + 0.5 * n, sigma, eps, cfg)
    shuffled = loss_of(
        lambda xt, s, k: 0.5 * xt, x[order], (x + 0.5 * n)[order], sigma[order], eps[order], cfg
    )
    np.testing.assert_array_equal(shuffled, straight[order])


# --------------------------------------------------------------------------------- cutoff 0: EDM


class Tiny(nn.Module):
    """Two dense layers: the smallest network with the U-Net's call."""

    @nn.compact
    def __call__(self, x, c_noise, cond, train=False):
        scale = nn.Dense(1)(c_noise[:, None])[:, :, None, None]
        return nn.Dense(x.shape[-1])(x) * (1 + scale)


@pytest.fixture(scope="module")
def tiny():
    model = Model(Tiny(), None, VarianceExploding(), SD, (4, 4, 1))
    params = jax.jit(model.init)(key(0, "init"))
    x = jax.random.normal(key(0, "x"), (6, 4, 4, 1))
    batch = {"x": x, "id": jnp.arange(6), "y": x + 1.0}
    return model, params, batch


def test_cutoff_zero_is_edm_bit_for_bit(tiny):
    model, params, batch = tiny
    cfg = whole(config.Loss(cutoff=0.0))
    ours, theirs = ambient.make(model, cfg), plain.make(model, cfg)
    without = {name: batch[name] for name in ("x", "id")}
    # No noisy copy is needed, and one that is there is not touched.
    np.testing.assert_array_equal(
        jax.jit(ours)(params, KEY, batch)[0], jax.jit(theirs)(params, KEY, without)[0]
    )
    programs = [str(jax.make_jaxpr(f)(params, KEY, without)) for f in (ours, theirs)]
    assert programs[0] == programs[1]


def test_objective_is_its_loss_at_its_own_draws(tiny):
    """Same sigma in plain and ambient training, and each example routed by it."""
    model, params, batch = tiny
    cfg = whole(config.Loss(cutoff=0.3))
    loss, aux = jax.jit(ambient.make(model, cfg))(params, KEY, batch)
    loss_plain, aux_plain = jax.jit(plain.make(model, cfg))(params, KEY, batch)
    assert loss.shape == aux["sigma"].shape == (6,)
    np.testing.assert_array_equal(aux["sigma"], aux_plain["sigma"])
    np.testing.assert_array_equal(aux["above"], np.asarray(aux["sigma"]) >= np.float32(0.3))
    assert 0 < int(aux["above"].sum()) < 6
    below = ~np.asarray(aux["above"])
    np.testing.assert_allclose(loss[below], loss_plain[below], rtol=1e-5)
    assert not np.any(np.isclose(loss[~below], loss_plain[~below], rtol=1e-3))


def test_share_of_draws_above_the_cutoff():
    """ln sigma ~ N(-1.2, 1.2^2), independent of the noise."""
    times = make_times(config.Loss(), VarianceExploding(), config.Process())
    sigma, eps, drop, _ = plain.draw(KEY, jnp.zeros((100_000, 1, 1, 1)), times)
    assert drop is None
    for tn in (0.1, 0.4, 1.0, 4.0):
        share = norm.sf((np.log(tn) + 1.2) / 1.2)
        assert float((sigma >= tn).mean()) == pytest.approx(share, abs=0.006)
    assert abs(float(jnp.corrcoef(jnp.log(sigma), eps.ravel())[0, 1])) < 0.02


# -------------------------------------------------------------------------------------- theory


def test_the_posterior_means_have_no_residual():
    """T1: with D = E[x0 | xt] and y = E[y | xt] of a Gaussian mixture, a D + (1 - a) xt - y is 0."""
    rng = np.random.default_rng(0)
    means, stds, p = np.array([-0.7, 0.2, 0.9]), np.array([0.1, 0.3, 0.05]), np.array([0.2, 0.5, 0.3])
    tn, sigma = 0.4, np.geomspace(0.41, 40, 24)
    xt = rng.normal(size=24) * np.sqrt(sigma**2 + 0.4)
    total = stds**2 + sigma[:, None] ** 2  # variance of xt within each component
    logits = np.log(p) - 0.5 * np.log(total) - 0.5 * (xt[:, None] - means) ** 2 / total
    r = np.exp(logits - logits.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    off = xt[:, None] - means
    mean_x0 = (r * (means + stds**2 / total * off)).sum(1)
    mean_y = (r * (means + (stds**2 + tn**2) / total * off)).sum(1)
    eps = (xt - mean_y) / np.sqrt(sigma**2 - tn**2)
    image = (24, 1, 1, 1)
    cfg = config.Loss(cutoff=tn)
    args = np.zeros(image), mean_y.reshape(image), sigma, eps.reshape(image), cfg
    loss = loss_of(fixed(mean_x0.reshape(image)), *args)
    np.testing.assert_allclose(loss / lam64(sigma), 0.0, atol=1e-10)  # (1e-5)^2
    wrong = loss_of(fixed(mean_y.reshape(image)), *args)
    assert np.median(wrong / lam64(sigma)) > 1e-5


def test_pseudo_target_is_unbiased_with_the_stated_variance():
    """T4: at D = x0 the residual a (x0 - T) has variance a tn^2, no mean and no part along xt - x0."""
    rng = np.random.default_rng(0)
    tn, side = 0.6, 300
    x, n, z = rng.normal(size=(3, 1, side, side, 1))
    y = x + tn * n
    cfg = config.Loss(cutoff=tn)
    for sigma in (0.65, 1.5):
        a, s = 1 - tn**2 / sigma**2, np.array([sigma])
        loss = loss_of(fixed(x), x, y, s, z, cfg)
        assert float(loss[0]) / lam64(sigma) == pytest.approx(a * tn**2, rel=0.02)
        # d/dD of the loss is the residual, up to a known factor.
        gradient = np.asarray(
            jax.grad(lambda d, s=s: loss_of(fixed(d), x, y, s, z, cfg).sum())(jnp.float32(x))
        )
        stand_in = x - gradient * x.size / (2 * lam64(sigma) * a**2)  # T
        noise = tn * n + np.sqrt(sigma**2 - tn**2) * z
        spread = tn / np.sqrt(a) / side
        assert abs((stand_in - x).mean()) < 4 * spread
        assert abs(((stand_in - x) * noise).mean()) < 4 * spread * sigma


def test_linear_denoiser_learns_the_clean_covariance_from_noisy_copies():
    """T11: the minimiser over linear D = W xt is S (S + sigma^2)^-1, with the clean images all NaN."""
    rng = np.random.default_rng(0)
    mix = np.array([[0.8, 0.0, 0.0], [0.5, 0.3, 0.0], [-0.2, 0.1, 0.15]])
    covariance, tn, sigma, samples = mix @ mix.T, 0.5, 0.9, 50_000
    x = rng.normal(size=(samples, 3)) @ mix.T
    y, eps = x + tn * rng.normal(size=x.shape), rng.normal(size=x.shape)
    image = (samples, 1, 3, 1)
    draws = [jnp.float32(v.reshape(image)) for v in (y, eps)]
    nan = jnp.full(image, jnp.nan)
    for weight in WEIGHTS:
        cfg = config.Loss(cutoff=tn, weight=weight)

        def mean_loss(w, cfg=cfg):
            def denoise(xt, s, k):
                return (xt.reshape(samples, 3) @ w.reshape(3, 3).T).reshape(xt.shape)

            return loss_of(denoise, nan, draws[0], jnp.full(samples, sigma), draws[1], cfg).mean()

        gradient, hessian = jax.jit(lambda w, f=mean_loss: (jax.grad(f)(w), jax.hessian(f)(w)))(jnp.zeros(9))
        learned = -np.linalg.solve(np.asarray(hessian, np.float64), np.asarray(gradient)).reshape(3, 3)
        np.testing.assert_allclose(
            learned, covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(3)), atol=0.01
        )


def test_ideal_ambient_model_flows_to_noisy_copies_not_to_clean_images():
    """T6 (lemma 4.1): above the cutoff the loss's own minimiser carries noise to the y_i.

    The minimiser at xt is found from the loss itself: it is quadratic in D, so one Newton step from 0 on
    the posterior-weighted loss of all copies lands on it. The ODE is singular at the cutoff in sigma; it is
    solved in u = sqrt(sigma^2 - tn^2).
    """
    rng = np.random.default_rng(0)
    points, tn = 6, 1.0
    x = 0.5 * rng.normal(size=(points, 4, 4, 3))
    y = np.float64(np.float32(x + tn * rng.normal(size=x.shape)))
    cfg = config.Loss(cutoff=tn)

    @jax.jit
    def newton(xt, sigma, eps, posterior):
        def weighted(d):
            nan = jnp.full(y.shape, jnp.nan)
            losses = loss_of(fixed(d), nan, y, jnp.full(points, sigma), eps, cfg)
            return jnp.sum(posterior * losses)

        at_zero = jax.grad(weighted)(jnp.zeros(x.shape[1:]))
        curved = jax.grad(weighted)(jnp.ones(x.shape[1:])) - at_zero
        return -at_zero / curved

    def ideal(xt, sigma):
        u = np.sqrt(sigma**2 - tn**2)
        distance = ((xt - y) ** 2).sum((1, 2, 3))
        posterior = np.exp(-(distance - distance.min()) / (2 * u**2))
        return np.asarray(newton(xt, sigma, (xt - y) / u, posterior / posterior.sum()), np.float64)

    # Karras spacing in u; dx/du = (dx/dsigma)(dsigma/du) = (xt - D) / sigma * u / sigma.
    grid = np.linspace(80 ** (1 / 7), (1e-3 * tn) ** (1 / 7), 40) ** 7
    reached = set()
    for start in range(5):
        xt = 80 * np.random.default_rng(start).normal(size=x.shape[1:])
        for u, v in pairwise(grid):
            slope = [u / (u**2 + tn**2) * (xt - ideal(xt, np.hypot(u, tn)))]
            ahead = xt + (v - u) * slope[0]
            slope.append(v / (v**2 + tn**2) * (ahead - ideal(ahead, np.hypot(v, tn))))
            xt = xt + (v - u) * np.mean(slope, axis=0)
        to_noisy = np.sqrt(((xt - y) ** 2).mean((1, 2, 3)))
        to_clean = np.sqrt(((xt - x) ** 2).mean((1, 2, 3)))
        reached.add(int(to_noisy.argmin()))
        assert to_noisy.min() < 5e-3
        assert to_clean.min() > 0.7 * tn
    assert len(reached) > 1


# --------------------------------------------------------------------------------- every process

MEANS, STDS, SHARES = np.array([-0.7, 0.2, 0.9]), np.array([0.1, 0.3, 0.05]), np.array([0.2, 0.5, 0.3])


def posterior64(xt, alpha, sigma, extra=0.0):
    """E[x0 + extra * n | xt] of a mixture in a process's own units, where n is part of xt's noise.

    xt = alpha x0 + sigma eps. Within a component, x0 and alpha * extra * n + rest = sigma * eps are Gaussian, so the
    mean moves by covariance over variance: alpha (std^2 + extra^2) / (alpha^2 std^2 + sigma^2).
    """
    alpha = np.broadcast_to(alpha, sigma.shape)[:, None]
    total = (alpha * STDS) ** 2 + sigma[:, None] ** 2
    off = xt[:, None] - alpha * MEANS
    logits = np.log(SHARES) - 0.5 * np.log(total) - 0.5 * off**2 / total
    r = np.exp(logits - logits.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return (r * (MEANS + alpha * (STDS**2 + extra**2) / total * off)).sum(1)


class Oracle:
    """The exact posterior mean of the mixture in the place of a trained model."""

    def __init__(self, kind):
        self.kind, self.process, self.sigma_data, self.uncertainty, self.seen = kind, LAWS[kind], SD, None, {}

    def condition(self, params, batch, n=None, drop=None):
        return None

    def log_variance(self, params, sigma):
        return None

    def apply(self, params, xt, t, cond=None, dropout_key=None):
        level = np.float64(self.process.noise_level(t))
        alpha, sigma = rates64(self.kind, level)
        self.seen = {"xt": np.float64(xt).ravel(), "level": level}
        mean = posterior64(np.float64(xt).ravel(), alpha, sigma)
        return self.process.from_x0(xt, jnp.float32(mean.reshape(xt.shape)), t), {}


@pytest.mark.parametrize("kind", LAWS)
def test_ambient_training_is_exact_in_every_process(kind):
    """T1: E[y | xt] = a E[x0 | xt] + (1 - a) xt / alpha, and the loss of the exact model at E[y | xt] is 0."""
    rng = np.random.default_rng(0)
    tn, sigma = 0.4, np.geomspace(0.41, 40, 24)
    alpha, s = rates64(kind, sigma)
    u = rng.normal(size=24) * np.sqrt(sigma**2 + 0.4)  # states at unit signal scale
    mean_y = posterior64(alpha * u, alpha, s, extra=tn)
    a = 1 - tn**2 / sigma**2
    np.testing.assert_allclose(a * posterior64(alpha * u, alpha, s) + (1 - a) * u, mean_y, atol=1e-12)
    if kind.startswith("vp"):  # the variance-preserving paper's own form, for y_vp = alpha_n x0 + s_n n
        s_n = tn / np.sqrt(1 + tn**2)
        k0 = (s**2 - s_n**2) / (s**2 * np.sqrt(1 - s_n**2))
        k1 = s_n**2 / s**2 * np.sqrt((1 - s**2) / (1 - s_n**2))
        y_vp = k0 * posterior64(alpha * u, alpha, s) + k1 * alpha * u
        np.testing.assert_allclose(y_vp, np.sqrt(1 - s_n**2) * mean_y, atol=1e-12)
    oracle, image = Oracle(kind), (24, 1, 1, 1)
    denoise = plain.denoise_with(oracle, None, {})
    eps = ((u - mean_y) / np.sqrt(sigma**2 - tn**2)).reshape(image)
    cfg = config.Loss(cutoff=tn)
    loss = loss_of(denoise, np.zeros(image), mean_y.reshape(image), sigma, eps, cfg)
    np.testing.assert_allclose(oracle.seen["xt"], alpha * u, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(oracle.seen["level"], sigma, rtol=2e-4)
    np.testing.assert_allclose(loss / lam64(sigma), 0.0, atol=1e-8)  # (1e-4)^2: float32 times of the laws


def test_one_objective_in_all_processes(tiny):
    """EDM's preconditioning lives at unit signal scale, so the same weights have the same loss everywhere."""
    model, params, batch = tiny
    losses = {}
    for kind, process in LAWS.items():
        cfg = config.Config(process=config.Process(kind=kind), loss=config.Loss(cutoff=0.3))
        losses[kind], _ = jax.jit(ambient.make(replace(model, process=process), cfg))(params, KEY, batch)
    for kind in LAWS:
        np.testing.assert_allclose(losses[kind], losses["ve"], rtol=2e-3, err_msg=kind)
    assert np.std(losses["ve"]) > 0.01


# -------------------------------------------------------------------------- weights of the ambient loss


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_ambient_weights_are_relative_to_the_level_weight(level, weight, numbers):
    x, n, eps, d = numbers
    tn, sigma = 0.4, 0.4 * np.array([0.05, 0.9, 1.02, 1.2, 2.0, 10.0, 100.0])
    y = np.float64(np.float32(x + tn * n))
    cfg = config.Loss(cutoff=tn, weight=weight, level_weight=level)
    lam = {"edm": lam64(sigma), "x0": 1 + 0 * sigma, "eps": sigma**-2.0, "v": 1 + sigma**-2.0,
           "velocity": 1 + 2 / sigma + sigma**-2.0, "min_snr": np.where(sigma < 5**-0.5, 5.0, sigma**-2.0)}[level]  # fmt: skip
    got = loss_of(fixed(d), x, y, sigma, eps, cfg)
    for i, s in enumerate(sigma):
        if s < tn:
            expected = lam[i] * np.mean((d[i] - x[i]) ** 2)
        else:
            target = y[i] - tn**2 / np.sqrt(s**2 - tn**2) * eps[i]
            a = 1 - tn**2 / s**2
            factor = {
                "edm": lam[i] * a**2,
                "x0": lam[i] * (1 / a <= 4),
                "inverse_variance": 1 / (1 / lam[i] + tn**2 / a),
            }
            expected = factor[weight] * np.mean((d[i] - target) ** 2)
        assert float(got[i]) == pytest.approx(expected, rel=3e-4)


# -------------------------------------------------------------------------------- learned weights


def test_the_learned_weight_is_least_at_the_log_of_the_mean_loss():
    losses = jnp.float32(np.random.default_rng(0).gamma(2.0, 0.3, 1000))
    best = float(np.log(np.mean(np.float64(losses))))
    total = lambda u: float(plain.discount(losses, jnp.full(1000, u)).mean())  # noqa: E731
    assert total(best) == pytest.approx(1 + best, rel=1e-5)  # E[loss] / E[loss] + ln E[loss]
    for u in np.linspace(best - 2, best + 2, 41):
        if abs(u - best) > 0.01:
            assert total(u) > total(best)


class Zero(nn.Module):
    """A network that says nothing: D is c_skip xt, whose error is known."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        return jnp.zeros_like(x) * self.param("unused", nn.initializers.zeros, ())


@pytest.mark.parametrize("cutoff", [0.0, 0.5])
def test_the_learned_weight_finds_the_loss_of_each_level(cutoff):
    """u trained through the objective against ln of EDM's loss of D = c_skip xt, in closed form."""
    variance = 1.0
    model = Model(Zero(), None, VarianceExploding(), SD, (4, 4, 1), uncertainty=LevelUncertainty())
    cfg = whole(config.Loss(level_weight="learned", cutoff=cutoff, p_mean=-0.7, p_std=0.8))
    params = jax.jit(model.init)(key(0, "init"))
    objective, optimizer = ambient.make(model, cfg), optax.adam(optax.cosine_decay_schedule(0.05, 600))

    @jax.jit
    def step(carry, at):
        params, memory = carry
        x = variance**0.5 * jax.random.normal(key(0, "x", at), (256, 4, 4, 1))
        batch = {"x": x, "y": x + cutoff * jax.random.normal(key(0, "y", at), x.shape)}
        gradient = jax.grad(lambda p: objective(p, key(0, "train", at), batch)[0].mean())(params)
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(600))
    sigma = np.exp(np.linspace(-2.0, 0.6, 14))
    sigma = sigma[np.abs(np.log(sigma / max(cutoff, 1e-9))) > 0.15]  # u cannot follow the kink at the cutoff
    skip = SD**2 / (SD**2 + sigma**2)
    error = (1 - skip) ** 2 * variance + skip**2 * sigma**2
    if cutoff:  # a D + (1 - a) xt - y with xt = y + u z: coefficients of x0, n and z
        above = sigma >= cutoff
        a, z = 1 - cutoff**2 / sigma**2, np.sqrt(np.maximum(sigma**2 - cutoff**2, 0))
        k = a * skip + 1 - a
        error = np.where(above, (k - 1) ** 2 * (variance + cutoff**2) + k**2 * z**2, error)
    learned = model.log_variance(params, jnp.float32(sigma))
    np.testing.assert_allclose(learned, np.log(lam64(sigma) * error), atol=0.3)
    assert np.ptp(np.log(lam64(sigma) * error)) > 1


def test_a_draw_of_weight_zero_leaves_the_learned_weight_alone(numbers):
    x, n, eps, d = numbers
    sigma = 0.4 * np.array([0.5, 1.0, 1.1, 1.15, 1.2, 2.0, 9.0])  # the buffer of weight x0: up to 1.1547
    cfg = config.Loss(cutoff=0.4, weight="x0", level_weight="learned")
    loss = lambda u: loss_of(fixed(d), x, x + 0.4 * n, sigma, eps, cfg, u).sum()  # noqa: E731
    slope = jax.grad(loss)(jnp.full(7, 0.3))
    np.testing.assert_array_equal(np.asarray(slope) == 0, [False, True, True, True, False, False, False])
    weighted = loss_of(fixed(d), x, x + 0.4 * n, sigma, eps, replace(cfg, level_weight="edm"))
    expected = 1 - np.asarray(weighted) * np.exp(-0.3)  # d/du of l / e^u + u
    np.testing.assert_allclose(slope[np.array([0, 4, 5, 6])], expected[np.array([0, 4, 5, 6])], rtol=1e-4)


@pytest.mark.parametrize("cutoff", [0.0, 0.3])
@pytest.mark.parametrize("level", ["x0", "learned"])
def test_edms_loss_is_reported_beside_another(cutoff, level, tiny):
    model, params, batch = tiny
    reference, aux = jax.jit(ambient.make(model, whole(config.Loss(cutoff=cutoff))))(params, KEY, batch)
    assert "loss_edm" not in aux
    if level == "learned":
        model = replace(model, uncertainty=LevelUncertainty())
        params = {**params, "uncertainty": jax.jit(model.init)(key(0, "init"))["uncertainty"]}
    cfg = whole(config.Loss(cutoff=cutoff, level_weight=level))
    loss, aux = jax.jit(ambient.make(model, cfg))(params, KEY, batch)
    np.testing.assert_allclose(aux["loss_edm"], reference, rtol=1e-6)
    if level == "learned":  # u starts at 0
        np.testing.assert_allclose(loss, reference, rtol=1e-6)
    else:
        assert not np.any(np.isclose(loss, reference, rtol=1e-3))


# ------------------------------------------------------------------------------------- conditions


class Told(nn.Module):
    """A network that hears its condition."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        return nn.Dense(x.shape[-1])(x) + nn.Dense(x.shape[-1], name="c")(cond)[:, None, None, :]


@pytest.fixture(scope="module")
def told():
    """A model told of labels and augmentation, with parameters none of which are zero."""
    model = Model(Told(), Conditions(3, 0, True, 8), VarianceExploding(), SD, (4, 4, 1))
    params = jax.jit(model.init)(key(0, "init"))
    x = jax.random.normal(key(0, "x"), (64, 4, 4, 1))
    batch = {
        "x": x, "y": x + 0.3 * jax.random.normal(key(0, "n"), x.shape), "id": jnp.arange(64),
        "label": jnp.arange(64) % 3, "augment": jax.random.normal(key(0, "a"), (64, 9)),
    }  # fmt: skip
    return model, params, batch


def test_dropped_conditions_are_null_ones(told):
    model, params, batch = told
    net = config.Net(classes=3, condition_dropout=0.4)
    loss_cfg = config.Loss(cutoff=0.3)
    drops = jax.jit(ambient.make(model, whole(loss_cfg, net=net)))(params, KEY, batch)[0]
    keeps = jax.jit(ambient.make(model, whole(loss_cfg, net=replace(net, condition_dropout=0.0))))
    labelled = keeps(params, KEY, batch)[0]
    null = keeps(params, KEY, {name: batch[name] for name in batch if name != "label"})[0]
    is_null, is_labelled = np.isclose(drops, null, rtol=1e-6), np.isclose(drops, labelled, rtol=1e-6)
    assert np.all(is_null ^ is_labelled)
    assert 10 < is_null.sum() < 45
    many = plain.draw(
        KEY, jnp.zeros((20_000, 1, 1, 1)), make_times(loss_cfg, model.process, config.Process()), 0.4
    )
    assert float(many.drop.mean()) == pytest.approx(0.4, abs=0.015)
    high = np.asarray(many.sigma) > np.median(many.sigma)
    assert float(many.drop[high].mean()) == pytest.approx(0.4, abs=0.02)  # whatever the level


def test_augmentation_describes_the_clean_image_alone(told):
    """Below the cutoff the network is told how x was augmented; above it sees y, which was not."""
    model, params, batch = told
    cfg = whole(config.Loss(cutoff=0.3), net=config.Net(classes=3))
    objective = jax.jit(ambient.make(model, cfg))
    loss, aux = objective(params, KEY, batch)
    above = np.asarray(aux["above"])
    assert 10 < above.sum() < 54
    other, _ = objective(params, KEY, {**batch, "augment": batch["augment"] + 1.0})
    none, _ = objective(params, KEY, {name: batch[name] for name in batch if name != "augment"})
    np.testing.assert_array_equal(other[above], loss[above])
    np.testing.assert_allclose(none[above], loss[above], rtol=1e-6)
    assert not np.any(np.isclose(other[~above], loss[~above], rtol=1e-5))
    assert not np.any(np.isclose(none[~above], loss[~above], rtol=1e-5))


def test_the_share_above_the_cutoff_reaches_the_objective(told):
    model, params, batch = told
    cfg = whole(config.Loss(cutoff=2.0, share=0.5, stratified=True), net=config.Net(classes=3))
    _, aux = jax.jit(ambient.make(model, cfg))(params, KEY, batch)
    assert int(aux["above"].sum()) in (31, 32, 33)  # the law alone: 6 %


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (
            whole(config.Loss(), net=config.Net(classes=3, condition_dropout=1.0)),
            "net.condition_dropout = 1.0",
        ),
        (whole(config.Loss(), net=config.Net(classes=3, condition_dropout=-0.1)), "must be in [0, 1)"),
        (whole(config.Loss(), net=config.Net(condition_dropout=0.1)), "has no condition"),
        (whole(config.Loss(level_weight="learned")), "the model has no learned weight"),
        (whole(config.Loss(cutoff=0.3, level_weight="learned")), "the model has no learned weight"),
        (whole(config.Loss(share=0.5)), "loss.share = 0.5"),
    ],
)
def test_bad_objectives_are_named(cfg, words, told):
    with pytest.raises(UserError) as caught:
        ambient.make(told[0], cfg)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------ routing and finiteness


@pytest.mark.parametrize("weight", WEIGHTS)
def test_each_branch_is_blind_to_the_others_images(weight, numbers):
    """T9, at the boundary: sigma < cutoff reads x alone, sigma >= cutoff reads y alone."""
    x, n, eps, _ = (jnp.float32(v) for v in numbers)
    tn = np.float32(0.4)
    edge = [np.nextafter(tn, np.float32(0)), tn, np.nextafter(tn, np.float32(1))]
    sigma = np.array([0.01, 0.3, *edge, 0.9, 50.0], np.float32)
    above = np.array([False, False, False, True, True, True, True])
    cfg = config.Loss(cutoff=0.4, weight=weight)
    y = x + 0.4 * n

    def loss(x, y):
        return loss_of(lambda xt, s, k: jnp.tanh(xt), x, y, sigma, eps, cfg)

    by_x, by_y = jax.jit(jax.grad(lambda x, y: loss(x, y).sum(), (0, 1)))(x, y)
    np.testing.assert_array_equal(by_x[above], 0.0)
    np.testing.assert_array_equal(by_y[~above], 0.0)
    assert np.all(np.abs(by_x[~above]).max((1, 2, 3)) > 0)
    assert np.all(np.abs(by_y[5:]).max((1, 2, 3)) > 0)
    # And by value: what a branch must not read may be NaN.
    mask = above[:, None, None, None]
    got = jax.jit(loss)(jnp.where(mask, jnp.nan, x), jnp.where(mask, y, jnp.nan))
    np.testing.assert_array_equal(got, jax.jit(loss)(x, y))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_finite_at_every_noise_level(weight, numbers):
    """T10: loss and gradients in parameters, images and sigma, eager and compiled."""
    x, n, eps, _ = (np.float32(v[0]) for v in numbers)
    for tn, level in ((0.0021, "velocity"), (0.4, "edm"), (79.0, "min_snr")):
        edge = np.float32(tn)
        ulps = [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(100))]
        sigma = np.concatenate([ulps, np.geomspace(1e-3, 1e3, 40).astype(np.float32)])
        shape = (len(sigma), *x.shape)
        images = [jnp.broadcast_to(v, shape) for v in (x, x + edge * n, eps)]
        cfg = config.Loss(cutoff=tn, weight=weight, level_weight=level)

        def loss(scale, x, y, sigma, images=images, cfg=cfg):
            return loss_of(lambda xt, s, k: scale * xt, x, y, sigma, images[2], cfg)

        def total(*args, loss=loss):
            return loss(*args).sum()

        args = (jnp.float32(0.7), images[0], images[1], jnp.float32(sigma))
        for run in (loss, jax.jit(loss)) if tn == 0.4 else (jax.jit(loss),):
            values = np.asarray(run(*args))
            assert np.all(np.isfinite(values)) and np.all(values >= 0)
            assert values[1] == 0.0  # at the cutoff the copy itself is shown and asked for
            assert values[0] > 0
        for leaf in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1, 2, 3)))(*args)):
            assert np.all(np.isfinite(leaf))


def test_buffer_weighs_zero_and_never_falls_back(numbers):
    x, n, eps, d = numbers
    tn = 0.4
    sigma = tn * np.array([1.0, 1.1, 1.154, 1.155, 1.2, 2.0, 9.0])  # 1/a = 4 at sqrt(4/3) = 1.1547
    cfg = config.Loss(cutoff=tn, weight="x0", max_gain=4.0)
    loss = loss_of(fixed(d), x, x + tn * n, sigma, eps, cfg)
    np.testing.assert_array_equal(np.asarray(loss) > 0, [False, False, False, True, True, True, True])
    wider = loss_of(fixed(d), x, x + tn * n, sigma, eps, replace(cfg, max_gain=10.0))
    np.testing.assert_array_equal(np.asarray(wider) > 0, [False, True, True, True, True, True, True])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cutoff": 0.001}, "loss.cutoff = 0.001"),
        ({"cutoff": 80.0}, "loss.cutoff = 80.0"),
        ({"cutoff": -1.0}, "loss.cutoff = -1.0"),
        ({"cutoff": float("nan")}, "loss.cutoff = nan"),
        ({"p_std": 0.0}, "loss.p_std = 0.0"),
        ({"max_gain": 1.0}, "loss.max_gain = 1.0"),
        ({"min_snr": 0.0}, "loss.min_snr = 0.0"),
    ],
)
def test_bad_losses_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        ambient.check(config.Loss(**fields), config.Process())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    ambient.check(config.Loss(), config.Process())
    ambient.check(config.Loss(cutoff=0.4), config.Process())
