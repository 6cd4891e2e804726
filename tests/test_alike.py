"""SSIM and MS-SSIM against loops in float64, scikit-image, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from mdiff.errors import UserError
from mdiff.nemo import Similarity
from mdiff.probes import alike

SMALL = Similarity(window=5, deviation=1.0)
MULTI = Similarity(measure="ms_ssim", window=5, deviation=1.0, betas=(0.5, 0.3, 0.2))


def maps(n=3, size=20, seed=0):
    """[n,size,size,2] that are alike: noise on common waves."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(size)[:, None, None] / 3) * np.cos(np.arange(size)[None, :, None] / 2)
    return (wave + 0.4 * rng.normal(size=(n, size, size, 2))).astype(np.float32)


def stretched(x):
    low, high = x.min((0, 1), keepdims=True), x.max((0, 1), keepdims=True)
    return ((x - low) / (high - low)).astype(np.float64)


def factors(a, b, cfg):
    """(SSIM, contrast-structure) of two maps in [0, 1], window by window."""
    half = np.arange(cfg.window) - cfg.window // 2
    w = np.exp(-(half[:, None] ** 2 + half[None] ** 2) / (2 * cfg.deviation**2))
    w /= w.sum()
    whole, contrast = [], []
    for channel in range(a.shape[-1]):
        for i in range(a.shape[0] - cfg.window + 1):
            for j in range(a.shape[1] - cfg.window + 1):
                x, y = (m[i : i + cfg.window, j : j + cfg.window, channel] for m in (a, b))
                mx, my = (w * x).sum(), (w * y).sum()
                vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
                cov = (w * (x - mx) * (y - my)).sum()
                contrast.append((2 * cov + 9e-4) / (vx + vy + 9e-4))
                whole.append(contrast[-1] * (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4))
    return np.mean(whole), np.mean(contrast)


def multi(a, b, cfg):
    out = 1.0
    for k, beta in enumerate(cfg.betas):
        whole, contrast = factors(a, b, cfg)
        out *= max(whole if k == len(cfg.betas) - 1 else contrast, 0) ** beta
        a, b = (x.reshape(len(x) // 2, 2, len(x) // 2, 2, -1).mean((1, 3)) for x in (a, b))
    return out


def test_both_measures_window_by_window():
    x = maps()
    for i, j in ((0, 1), (1, 2)):
        a, b = stretched(x[i]), stretched(x[j])
        assert float(alike.similarity(x[i], x[j], SMALL)) == pytest.approx(factors(a, b, SMALL)[0], abs=2e-5)
        big = maps(size=24, seed=1)
        a, b = stretched(big[i]), stretched(big[j])
        assert float(alike.similarity(big[i], big[j], MULTI)) == pytest.approx(multi(a, b, MULTI), abs=2e-5)


def test_images_as_scikit_image_does():
    """Its mean is over all pixels with reflected borders; on maps that repeat beyond the border both agree inside."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 40, 40, 3))
    _, full = structural_similarity(
        a,
        b,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=-1,
        full=True,
    )
    inside = full[5:-5, 5:-5].mean()
    got = alike.images(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), Similarity())
    assert float(got) == pytest.approx(inside, abs=2e-5)


def test_equal_inverted_and_constant_maps():
    x = maps()[0]
    assert float(alike.similarity(x, x, SMALL)) == pytest.approx(1, abs=1e-6)
    assert float(alike.similarity(x, 5 * x - 2, SMALL)) == pytest.approx(1, abs=1e-5)  # scaled away
    assert float(alike.similarity(x, -x, SMALL)) < 0 <= float(alike.similarity(x[:20], -x[:20], MULTI))
    flat = np.zeros_like(x)
    assert float(alike.similarity(flat, flat + 3, SMALL)) == pytest.approx(1)
    gradient = jax.grad(lambda y: alike.similarity(x, y, SMALL))(jnp.asarray(flat))
    assert np.isfinite(gradient).all()


def test_scaling_by_channel_or_by_image():
    x = maps()[:2] * np.array([1.0, 9.0], np.float32)
    by_channel = alike.scaled(x, SMALL)
    assert np.asarray(by_channel.max((1, 2))) == pytest.approx(1) and np.asarray(
        by_channel.min((1, 2))
    ) == pytest.approx(0)
    by_image = alike.scaled(x, Similarity(scaling="image"))
    assert np.asarray(by_image.max((1, 2, 3))) == pytest.approx(1) and float(by_image[0, ..., 0].max()) < 0.8


def test_a_score_does_not_depend_on_its_batch():
    x = maps(4)
    alone = [float(alike.similarity(x[0], y, SMALL)) for y in x]
    wild = np.concatenate([x, 1e3 * maps(1, seed=5)])
    together = alike.similarity(x[:1], wild, SMALL)
    assert np.asarray(together[:4]) == pytest.approx(alone, abs=1e-6)
    square = alike.pairs(jnp.asarray(x), SMALL)
    assert np.asarray(square[0]) == pytest.approx(alone, abs=1e-5) and np.asarray(square) == pytest.approx(
        np.asarray(square.T), abs=1e-5
    )


@pytest.mark.parametrize("cfg", [SMALL, MULTI], ids=["ssim", "ms_ssim"])
def test_slopes_are_those_of_finite_differences(cfg):
    a, b = maps(size=24)[:2]
    towards = np.random.default_rng(3).normal(size=b.shape).astype(np.float32)
    slope = float(jnp.sum(jax.grad(lambda y: alike.similarity(a, y, cfg))(jnp.asarray(b)) * towards))
    step = 1e-2
    up, down = (float(alike.similarity(a, b + s * step * towards, cfg)) for s in (1, -1))
    assert slope == pytest.approx((up - down) / (2 * step), rel=0.02)


@pytest.mark.parametrize(
    ("cfg", "size", "message"),
    [
        (Similarity(measure="ms_ssim"), 32, r"window = 11: does not fit maps of 8 pixels.*a window of 7"),
        (Similarity(), 8, "a window of 7"),
        (Similarity(window=4), 32, "must be odd"),
        (Similarity(deviation=0.0), 32, "above 0"),
        (Similarity(measure="ms_ssim", betas=()), 32, "one exponent"),
    ],
)
def test_settings_that_do_not_fit(cfg, size, message):
    with pytest.raises(UserError, match=message):
        alike.check(cfg, size, size)


def test_the_released_settings_need_41_pixels_or_more():
    with pytest.raises(UserError):
        alike.check(Similarity(measure="ms_ssim"), 40, 40)
    alike.check(Similarity(measure="ms_ssim"), 44, 44)
