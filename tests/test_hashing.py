"""Perceptual hashes against scipy coefficient by coefficient, and on images changed on purpose."""

import numpy as np
import pytest
from scipy.fft import dct
from skimage.data import lfw_subset
from skimage.transform import resize

from mdiff.probes import hashing


@pytest.fixture(scope="module")
def faces():
    return np.uint8(np.round(lfw_subset()[:60, ..., None] * 255))


def brute(image):
    """The hash's bits of one 32 x 32 image in [-1, 1], by one-dimensional transforms."""
    grey = image.mean(-1) if image.shape[-1] != 3 else image @ [0.299, 0.587, 0.114]
    low = dct(dct(grey, axis=0, norm="ortho"), axis=1, norm="ortho")[1:9, 1:9].ravel()
    middle = np.sort(low)[31:33].mean()
    return [bool(c > middle) for c in low]


@pytest.mark.parametrize("channels", [1, 3])
def test_bits_are_those_of_scipy(channels):
    images = np.random.default_rng(0).uniform(-1, 1, (9, 32, 32, channels)).astype(np.float32)
    for code, image in zip(hashing.phash(images), images, strict=True):
        assert f"{code:064b}" == "".join("01"[b] for b in brute(np.float64(image)))


def test_hamming_counts_bits():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2**64, (2, 30), dtype=np.uint64)
    truth = [[f"{int(x) ^ int(y):b}".count("1") for y in b] for x in a]
    np.testing.assert_array_equal(hashing.hamming(a[:, None], b), truth)
    dist, index = hashing.nearest_hash(a, b)
    np.testing.assert_array_equal(dist, np.min(truth, 1))
    np.testing.assert_array_equal(index, np.argmin(truth, 1))
    dist, index = hashing.nearest_hash(a, b, a[::-1].copy())
    assert (dist == 0).all()
    np.testing.assert_array_equal(index, np.arange(30)[::-1])
    dist, index = hashing.nearest_hash(a, np.repeat(a[:1], 5))
    assert (index == 0).all()


def test_versions_of_an_image_are_near_and_others_are_not(faces):
    codes = hashing.phash(faces)
    rng = np.random.default_rng(2)
    versions = {
        "brighter": np.clip(faces * 1.15 + 10, 0, 255),
        "noisy": np.clip(faces + 6 * rng.normal(size=faces.shape), 0, 255),
        "larger": resize(faces / 255, (len(faces), 64, 64, 1), order=1) * 255,
        "colour": np.repeat(faces, 3, -1),
    }
    others = hashing.hamming(codes[:, None], codes)[np.triu_indices(60, 1)]
    assert 28 <= np.median(others) <= 34
    for name, images in versions.items():
        away = hashing.hamming(codes, hashing.phash(np.uint8(np.round(images))))
        assert np.median(away) <= 6, name
        assert np.quantile(away, 0.9) < np.quantile(others, 0.01), name


def test_a_mirrored_image_has_every_odd_column_inverted(faces):
    # DCT coefficients of odd horizontal order change sign; the hash is not blind to that
    away = hashing.hamming(hashing.phash(faces), hashing.phash(faces[:, :, ::-1]))
    assert np.median(away) >= 16


def test_flat_and_symmetric_images_have_one_hash():
    flat = [hashing.phash(np.full((1, 20, 20, 3), v, np.float32))[0] for v in (-1, -0.3, 0.0, 0.7)]
    assert len(set(flat)) == 1
    half = np.random.default_rng(3).uniform(-1, 1, (8, 32, 16, 1))
    even = np.concatenate([half, half[:, :, ::-1]], 2).astype(np.float32)
    np.testing.assert_array_equal(hashing.phash(even), hashing.phash(even[:, :, ::-1]))


@pytest.mark.parametrize("size", [4, 8, 25, 96])
def test_any_size_has_a_hash(size):
    images = np.random.default_rng(4).integers(0, 256, (5, size, size, 1)).astype(np.uint8)
    assert len(np.unique(hashing.phash(images))) == 5
