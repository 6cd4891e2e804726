"""SSIM against scikit-image, MS-SSIM against a float64 formula of its own, worst tiles against loops."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from mdiff.probes import structure, tiles
from mdiff.types import to_float


def pairs(seed, n=6, size=32, channels=3, noise=0.2):
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (n, -(-size // 4), -(-size // 4), channels))
    a = np.kron(coarse, np.ones((1, 4, 4, 1)))[:, :size, :size]
    levels = noise * np.linspace(0, 3, n)[:, None, None, None]
    b = np.clip(a + levels * rng.normal(size=a.shape), -1, 1)
    return np.float32(a), np.float32(b)


@pytest.mark.parametrize(("size", "channels"), [(11, 1), (16, 1), (32, 3), (33, 2)])
def test_ssim_is_that_of_scikit_image(size, channels):
    a, b = pairs(0, size=size, channels=channels)
    found = structure.compare(a, b).ssim
    truth = [
        structural_similarity(
            *(np.float64(x + 1) / 2 for x in pair),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
        )
        for pair in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(found, truth, atol=2e-5)
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[-1] < 0.8


def by_hand(a, b, size):
    """Luminance [P] and contrast-structure factors of one scale, as means of float64 maps over windows."""
    sigma = 1.5 * size / 11
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
    weights = np.outer(line, line)[None, :, :, None] / line.sum() ** 2
    both, cs = [], []
    for i in range(a.shape[1] - size + 1):
        for j in range(a.shape[2] - size + 1):
            x, y = (z[:, i : i + size, j : j + size] for z in (a, b))
            mx, my = (np.sum(weights * z, (1, 2), keepdims=True) for z in (x, y))
            vx, vy = (np.sum(weights * (z - m) ** 2, (1, 2), keepdims=True) for z, m in ((x, mx), (y, my)))
            cov = np.sum(weights * (x - mx) * (y - my), (1, 2), keepdims=True)
            cs.append((2 * cov + 0.03**2) / (vx + vy + 0.03**2))
            both.append(cs[-1] * (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2))
    return np.mean(both, (0, 2, 3, 4)), np.mean(cs, (0, 2, 3, 4))


def test_small_images_get_a_smaller_window():
    a, b = pairs(1, size=8)
    assert structure.window(a.shape) == 7
    truth, _ = by_hand(*(np.float64(x + 1) / 2 for x in (a, b)), 7)
    np.testing.assert_allclose(structure.compare(a, b).ssim, truth, atol=2e-5)
    assert structure.window((4, 1, 5, 3)) == 1
    assert structure.window((4, 40, 12, 3)) == 11


def test_ms_ssim_multiplies_scales():
    a, b = pairs(2, size=45)
    assert structure.scales(a.shape) == 3  # 45, 22 and 11 pixels
    weights = np.array([0.0448, 0.2856, 0.3001])
    weights /= weights.sum()
    x, y = (np.float64(z + 1) / 2 for z in (a, b))
    truth = 1.0
    for scale in range(3):
        whole, cs = by_hand(x, y, 11)
        truth = truth * np.maximum(whole if scale == 2 else cs, 0) ** weights[scale]
        half = x.shape[1] // 2
        x, y = (z[:, : 2 * half, : 2 * half].reshape(-1, half, 2, half, 2, 3).mean((2, 4)) for z in (x, y))
    np.testing.assert_allclose(structure.compare(a, b).ms_ssim, truth, atol=1e-4)


@pytest.mark.parametrize(("size", "count"), [(8, 1), (16, 1), (21, 1), (22, 2), (64, 3), (176, 5), (1024, 5)])
def test_as_many_scales_as_there_is_room_for(size, count):
    assert structure.scales((1, size, size, 3)) == count


def test_flat_and_inverted_images():
    flat = np.zeros((3, 16, 16, 1), np.float32)
    found = structure.compare(flat, flat)
    np.testing.assert_allclose(found.ssim, 1, atol=1e-6)
    a, _ = pairs(3, size=24)
    found = structure.compare(a, -a)
    assert (found.ssim < 0).all()
    assert (found.ms_ssim == 0).all()
    assert not np.isnan(found.ms_ssim).any()


def test_uint8_and_float_agree_and_parts_do_not_matter(monkeypatch):
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 256, (2, 7, 12, 12, 3)).astype(np.uint8)
    whole = structure.compare(a, b)
    monkeypatch.setattr(structure, "_PIXELS", 300)  # two pairs at once
    parts = structure.compare(to_float(a), to_float(b))
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_the_best_candidate_wins_in_its_orientation():
    rng = np.random.default_rng(5)
    refs = rng.uniform(-1, 1, (6, 16, 16, 1)).astype(np.float32)
    queries = np.stack([refs[2], refs[4][:, ::-1], refs[1]])
    index = np.array([[0, 2, 3], [4, 0, 2], [0, 2, 3]])
    flipped = np.array([[False] * 3, [True, False, False], [False] * 3])
    best, at = structure.best_of(queries, refs, index, flipped)
    assert at.ssim[:2].tolist() == [2, 4]
    np.testing.assert_allclose(best.ssim[:2], 1, atol=1e-5)
    assert best.ssim[2] < 0.3  # the right image was no candidate
    missed, _ = structure.best_of(queries, refs, index, np.zeros((3, 3), bool))
    assert missed.ssim[1] < 0.5
    np.testing.assert_array_equal(refs[4], queries[1][:, ::-1])  # the references are left alone


def worst(a, b, parts):
    """Largest RMS over tiles on [0, 1], by loops."""
    cuts = [np.round(np.linspace(0, n, parts + 1)).astype(int) for n in a.shape[:2]]
    found = []
    for i in range(parts):
        for j in range(parts):
            tile = np.s_[cuts[0][i] : cuts[0][i + 1], cuts[1][j] : cuts[1][j + 1]]
            found.append(np.sqrt(np.mean((np.float64(a[tile]) - b[tile]) ** 2)) / 2)
    return max(found)


@pytest.mark.parametrize(
    ("height", "width", "parts"), [(16, 16, 4), (18, 21, 4), (8, 8, 2), (13, 30, 3), (3, 9, 1)]
)
@pytest.mark.parametrize("flips", [False, True])
def test_worst_tile_is_brute_force(height, width, parts, flips):
    rng = np.random.default_rng(6)
    refs = rng.uniform(-1, 1, (40, height, width, 2)).astype(np.float32)
    queries = refs[[7, 30]] + rng.uniform(-0.2, 0.2, (2, height, width, 2)).astype(np.float32)
    queries = np.concatenate([queries, refs[[3]][:, :, ::-1], rng.uniform(-1, 1, refs[:3].shape)])
    assert tiles.grid(refs.shape) == parts
    found = tiles.nearest_tiles(queries, refs, flips=flips, chunk=11)
    truth = np.array([[worst(q, r, parts) for r in refs] for q in np.float32(queries)])
    if flips:
        turned = [[worst(q, r[:, ::-1], parts) for r in refs] for q in np.float32(queries)]
        truth = np.minimum(truth, turned)
        assert found.dist[2, 0] < 1e-6
    np.testing.assert_allclose(found.dist[:, 0], truth.min(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.index[:, 0], truth.argmin(1))


def test_a_shared_background_fools_the_whole_image_but_not_its_worst_tile():
    rng = np.random.default_rng(7)
    white = np.ones((20, 32, 32, 1), np.float32)
    white[:, 12:20, 12:20] = rng.uniform(-1, 1, (20, 8, 8, 1))
    query = white[:1].copy()
    query[:, 12:20, 12:20] = rng.uniform(-1, 1, (1, 8, 8, 1))
    whole = np.sqrt(((query - white) ** 2).mean((1, 2, 3))) / 2
    assert whole.min() < 0.15  # a "copy" by the whole image
    assert tiles.nearest_tiles(query, white).dist[0, 0] > 0.15


def test_tiles_are_exact_where_matrix_products_are_not():
    rng = np.random.default_rng(8)
    refs = np.float32(1 + 1e-6 * rng.normal(size=(300, 16, 16, 1)))
    refs[150:] -= 2
    found = tiles.nearest_tiles(refs[:4] + np.float32(1e-6), refs, chunk=64)
    truth = np.array([[worst(q, r, 4) for r in refs] for q in refs[:4] + np.float32(1e-6)])
    np.testing.assert_array_equal(found.index[:, 0], truth.argmin(1))
    np.testing.assert_allclose(found.dist[:, 0], truth.min(1), rtol=1e-6)
