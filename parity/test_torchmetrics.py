"""Image and set measures against torchmetrics (`make parity`; needs torch and torchmetrics, no torchvision)."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from mdiff.probes import frechet, quality, structure


class Rows(torch.nn.Module):
    """Features that are given already."""

    def __init__(self, size):
        super().__init__()
        self.num_features = size

    def forward(self, x):
        return x.reshape(len(x), -1)


def rows(seed, n, size, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(size, size))
    return np.float64(rng.normal(shift, 1, (n, size)) @ mix)


def images(seed, n, size, channels):
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (n, size // 4, size // 4, channels))
    a = np.kron(coarse, np.ones((1, 4, 4, 1)))
    b = np.clip(a + np.linspace(0.02, 0.4, n)[:, None, None, None] * rng.normal(size=a.shape), 0, 1)
    return np.float32(a), np.float32(b)


def tensor(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


@pytest.mark.parametrize(("n", "m", "size"), [(200, 150, 8), (300, 300, 64), (40, 50, 64)])
def test_frechet_distance(n, m, size):
    a, b = rows(0, n, size), rows(1, m, size, 0.3)
    theirs = FrechetInceptionDistance(feature=Rows(size))
    theirs.update(torch.from_numpy(b), real=True)
    theirs.update(torch.from_numpy(a), real=False)
    # in rank-deficient cases their complex roots of rounding errors add up; ours are cut
    assert frechet.frechet_distance(a, b) == pytest.approx(
        theirs.compute().item(), rel=1e-3 if m < size else 1e-6
    )


def test_kid():
    a, b = rows(2, 120, 16), rows(3, 120, 16, 0.2)
    theirs = KernelInceptionDistance(feature=Rows(16), subsets=1, subset_size=120)
    theirs.update(torch.from_numpy(b), real=True)
    theirs.update(torch.from_numpy(a), real=False)
    ours = quality.polynomial(a, b)(np.ones((1, 120)), np.ones((1, 120)))[0]
    assert ours == pytest.approx(theirs.compute()[0].item(), rel=1e-4)


def inner(a, b):
    """torchmetrics' SSIM where the window lies inside the image; its own mean also counts reflected borders."""
    _, whole = structural_similarity_index_measure(
        tensor(a), tensor(b), data_range=1.0, reduction="none", return_full_image=True
    )
    return whole[..., 5:-5, 5:-5].mean((1, 2, 3)).numpy()


def contrast(a, b):
    """torchmetrics' contrast-structure factor, which leaves borders out."""
    options = {"data_range": 1.0, "reduction": "none", "return_contrast_sensitivity": True}
    return structural_similarity_index_measure(tensor(a), tensor(b), **options)[1].numpy()


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (64, 3)])
def test_ssim(size, channels):
    a, b = images(4, 8, size, channels)
    ours = structure.compare(2 * a - 1, 2 * b - 1).ssim
    np.testing.assert_allclose(ours, inner(a, b), atol=5e-5)


@pytest.mark.parametrize(("size", "count"), [(32, 2), (64, 3), (176, 5)])
def test_ms_ssim(size, count):
    a, b = images(5, 4, size, 3)
    exponents = np.array(structure.EXPONENTS[:count]) / sum(structure.EXPONENTS[:count])
    assert structure.scales(a.shape) == count
    ours = structure.compare(2 * a - 1, 2 * b - 1).ms_ssim
    options = {"betas": tuple(exponents), "data_range": 1.0, "reduction": "none", "normalize": "relu"}
    whole = multiscale_structural_similarity_index_measure(tensor(a), tensor(b), **options).numpy()
    np.testing.assert_allclose(ours, whole, atol=0.02)  # reflected borders of the coarsest scale
    theirs = 1.0
    for scale, exponent in enumerate(exponents):
        factor = inner(a, b) if scale == count - 1 else contrast(a, b)
        theirs = theirs * np.maximum(factor, 0) ** exponent
        a, b = (np.moveaxis(torch.nn.functional.avg_pool2d(tensor(x), 2).numpy(), 1, -1) for x in (a, b))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
