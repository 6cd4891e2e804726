"""Random features against torch-free loops, and spaces by name."""

import numpy as np
import pytest
from scipy.signal import correlate

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.features import random, spaces
from mdiff.types import to_float


def by_hand(image):
    """The network of one image [H,W,C], by scipy's correlation in float64."""
    x = np.float64(image)
    for kernel in random._kernels(image.shape[-1]):
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        x = np.stack(
            [correlate(padded, np.float64(kernel[..., c]), "valid")[..., 0] for c in range(kernel.shape[-1])],
            -1,
        )
        x = np.maximum(x, 0)
        height, width = (n // 2 for n in x.shape[:2])
        x = x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1).mean((1, 3))
    height, width = x.shape[0] // 2, x.shape[1] // 2
    quarters = (x[:height, :width], x[:height, width:], x[height:, :width], x[height:, width:])
    return np.concatenate([q.mean((0, 1)) for q in quarters])


@pytest.mark.parametrize("shape", [(16, 16, 1), (21, 18, 3)])
def test_random_features_are_convolutions(shape):
    images = np.random.default_rng(0).uniform(-1, 1, (3, *shape)).astype(np.float32)
    found = random.convolve(images)
    np.testing.assert_allclose(found, [by_hand(image) for image in images], atol=2e-5)
    assert found.shape == (3, 512)


def test_random_weights_are_fixed():
    # drawn by numpy's Philox of seed 0; a change here is a change of the space
    generator = np.random.Generator(np.random.Philox(0))
    first = generator.standard_normal((3, 3, 1, 32)) * np.sqrt(2 / 9)
    np.testing.assert_allclose(random._kernels(1)[0], first, rtol=1e-6)
    assert [k.shape for k in random._kernels(3)] == [(3, 3, 3, 32), (3, 3, 32, 64), (3, 3, 64, 128)]


def test_parts_and_types_do_not_matter(monkeypatch):
    images = np.random.default_rng(1).integers(0, 256, (11, 8, 8, 3)).astype(np.uint8)
    whole = random.convolve(images)
    monkeypatch.setattr(random, "_PIXELS", 4 * 64)
    np.testing.assert_allclose(random.convolve(to_float(images)), whole, atol=1e-5)
    assert np.isfinite(random.convolve(images[:, :1, :2])).all()  # maps of one pixel


def test_random_features_rank_changes_of_an_image():
    rng = np.random.default_rng(2)
    images = np.tanh(np.kron(rng.normal(size=(60, 4, 4)), np.ones((4, 4))))[..., None].astype(np.float32)
    space = random.RandomConv.fit(images, 16)
    assert space.name == "pca16-random"
    base = space(images)

    def away(other):
        return np.linalg.norm(space(np.float32(other)) - base, axis=1).mean()

    noise = rng.normal(size=images.shape)
    little, more = away(np.clip(images + 0.05 * noise, -1, 1)), away(np.clip(images + 0.4 * noise, -1, 1))
    assert 0 < little < more < away(images[::-1])


def test_spaces_by_name():
    rng = np.random.default_rng(3)
    train, heldout = rng.integers(0, 256, (2, 20, 8, 8, 1)).astype(np.uint8)
    for name, called in (("pixel", "pca6-pixel"), ("random", "pca6-random")):
        space = spaces.make_features(Audit(features=name, components=6), train, heldout)
        assert space.name == called
        assert space(train).shape == (20, 6)
        mixed = spaces.make_features(Audit(features=name, components=6), train, to_float(heldout))
        np.testing.assert_allclose(np.abs(mixed(train)), np.abs(space(train)), atol=1e-3)
    with pytest.raises(UserError, match=r"audit.features = 'inception': no such space; give pixel or random"):
        spaces.make_features(Audit(features="inception"), train)
    with pytest.raises(UserError, match="all 20 are equal"):
        spaces.make_features(Audit(features="random"), np.zeros((20, 8, 8, 1)))


def test_a_space_favours_neither_side():
    # fitted on equally many of both, however many there are
    rng = np.random.default_rng(4)
    train, heldout = rng.uniform(-1, 1, (90, 4, 4, 1)), rng.uniform(-1, 1, (30, 4, 4, 1))
    picked = np.concatenate([train[np.linspace(0, 89, 30).astype(int)], heldout])
    space = spaces.make_features(Audit(components=5), train, heldout)
    np.testing.assert_allclose(space.mean, np.float32(picked).mean(0).ravel(), atol=1e-6)
