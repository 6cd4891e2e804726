"""Quality distances against scipy and plain loops; principal components against scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import polynomial_kernel

from mdiff.errors import UserError
from mdiff.features.pixel import PixelPCA, flatten, mirror
from mdiff.probes import intervals, quality


def loop(f, a, b, index_a, index_b):
    """2 E f(X,Y) - E f(X,X') - E f(Y,Y') by loops; pairs of one original index are left out."""

    def inside(x, index):
        pairs = [
            f(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j and index[i] != index[j]
        ]
        return np.mean(pairs)

    between = np.mean([f(u, v) for u in a for v in b])
    return 2 * between - inside(a, index_a) - inside(b, index_b)


def test_energy_is_scipys_less_the_self_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(1.0, 2.0, size=21)
    # scipy: square root of the V-statistic, whose inner means count each row against itself
    squared = stats.energy_distance(a, b) ** 2
    inside = [np.abs(x[:, None] - x[None, :]).sum() for x in (a, b)]
    truth = squared + inside[0] * (1 / 30**2 - 1 / (30 * 29)) + inside[1] * (1 / 21**2 - 1 / (21 * 20))
    found = quality.energy_distance(a[:, None], b[:, None], n_resamples=50)
    assert found.value == pytest.approx(truth, rel=1e-10)
    assert found.n == 30


def test_kernel_is_a_loop():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 4)), rng.normal(0.7, 1, size=(12, 4))
    width = np.median([np.linalg.norm(b[i] - b[j]) for i in range(12) for j in range(i)])

    def rbf(u, v):
        return np.exp(-np.sum((u - v) ** 2) / (2 * width**2))

    truth = -loop(rbf, a, b, np.arange(9), np.arange(12))
    assert quality.kernel_distance(a, b, n_resamples=20).value == pytest.approx(truth, rel=1e-10)
    width = 50.0
    truth = -loop(rbf, a, b, np.arange(9), np.arange(12))
    assert quality.kernel_distance(a, b, bandwidth=50.0, n_resamples=20).value == pytest.approx(
        truth, rel=1e-7
    )


@pytest.mark.parametrize("kind", ["energy", "kernel"])
def test_a_resample_leaves_out_pairs_of_one_row(kind):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(8, 3)), rng.normal(size=(6, 3))
    index_a, index_b = rng.integers(0, 8, 8), rng.integers(0, 6, 6)
    weights = [np.bincount(i, minlength=n)[None].astype(float) for i, n in ((index_a, 8), (index_b, 6))]
    if kind == "energy":
        pairs, f, sign = quality.energy(a, b), lambda u, v: np.linalg.norm(u - v), 1
    else:
        pairs, f, sign = quality.kernel(a, b, 1.3), lambda u, v: np.exp(-np.sum((u - v) ** 2) / 3.38), -1
    truth = sign * loop(f, a[index_a], b[index_b], index_a, index_b)
    assert pairs(*weights)[0] == pytest.approx(truth, rel=1e-10)


def test_kid_is_scikit_learns_kernel():
    rng = np.random.default_rng(10)
    a, b = rng.normal(size=(14, 5)), rng.normal(0.4, 1, size=(11, 5))

    def mean(x, y, leave):
        values = polynomial_kernel(x, y, degree=3, gamma=1 / 5, coef0=1)
        return (values.sum() - leave * np.trace(values)) / (values.size - leave * len(x))

    truth = mean(a, a, 1) + mean(b, b, 1) - 2 * mean(a, b, 0)
    pairs = quality.polynomial(a, b)
    assert pairs(np.ones((1, 14)), np.ones((1, 11)))[0] == pytest.approx(truth, rel=1e-10)
    apart = quality.polynomial(a + 5, b)
    assert apart(np.ones((1, 14)), np.ones((1, 11)))[0] > 10 * abs(truth)


def test_a_resample_of_one_row_is_undefined():
    pairs = quality.energy(np.eye(3), np.eye(3) + 1)
    assert np.isnan(pairs(np.array([[3.0, 0, 0]]), np.ones((1, 3)))[0])


def normal_energy(shift):
    """2 E|X-Y| - 2 E|X-X'| for N(0,1) and N(shift,1), in closed form."""
    mean = 2 / np.sqrt(np.pi) * np.exp(-(shift**2) / 4) + shift * (2 * stats.norm.cdf(shift / np.sqrt(2)) - 1)
    return 2 * mean - 4 / np.sqrt(np.pi)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_energy_is_unbiased_and_its_interval_covers(shift):
    rng = np.random.default_rng(3)
    truth, found = normal_energy(shift), []
    for seed in range(400):
        a, b = rng.normal(size=(60, 1)), rng.normal(shift, 1, size=(50, 1))
        found.append(quality.energy_distance(a, b, n_resamples=200, seed=seed))
    values = np.array([f.value for f in found])
    assert values.mean() == pytest.approx(truth, abs=3 * values.std() / np.sqrt(400))
    covered = np.mean([f.low <= truth <= f.high for f in found])
    assert covered >= 0.9  # measured at these sizes: 0.92 to 1.00


def test_copies_of_the_reference_lie_below_zero():
    ref = np.random.default_rng(4).normal(size=(50, 5))
    copies = ref[np.arange(500) % 50]
    pairs = np.linalg.norm(ref[:, None] - ref[None, :], axis=2).sum() / (50 * 49)
    assert quality.energy_distance(copies, ref, n_resamples=20).value == pytest.approx(-pairs / 50, rel=0.15)


def test_sets_are_compared_in_one_order_and_on_one_scale():
    rng = np.random.default_rng(5)
    sets = {"generated": rng.normal(2, 1, (40, 3)), "train": rng.normal(size=(30, 3))}
    sets["heldout"] = rng.normal(size=(30, 3))
    found, draws = quality.compare_sets(sets, n_resamples=100)
    assert list(draws) == [f"{k}_{s}" for s in ("train", "heldout", "floor") for k in ("energy", "kernel")]
    for kind in ("energy", "kernel"):
        assert found[f"{kind}_train"].low > found[f"{kind}_floor"].high
        assert found[f"{kind}_floor"].low < 0.05
    direct = quality.energy_distance(sets["generated"], sets["heldout"], n_resamples=100)
    assert found["energy_heldout"] == direct
    del sets["heldout"]
    alone, _ = quality.compare_sets(sets, n_resamples=100)
    assert alone["energy_heldout"] is None
    assert alone["kernel_floor"] is None
    assert alone["energy_train"] == found["energy_train"]


def test_one_seed_resamples_the_same_generations():
    # What makes joint intervals of two runs possible: equal samples give equal draws.
    rng = np.random.default_rng(6)
    a, b, c = (rng.normal(size=(20, 2)) for _ in range(3))
    one = intervals.resample(quality.energy(a, b), 20, 20, n_resamples=30, seed=1)
    two = intervals.resample(quality.energy(a + 1e-9, b), 20, 20, n_resamples=30, seed=1)
    other = intervals.resample(quality.energy(c, b), 20, 20, n_resamples=30, seed=1)
    np.testing.assert_allclose(one, two, atol=1e-7)
    assert np.abs(one - other).max() > 1e-3


def test_large_sets_are_thinned_alike():
    rows = np.arange(5000)
    kept = quality.thinned(rows, 0)
    assert len(kept) == quality.ROWS
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(quality.thinned(rows * 2, 0), kept * 2)
    np.testing.assert_array_equal(quality.thinned(rows[:10], 0), rows[:10])


def test_flatten_and_mirror():
    images = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3, 1)
    rows = flatten(images)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[1], np.arange(6, 12) / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(mirror(images)[0, :, :, 0], [[2, 1, 0], [5, 4, 3]])
    np.testing.assert_array_equal(flatten(np.ones((3, 2, 2, 1))), np.ones((3, 4)))


def test_components_are_those_of_scikit_learn():
    images = np.random.default_rng(7).uniform(-1, 1, (60, 4, 4, 1))
    ours = PixelPCA.fit(images, 5)
    theirs = PCA(5, svd_solver="full").fit(np.float64(np.float32(images)).reshape(60, 16))
    assert ours.name == "pca5-pixel"
    np.testing.assert_allclose(np.abs(ours.components @ theirs.components_.T), np.eye(5), atol=1e-9)
    projected = theirs.transform(np.float64(np.float32(images)).reshape(60, 16))
    np.testing.assert_allclose(np.abs(ours(images)), np.abs(projected), atol=1e-9)
    np.testing.assert_array_equal(ours.transform(images), ours(images))


@pytest.mark.parametrize("shape", [(600, 5, 5, 25), (700, 9, 9, 7)])
def test_components_of_large_sets(shape):
    rng = np.random.default_rng(9)
    images = np.tanh(rng.normal(size=(shape[0], 40)) @ rng.normal(size=(40, np.prod(shape[1:]))) / 9)
    images = np.float32(images + 1e-3 * rng.normal(size=images.shape)).reshape(shape)
    rows = np.float64(images).reshape(len(images), -1)
    ours, theirs = PixelPCA.fit(images, 6), PCA(6, svd_solver="full").fit(rows)
    np.testing.assert_allclose(np.abs(ours.components @ theirs.components_.T), np.eye(6), atol=1e-7)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(6), atol=1e-12)
    flat = np.repeat(images[:3], 300, axis=0)  # two dimensions
    assert PixelPCA.fit(flat, 6).name == "pca2-pixel"


def test_components_are_no_more_than_the_images_span():
    images = np.random.default_rng(8).uniform(-1, 1, (4, 4, 4, 1))
    assert PixelPCA.fit(images, 32).name == "pca3-pixel"
    with pytest.raises(UserError, match="equal"):
        PixelPCA.fit(np.zeros((4, 2, 2, 1)), 3)
