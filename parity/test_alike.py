"""SSIM and MS-SSIM of noise differences against torchmetrics (`make parity`; needs torch and torchmetrics, no torchvision).

torchmetrics derives the window from its deviation, mirrors images at their borders, and counts the mirrored part in the mean
of SSIM (not in that of the contrast-structure factor). Ours uses windows inside the map alone: the crop of its full image.
"""

import jax
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from mdiff.nemo import Similarity
from mdiff.probes import alike

WINDOWS = {5: 0.7, 7: 0.8, 9: 1.0, 11: 1.5}
"""Window -> a deviation from which torchmetrics derives it."""
ALMOST_NONE = 1e-9


ours_of = jax.jit(alike.similarity, static_argnums=2)


def differences(seed, n, height, width, channels=3):
    """Two batches [n,h,w,c] of noise differences, each of its own offset and range, from nearly equal to hardly alike."""
    rng = np.random.default_rng(seed)
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    phase = rng.uniform(0, 6, (2, n, 1, 1, channels))
    a = np.sin(rows / 3 + phase[0]) * np.cos(columns / 2 + phase[1]) + 0.3 * rng.normal(
        size=(n, height, width, channels)
    )
    b = a + np.linspace(0.05, 1.5, n)[:, None, None, None] * rng.normal(size=a.shape)
    span, offset = rng.uniform(0.2, 9, (2, n, 1, 1, channels)), rng.normal(0, 3, (2, n, 1, 1, channels))
    return np.float32(span[0] * a + offset[0]), np.float32(span[1] * b + offset[1])


def stretched(x, scaling="channel"):
    """Images and channels, or images, by themselves to [0, 1], in float64."""
    out = np.empty(x.shape)
    for i, image in enumerate(np.float64(x)):
        parts = range(image.shape[-1]) if scaling == "channel" else [slice(None)]
        for part in parts:
            one = image[..., part]
            out[i][..., part] = (one - one.min()) / np.ptp(one)
    return out


def tensor(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def inner(a, b, window):
    """torchmetrics' SSIM [n], where the window lies inside the map."""
    options = {"data_range": 1.0, "sigma": WINDOWS[window], "reduction": "none", "return_full_image": True}
    _, full = structural_similarity_index_measure(tensor(a), tensor(b), **options)
    cut = slice(window // 2, -(window // 2))
    return full[..., cut, cut].mean((1, 2, 3)).numpy()


def multiscale(a, b, betas, window=11):
    options = {"data_range": 1.0, "sigma": WINDOWS[window], "kernel_size": window, "reduction": "none"}
    return multiscale_structural_similarity_index_measure(
        tensor(a), tensor(b), betas=betas, normalize="relu", **options
    ).numpy()


def halved(x, times):
    for _ in range(times):
        x = np.moveaxis(torch.nn.functional.avg_pool2d(tensor(x), 2).numpy(), 1, -1)
    return x


def differ(scores):
    """So that agreement means something."""
    assert np.ptp(scores) > 0.1


@pytest.mark.parametrize("scaling", ["channel", "image"])
@pytest.mark.parametrize(
    ("height", "width", "window"), [(11, 11, 11), (32, 32, 11), (33, 20, 11), (64, 64, 11), (32, 32, 7), (8, 9, 5)]
)  # fmt: skip
def test_ssim(height, width, window, scaling):
    a, b = differences(height + width, 6, height, width)
    cfg = Similarity(window=window, deviation=WINDOWS[window], scaling=scaling)
    ours, theirs = (
        ours_of(a, b, cfg),
        inner(stretched(a, scaling), stretched(b, scaling), window),
    )
    differ(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_pairs():
    maps = np.concatenate(differences(0, 3, 24, 24))
    ours = jax.jit(alike.pairs, static_argnums=1)(maps, Similarity())
    flat = stretched(maps)
    for i in range(6):
        theirs = inner(np.broadcast_to(flat[i], flat.shape), flat, 11)
        np.testing.assert_allclose(ours[i], theirs, atol=1e-4)


MULTI = [(64, 64, 3, 11), (71, 66, 3, 11), (45, 50, 3, 11), (32, 32, 2, 11), (35, 32, 3, 7), (32, 32, 3, 5)]


@pytest.mark.parametrize(("height", "width", "scales", "window"), MULTI)
def test_ms_ssim(height, width, scales, window):
    """NeMo's equal exponents: torchmetrics' whole, its coarsest SSIM taken out, and put in again without the borders."""
    a, b = differences(height * width, 6, height, width)
    beta = 1 / scales
    cfg = Similarity(measure="ms_ssim", window=window, deviation=WINDOWS[window], betas=(beta,) * scales)
    ours = np.asarray(ours_of(a, b, cfg))
    a, b = stretched(a), stretched(b)
    factors = multiscale(a, b, (*[beta] * (scales - 1), ALMOST_NONE), window)
    coarsest = np.maximum(inner(halved(a, scales - 1), halved(b, scales - 1), window), 0)
    theirs = factors * coarsest**beta
    differ(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("betas", [(0.5, 0.3, ALMOST_NONE), (0.1, 0.8, ALMOST_NONE), (0.7, ALMOST_NONE)])
def test_ms_ssim_as_torchmetrics_gives_it(betas):
    """With next to no exponent on the coarsest scale, the one that counts borders, the definitions are the same."""
    a, b = differences(7, 6, 64, 52)
    theirs = multiscale(stretched(a), stretched(b), betas)
    differ(theirs)
    ours = ours_of(a, b, Similarity(measure="ms_ssim", betas=betas))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_inverted_maps_are_0_in_ms_ssim_and_below_it_in_ssim():
    a, _ = differences(9, 2, 48, 48)
    theirs = multiscale(stretched(a), stretched(-a), (1 / 3, 1 / 3, 1 / 3))
    ours = ours_of(a, -a, Similarity(measure="ms_ssim"))
    np.testing.assert_array_equal(theirs, 0)
    np.testing.assert_array_equal(ours, 0)
    negative = inner(stretched(a), stretched(-a), 11)
    assert negative.max() < -0.1
    np.testing.assert_allclose(ours_of(a, -a, Similarity()), negative, atol=1e-4)
