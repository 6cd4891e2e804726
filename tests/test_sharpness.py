"""Sharpness against hand-made images, scipy's transform in float64, and simulated coverage."""

import math

import jax
import numpy as np
import pytest
from scipy import fft, ndimage

from mdiff.probes import sharpness


def waves(ky, kx, size=8, channels=1):
    """One cosine of the transform: ky and kx half cycles along rows and columns."""
    y, x = (np.cos(np.pi * k * (np.arange(size) + 0.5) / size) for k in (ky, kx))
    return np.tile(np.outer(y, x)[None, :, :, None], (1, 1, 1, channels)).astype(np.float32)


def test_total_variation_by_hand():
    steps = np.zeros((3, 4, 4, 1), np.float32)
    steps[0, :, 2:] = 1.0  # an edge down the middle: 4 of 12 pairs along rows differ by 1
    steps[1, 2:] = -3.0  # one across it, of height 3
    found = np.asarray(sharpness.total_variation(steps))
    np.testing.assert_allclose(found, [4 / 12, 3 * 4 / 12, 0.0], rtol=1e-6)
    checks = np.indices((4, 4)).sum(0)[None, ..., None] % 2 * 2.0 - 1
    np.testing.assert_allclose(sharpness.total_variation(checks.astype(np.float32)), [4.0])


@pytest.mark.parametrize(
    ("ky", "kx", "high"),
    [(1, 0, 0), (4, 0, 0), (0, 4, 0), (5, 0, 1), (0, 5, 1), (3, 3, 1), (2, 3, 0), (7, 7, 1)],
)
def test_a_single_wave_is_high_or_not(ky, kx, high):
    """k half cycles over 8 pixels are k / 16 cycles per pixel; a quarter of a cycle is not above a quarter."""
    found, every = sharpness.energies(waves(ky, kx))
    np.testing.assert_allclose(found, high * np.asarray(every), atol=1e-6)


def test_energies_are_those_of_scipy_and_add_up_to_the_variance():
    x = np.random.default_rng(0).uniform(-1, 1, (5, 6, 10, 3)).astype(np.float32)
    high, every = jax.jit(sharpness.energies)(x)
    wave = fft.dctn(x.astype(np.float64), axes=(1, 2), norm="ortho") ** 2 / (6 * 10 * 3)
    far = [(i, j) for i in range(6) for j in range(10) if math.hypot(i / 12, j / 20) > 0.25]
    np.testing.assert_allclose(high, sum(wave[:, i, j].sum(-1) for i, j in far), rtol=1e-5)
    variance = np.mean([x[..., c].astype(np.float64).var(axis=(1, 2)) for c in range(3)], axis=0)
    np.testing.assert_allclose(every, variance, rtol=1e-5)


def test_blur_lowers_both_and_a_ramp_has_no_edge_at_its_border():
    x = np.random.default_rng(1).uniform(-1, 1, (20, 16, 16, 1)).astype(np.float32)
    soft = ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0))
    assert (
        np.asarray(sharpness.total_variation(soft)) < 0.3 * np.asarray(sharpness.total_variation(x))
    ).all()
    columns = [np.asarray(part) for each in (soft, x) for part in sharpness.energies(each)]
    assert sharpness.ratio_of_shares(*columns).high < 0.3
    ramp = np.tile(np.linspace(-1, 1, 16, dtype=np.float32)[None, :, None, None], (1, 1, 16, 1))
    high, every = sharpness.energies(ramp)
    assert high / every < 1e-3  # a Fourier transform finds 16 % there


def test_ratios_by_hand():
    found = sharpness.ratio(np.array([1.0, 3.0, 2.0]), np.array([2.0, 6.0, 4.0]))
    assert (found.value, found.low, found.high, found.n) == (
        0.5,
        0.5,
        0.5,
        3,
    )  # proportional: nothing is left open
    assert math.isnan(sharpness.ratio(np.ones(3), np.zeros(3)).value)
    part, whole = np.array([1.0, 3.0]), np.array([4.0, 12.0])
    assert sharpness.ratio_of_shares(part, whole, whole / 2, whole).value == pytest.approx(0.5)
    assert sharpness.ratio_of_shares(np.zeros(2), whole, part, whole).value == 0.0
    for zero in ((part, 0 * whole, part, whole), (part, whole, 0 * part, whole)):
        assert math.isnan(sharpness.ratio_of_shares(*zero).value)


def test_intervals_cover():
    """Of two sets of images whose true ratios are known; 12 images each, pairs correlated."""
    rng = np.random.default_rng(2)
    hits = np.zeros(3)
    for _ in range(2000):
        size = rng.gamma(8, 1 / 8, 12)  # what an image's columns have in common
        a, b, c, d = (size * rng.gamma(20, mean / 20, 12) for mean in (2.0, 4.0, 1.0, 3.0))
        hits += [
            each.low <= truth <= each.high
            for each, truth in (
                (sharpness.mean(a), 2.0),
                (sharpness.ratio(a, b), 0.5),
                (sharpness.ratio_of_shares(a, b, c, d), 1.5),
            )
        ]
    assert ((hits / 2000 > 0.92) & (hits / 2000 < 0.975)).all(), hits / 2000
