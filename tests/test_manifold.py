"""Supports against scikit-learn's neighbours and loops, and on sets that cover a known part of each other."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from mdiff.probes import manifold


def test_radii_are_scikit_learns():
    rows = np.random.default_rng(0).normal(size=(50, 6))
    truth = NearestNeighbors(n_neighbors=4).fit(rows).kneighbors(rows)[0][:, 3]  # itself is the first
    np.testing.assert_allclose(manifold.radii(rows, 3), truth, rtol=1e-12)
    with pytest.raises(ValueError, match="4 rows have no 5"):
        manifold.radii(rows[:4])


def test_support_is_a_loop(monkeypatch):
    monkeypatch.setattr(manifold, "_ELEMENTS", 100)  # a few rows at once
    rng = np.random.default_rng(1)
    sample, reference, k = rng.normal(0.5, 1, (31, 3)), rng.normal(size=(23, 3)), 4
    found = manifold.support(sample, reference, k=k, n_resamples=50)

    def radius(rows, i):
        return sorted(np.linalg.norm(rows[i] - rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    real = [radius(reference, i) for i in range(23)]
    fake = [radius(sample, i) for i in range(31)]
    dist = [[np.linalg.norm(s - r) for r in reference] for s in sample]
    inside = np.array([[dist[i][j] <= real[j] for j in range(23)] for i in range(31)])
    recalled = [any(dist[i][j] <= fake[i] for i in range(31)) for j in range(23)]
    assert found.precision.value == pytest.approx(np.mean(inside.any(1)))
    assert found.recall.value == pytest.approx(np.mean(recalled))
    assert found.density.value == pytest.approx(inside.sum() / (k * 31))
    assert found.coverage.value == pytest.approx(np.mean(inside.any(0)))
    assert (found.precision.n, found.recall.n, found.density.n, found.coverage.n) == (31, 23, 31, 23)


def test_a_subset_has_precision_and_lacks_recall():
    rng = np.random.default_rng(2)
    modes = np.array([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    reference = modes[rng.integers(0, 4, 400)] + 0.3 * rng.normal(size=(400, 2))
    sample = modes[rng.integers(0, 2, 400)] + 0.3 * rng.normal(size=(400, 2))
    share = np.mean(reference[:, 1] < 5)
    found = manifold.support(sample, reference, n_resamples=100)
    assert found.precision.value > 0.95
    assert found.recall.value == pytest.approx(share, abs=0.03)
    assert found.coverage.value == pytest.approx(share, abs=0.03)
    assert found.density.value == pytest.approx(1, abs=0.1)
    crowded = modes[rng.integers(0, 4, 400)] + 0.05 * rng.normal(size=(400, 2))
    assert manifold.support(crowded, reference, n_resamples=100).density.low > 1.05
    other = manifold.support(reference, sample, n_resamples=100)  # the other way round
    assert other.precision.value == pytest.approx(share, abs=0.03)
    assert other.recall.value > 0.95


def test_equal_laws_and_far_ones():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(300, 4)), rng.normal(size=(300, 4))
    found = manifold.support(a, b, n_resamples=200)
    assert found.density.low < 1 < found.density.high
    assert found.coverage.value == pytest.approx(1 - 0.5**5, abs=0.04)  # arXiv 2002.09797, Eq. 9, k = 5
    far = manifold.support(a + 100, b, n_resamples=20)
    assert (far.precision.value, far.recall.value, far.density.value, far.coverage.value) == (0, 0, 0, 0)
    assert far.precision.high > 0


def test_exact_copies_lie_in_balls_of_radius_zero():
    rows = np.repeat(np.random.default_rng(4).normal(size=(4, 3)), 8, axis=0)
    found = manifold.support(rows, rows, n_resamples=20)
    assert found.precision.value == found.recall.value == found.coverage.value == 1


def test_vendi_counts_different_directions():
    eye = np.eye(7)
    assert manifold.vendi_score(eye) == pytest.approx(7)
    assert manifold.vendi_score(np.repeat(eye[:3], 5, axis=0) * 4) == pytest.approx(3)
    assert manifold.vendi_score(np.ones((9, 4))) == pytest.approx(1)
    assert manifold.vendi_score(np.concatenate([eye[:3], np.zeros((3, 7))])) == pytest.approx(
        np.exp(-3 * np.log(1 / 6) / 6 - np.log(1 / 2) / 2)
    )


@pytest.mark.parametrize(("n", "size"), [(40, 6), (6, 40)])
def test_vendi_is_the_entropy_of_the_cosines_eigenvalues(n, size):
    rows = np.random.default_rng(5).normal(size=(n, size)) + 0.5
    values = np.linalg.eigvalsh(cosine_similarity(rows) / n)
    values = values[values > 1e-14]
    assert manifold.vendi_score(rows) == pytest.approx(np.exp(-np.sum(values * np.log(values))))


def test_vendi_interval_covers_what_many_rows_have():
    rng = np.random.default_rng(6)
    scale = np.linspace(0.5, 2, 6)
    truth = manifold.vendi_score(rng.normal(size=(50_000, 6)) * scale)
    found = [manifold.vendi(rng.normal(size=(80, 6)) * scale, seed=s) for s in range(60)]
    assert np.mean([f.corrected.low <= truth <= f.corrected.high for f in found]) >= 0.88
    assert np.mean([f.plain.value for f in found]) < truth
