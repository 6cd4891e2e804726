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
import pytest
from scipy.stats import norm

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import Model
from mdiff.objectives import ambient
from mdiff.objectives import denoise as plain
from mdiff.process.laws import VarianceExploding

SD = 0.5
WEIGHTS = ("edm", "x0", "inverse_variance")
KEY = key(0, "test")  # the closed-form denoisers below have no dropout


def fixed(d):
    """A denoiser that answers `d` whatever it is shown."""
    return lambda x, sigma, dropout_key: jnp.broadcast_to(jnp.float32(d), x.shape)


def lam64(sigma):
    """EDM's weight from its other form, 1/sigma^2 + 1/sd^2."""
    return 1 / sigma**2 + 1 / SD**2


def loss_of(denoise, x, y, sigma, eps, cfg):
    return ambient.ambient_loss(
        denoise, jnp.float32(x), jnp.float32(y), jnp.float32(sigma), jnp.float32(eps), cfg, SD, KEY
    )


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
    got = plain.denoising_loss(
        lambda xt, s, k: 0.3 * xt + s[:, None, None, None],
        jnp.float32(x), jnp.float32(sigma), jnp.float32(eps), SD, KEY,
    )  # fmt: skip
    assert got.shape == (7,)
    for i, s in enumerate(sigma):
        residual = 0.3 * (x[i] + s * eps[i]) + s - x[i]
        assert float(got[i]) == pytest.approx(lam64(s) * np.mean(residual**2), rel=2e-5)


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
    cfg = config.Loss(cutoff=0.0)
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
    cfg = config.Loss(cutoff=0.3)
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
    sigma, eps, _ = plain.draw(KEY, jnp.zeros((100_000, 1, 1, 1)), config.Loss())
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

            return ambient.ambient_loss(
                denoise, nan, draws[0], jnp.full(samples, sigma), draws[1], cfg, SD, KEY
            ).mean()

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
            losses = ambient.ambient_loss(fixed(d), jnp.full(y.shape, jnp.nan), jnp.float32(y),
                                          jnp.full(points, sigma), eps, cfg, SD, KEY)  # fmt: skip
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
    for tn in (0.0021, 0.4, 79.0):
        edge = np.float32(tn)
        ulps = [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(100))]
        sigma = np.concatenate([ulps, np.geomspace(1e-3, 1e3, 40).astype(np.float32)])
        shape = (len(sigma), *x.shape)
        images = [jnp.broadcast_to(v, shape) for v in (x, x + edge * n, eps)]
        cfg = config.Loss(cutoff=tn, weight=weight)

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
    ],
)
def test_bad_losses_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        ambient.check(config.Loss(**fields), config.Process())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    ambient.check(config.Loss(), config.Process())
    ambient.check(config.Loss(cutoff=0.4), config.Process())
