"""Surrogate clusters against brute force, planted directions and hand-made cases."""

from dataclasses import replace

import numpy as np
import pytest
from data_helpers import one_line
from sklearn.metrics import adjusted_rand_score

from mdiff.probes import clusters
from mdiff.side import Surrogate

CFG = Surrogate(clusters=4, cohesion=0.5, min_size=3, seed=7)


def planted(n=200, dims=12, spread=0.2, seed=0, groups=4):
    """Rows of any length around `groups` orthogonal directions, and the direction of each."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, groups, n)
    rows = np.eye(dims)[truth] + spread * rng.normal(size=(n, dims)) / np.sqrt(dims)
    return rows * rng.uniform(0.01, 100, (n, 1)), truth


def test_planted_directions_are_found_whatever_the_lengths():
    rows, truth = planted()
    found = clusters.cluster(rows, CFG)
    assert adjusted_rand_score(truth, found.labels) == 1
    np.testing.assert_allclose(np.linalg.norm(found.centres, axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(np.sort(found.sizes), np.sort(np.bincount(truth)))
    assert found.kept.all()
    np.testing.assert_array_equal(clusters.assign(found, rows), found.labels)


def test_cohesion_is_the_norm_of_the_mean_and_the_root_of_the_mean_cosine():
    rows, _ = planted(spread=2.0, seed=1)
    found = clusters.cluster(rows, replace(CFG, cohesion=-1.0, min_size=1))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    inertia = 0.0
    for k, centre in enumerate(found.centres):
        own = unit[found.labels == k]
        n = len(own)
        cosines = own @ own.T
        assert found.cohesion[k] == pytest.approx(np.mean(own @ centre), abs=1e-12)
        assert found.cohesion[k] == pytest.approx(np.linalg.norm(own.mean(0)), abs=1e-12)
        assert found.cohesion[k] == pytest.approx(np.sqrt(cosines.mean()), abs=1e-12)
        others = (cosines.sum() - n) / (n * (n - 1))
        assert found.pairwise[k] == pytest.approx(others, abs=1e-12)
        inertia += ((own - centre) ** 2).sum()
    assert found.inertia == pytest.approx(inertia)


def test_a_cluster_of_unrelated_rows_has_no_pairwise_cohesion():
    rng = np.random.default_rng(2)
    plain, fair = [], []
    for _ in range(200):
        unit = rng.normal(size=(5, 20))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        c = np.linalg.norm(unit.mean(0))
        plain.append(c)
        fair.append(clusters.pairwise(np.array([c]), np.array([5]))[0])
    assert np.mean(plain) > 0.4  # five unrelated rows look cohesive
    assert abs(np.mean(fair)) < 4 * np.std(fair) / np.sqrt(200)
    assert np.isnan(clusters.pairwise(np.array([1.0]), np.array([1]))).all()


def test_labels_are_a_fixed_point_of_spherical_k_means():
    """Every row has the largest cosine, and every centre is the direction of its rows' sum: also where clusters overlap,
    where scikit-learn's Euclidean centres can give other labels."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(300, 3)) + np.array([1.0, 0, 0])
    found = clusters.cluster(rows, replace(CFG, clusters=9, cohesion=-1.0, min_size=1))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_array_equal((unit @ found.centres.T).argmax(1), found.labels)
    for k, centre in enumerate(found.centres):
        total = unit[found.labels == k].sum(0)
        np.testing.assert_allclose(total / np.linalg.norm(total), centre, atol=1e-12)


def test_more_restarts_are_never_worse_and_a_seed_decides():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(150, 6))
    cfg = replace(CFG, clusters=12, cohesion=-1.0, min_size=1)
    one, five, again = (clusters.cluster(rows, replace(cfg, restarts=restarts)) for restarts in (1, 5, 5))
    assert five.inertia <= one.inertia
    np.testing.assert_array_equal(five.labels, again.labels)
    other = clusters.cluster(rows, replace(cfg, seed=8))
    assert not np.array_equal(five.labels, other.labels)


@pytest.mark.parametrize("seed", [0, 5])  # the dropped one comes last, and first
def test_dropped_clusters_go_to_the_nearest_kept_one_or_out(seed):
    rng = np.random.default_rng(5)
    tight, _ = planted(120, spread=0.1, groups=2)
    loose = rng.normal(size=(60, 12))
    rows = np.concatenate([tight, loose])
    cfg = replace(CFG, clusters=3, cohesion=0.8, seed=seed)
    moved, out = (clusters.cluster(rows, replace(cfg, dropped=rule)) for rule in ("reassign", "drop"))
    assert moved.kept.sum() == out.kept.sum() == 2 and moved.kept[0] == (seed == 0)
    assert len(moved.kept) == len(moved.cohesion) == len(moved.sizes) == 3
    assert (moved.cohesion[moved.kept] >= 0.8).all() and (moved.cohesion[~moved.kept] < 0.8).all()
    assert set(moved.labels) == {0, 1}
    assert set(out.labels) == {-1, 0, 1}
    assert (out.labels < 0).sum() == out.sizes[~out.kept].sum()
    kept = out.labels >= 0
    np.testing.assert_array_equal(out.labels[kept], moved.labels[kept])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_array_equal(moved.labels, (unit @ moved.centres.T).argmax(1))


def test_small_clusters_are_dropped_however_cohesive():
    rows, _ = planted(100, groups=2, spread=0.05)
    rows = np.concatenate([rows, np.eye(12)[[5, 5]] + 1e-6 * np.eye(12)[[6, 7]]])
    found = clusters.cluster(rows, replace(CFG, clusters=3))
    assert sorted(found.sizes)[0] == 2 and not found.kept[found.sizes == 2].any()
    assert found.cohesion[found.sizes == 2] > 0.999


@pytest.mark.parametrize("rows", [[[1, 0], [-1, 0], [2, 0], [-3, 0]], [[1, 0], [0, 1], [-1, 0], [0, -1]]])
def test_rows_that_cancel_have_a_centre(rows):
    found = clusters.cluster(np.array(rows, float), replace(CFG, clusters=1, cohesion=-1.0, min_size=1))
    assert found.cohesion[0] == pytest.approx(0, abs=1e-9)
    assert np.isfinite(found.centres).all() and (found.labels == 0).all()


def test_a_row_without_direction_gives_no_nan():
    rows, _ = planted(50)
    rows[[3, 9]] = 0
    rows[10] *= 1e-200
    for rule in ("reassign", "drop"):
        found = clusters.cluster(rows, replace(CFG, dropped=rule))
        np.testing.assert_array_equal(np.flatnonzero(found.labels < 0), [3, 9])
        assert np.isfinite(found.cohesion).all() and np.isfinite(found.centres).all()
    np.testing.assert_array_equal(np.flatnonzero(clusters.assign(found, rows) < 0), [3, 9])
    for temperature in (0.0, 0.3):
        np.testing.assert_allclose(clusters.soft(found, rows, temperature)[3], 0.25)


def test_soft_labels_by_hand_and_at_both_ends():
    found = clusters.Clusters(*[np.eye(2)] * 6, 0.0)
    row = np.array([[3.0, 4.0]])  # cosines 0.6 and 0.8
    expected = 1 / (1 + np.exp(-0.2 / 0.5))
    np.testing.assert_allclose(clusters.soft(found, row, 0.5), [[1 - expected, expected]], atol=1e-6)
    np.testing.assert_array_equal(clusters.soft(found, row, 0.0), [[0, 1]])
    np.testing.assert_allclose(clusters.soft(found, row, 1e-3), [[0, 1]], atol=1e-6)
    np.testing.assert_allclose(clusters.soft(found, row, 1e6), [[0.5, 0.5]], atol=1e-6)
    np.testing.assert_array_equal(clusters.one_hot(np.array([1, -1]), 2), [[0, 1], [0, 0]])


def test_shuffled_labels_keep_their_counts_and_say_nothing():
    labels = np.repeat([-1, 0, 1, 2], [100, 300, 300, 200])
    found = clusters.shuffled(labels, 3)
    np.testing.assert_array_equal(np.sort(found), np.sort(labels))
    np.testing.assert_array_equal(found < 0, labels < 0)
    assert abs(adjusted_rand_score(labels[100:], found[100:])) < 0.01
    np.testing.assert_array_equal(found, clusters.shuffled(labels, 3))
    assert not np.array_equal(found, clusters.shuffled(labels, 4))


def test_files_bring_back_the_same(tmp_path):
    rows, _ = planted()
    found = clusters.cluster(rows, replace(CFG, clusters=6, min_size=20), space="pca12")
    path = clusters.save(found, tmp_path)
    back = clusters.load(tmp_path)
    for name in ("labels", "centres", "cohesion", "pairwise", "sizes", "kept"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name))
    assert (back.inertia, back.space) == (found.inertia, "pca12")
    other = clusters.cluster(rows, CFG)
    clusters.save(other, tmp_path / "other")
    (tmp_path / "other" / "clusters.npz").replace(tmp_path / "clusters.npz")
    with one_line("clusters.npz", "does not belong", "cluster again"):
        clusters.load(tmp_path)
    path.write_text("{")
    with one_line("clusters.json", "not JSON"):
        clusters.load(tmp_path)
    with one_line("no such file"):
        clusters.load(tmp_path / "nowhere")


def test_wrong_inputs_are_one_line():
    rows, _ = planted(40)
    with one_line("surrogate.clusters = 50", "40 images", "surrogate.n"):
        clusters.cluster(rows, replace(CFG, clusters=50))
    with one_line("surrogate.clusters = 5", "4 different ones"):
        clusters.cluster(np.repeat(np.eye(4), 10, axis=0), replace(CFG, clusters=5))
    wide = np.random.default_rng(0).normal(size=(40, 12))
    with one_line("surrogate.cohesion = 0.99", "the best has 0.", "lower it"):
        clusters.cluster(wide, replace(CFG, cohesion=0.99))
    with one_line("surrogate.min_size = 41", "has ", "lower"):
        clusters.cluster(rows, replace(CFG, min_size=41))
    broken = rows.copy()
    broken[2, 1] = np.nan
    with one_line("features", "1 of 40"):
        clusters.cluster(broken, CFG)
    with one_line("features", "shape"):
        clusters.cluster(rows[0], CFG)
    with one_line("surrogate.n = 3", "surrogate.clusters = 4"):
        clusters.cluster(rows, replace(CFG, n=3))
    for field, value in (
        ("clusters", 0),
        ("min_size", 0),
        ("restarts", 0),
        ("cohesion", 2.0),
        ("cohesion", float("nan")),
        ("dropped", "keep"),
        ("soft", -1.0),
        ("seed", -1),
    ):
        with one_line(f"surrogate.{field} = "):
            clusters.cluster(rows, replace(CFG, **{field: value}))
    found = clusters.cluster(rows, CFG)
    with one_line("features: 5 columns", "12"):
        clusters.assign(found, rows[:, :5])
    with one_line("surrogate.soft = nan"):
        clusters.soft(found, rows, float("nan"))
