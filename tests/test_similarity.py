"""Neighbours against float64 brute force, rules against cases worked by hand."""

import numpy as np
import pytest

from mdiff.errors import UserError
from mdiff.probes import neighbours, similarity


def brute(queries, references):
    """RMS on [0, 1], every pair, float64."""
    diff = np.float64(queries)[:, None, :] - np.float64(references)[None, :, :]
    return np.sqrt((diff**2).mean(2)) / 2


def line(*values):
    """Images of one pixel, given on [0, 1]."""
    return np.array(values, np.float64)[:, None] * 2 - 1


@pytest.mark.parametrize(("k", "chunk"), [(1, 16), (5, 7), (5, 1000), (200, 64)])
def test_nearest_is_brute_force(k, chunk):
    rng = np.random.default_rng(0)
    q = rng.uniform(-1, 1, (37, 48)).astype(np.float32)
    r = rng.uniform(-1, 1, (101, 48)).astype(np.float32)
    dist, index = similarity.nearest(q, r, k, chunk)
    truth = brute(q, r)
    k = min(k, 101)
    np.testing.assert_array_equal(index, np.argsort(truth, axis=1)[:, :k])
    np.testing.assert_allclose(dist, np.sort(truth, axis=1)[:, :k], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("spread", [3e-4, 1e-4, 1e-6])
def test_nearest_is_exact_where_matrix_products_are_not(spread, k):
    # Two far groups, each of points close together at a large norm: the products' rounding exceeds
    # the gaps, and more points are within it than the first list of candidates holds.
    rng = np.random.default_rng(1)
    base = np.repeat(rng.choice([-1.0, 1.0], (2, 300)), 200, axis=0)
    r = np.float32(base + spread * rng.normal(size=base.shape))
    q = np.float32(base[::5] + spread * rng.normal(size=base[::5].shape))
    dist, index = similarity.nearest(q, r, k, 64)
    truth = brute(q, r)
    np.testing.assert_array_equal(index, np.argsort(truth, axis=1)[:, :k])
    np.testing.assert_allclose(dist, np.sort(truth, axis=1)[:, :k], rtol=1e-6)
    products = (q**2).sum(1)[:, None] + (r**2).sum(1) - 2 * q @ r.T
    assert (np.argmin(products, 1) != index[:, 0]).any()  # the easy way is wrong here


def test_ties_go_to_the_lower_index():
    r = np.zeros((60, 4), np.float32)
    dist, index = similarity.nearest(np.zeros((2, 4), np.float32), r, 3, 16)
    np.testing.assert_array_equal(index, [[0, 1, 2]] * 2)
    assert (dist == 0).all()


def test_the_unit_is_rms_on_the_unit_interval():
    black, white = -np.ones((1, 12)), np.ones((1, 12))
    assert similarity.nearest(black, white, 1)[0][0, 0] == 1.0
    dist, index = similarity.nearest(line(0.3), line(0.0, 0.35, 1.0), 3)
    np.testing.assert_allclose(dist[0], [0.05, 0.3, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(index[0], [1, 0, 2])


def test_flips_take_the_nearer_orientation():
    rng = np.random.default_rng(2)
    r = rng.uniform(-1, 1, (30, 4, 4, 1)).astype(np.float32)
    m = r[:, :, ::-1]
    q = np.concatenate([m[5:8], r[9:11]]) + np.float32(0.01)
    rows, mirrored, queries = (x.reshape(len(x), -1) for x in (r, m, q))
    found = similarity.nearest_with_flips(queries, rows, mirrored, 30, 8)
    truth = np.minimum(brute(queries, rows), brute(queries, mirrored))
    np.testing.assert_array_equal(found.index[:, 0], [5, 6, 7, 9, 10])
    np.testing.assert_array_equal(found.flipped[:, 0], [True] * 3 + [False] * 2)
    np.testing.assert_array_equal(np.sort(found.index, 1), [np.arange(30)] * 5)
    np.testing.assert_allclose(found.dist, np.sort(truth, 1), rtol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(truth, found.index, 1), found.dist, rtol=1e-6)
    plain = similarity.nearest_with_flips(queries, rows, None, 1)
    assert not plain.flipped.any()
    assert (plain.dist[:3, 0] > 0.1).all()


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_clusters_are_chains_of_close_pairs(chunk):
    rows = line(0.0, 0.5, 0.08, 0.9, 0.16, 0.9, 0.3)  # 0, 2, 4 by steps of 0.08; 3 = 5
    np.testing.assert_array_equal(similarity.cluster_near_duplicates(rows, 0.1, chunk), [0, 1, 0, 2, 0, 2, 3])
    np.testing.assert_array_equal(similarity.cluster_near_duplicates(rows, 0.0, chunk), [0, 1, 2, 3, 4, 3, 5])
    assert similarity.cluster_near_duplicates(rows, 1.0, chunk).max() == 0


def test_clusters_are_those_of_brute_force():
    rng = np.random.default_rng(3)
    rows = rng.uniform(-1, 1, (60, 3)).astype(np.float32)
    labels = similarity.cluster_near_duplicates(rows, 0.09, 7)
    joined = brute(rows, rows) <= 0.09
    for _ in range(6):
        joined = joined @ joined  # reachability by repeated squaring
    np.testing.assert_array_equal(labels[:, None] == labels[None, :], joined)
    assert 1 < labels.max() < 59


def test_a_mirrored_copy_is_the_same_image_only_with_flips():
    images = np.random.default_rng(4).uniform(-1, 1, (3, 4, 4, 1)).astype(np.float32)
    images = np.concatenate([images, images[:1, :, ::-1]])
    rows, mirrored = images.reshape(4, -1), images[:, :, ::-1].reshape(4, -1)
    np.testing.assert_array_equal(similarity.cluster_near_duplicates(rows, 0.01), [0, 1, 2, 3])
    np.testing.assert_array_equal(
        similarity.cluster_near_duplicates(rows, 0.01, mirrored=mirrored), [0, 1, 2, 0]
    )


def test_median_pair_distance():
    # pairs 0.1, 0.3, 0.2 (by hand), then numpy on a sample
    assert similarity.median_pair_distance(line(0.1, 0.2, 0.4)) == pytest.approx(0.2)
    rows = np.random.default_rng(5).uniform(-1, 1, (400, 20))
    whole = np.median(brute(rows, rows)[np.triu_indices(400, 1)])
    assert similarity.median_pair_distance(rows) == pytest.approx(whole)
    assert similarity.median_pair_distance(rows, limit=200) == pytest.approx(whole, rel=0.02)


def test_ratio_by_hand():
    found = similarity.ratio_test(line(0.1, 0.5), line(0.0, 0.4, 1.0), np.arange(3))
    np.testing.assert_allclose(found.d1, [0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(found.d2, [0.3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.ratio, [1 / 3, 0.2], rtol=1e-6)


def test_near_duplicates_fool_the_plain_ratio_but_not_the_clustered_one():
    refs = line(0.5, 0.501, 0.1, 0.9)
    labels = similarity.cluster_near_duplicates(refs, 0.01)
    query = line(0.502)
    assert similarity.ratio_test(query, refs, np.arange(4)).ratio[0] == pytest.approx(0.5, rel=1e-3)
    assert similarity.ratio_test(query, refs, labels).ratio[0] == pytest.approx(0.001 / 0.398, rel=1e-3)


@pytest.mark.parametrize("flips", [False, True])
def test_a_cluster_larger_than_the_neighbour_list(flips):
    rng = np.random.default_rng(6)
    copies = np.repeat(rng.uniform(-1, 1, (1, 16)), 40, axis=0)
    others = rng.uniform(-1, 1, (10, 16))
    refs = np.concatenate([copies, others]).astype(np.float32)
    labels = similarity.cluster_near_duplicates(refs, 0.01)
    mirrored = refs[:, ::-1].copy() if flips else None
    found = similarity.ratio_test(refs[:1], refs, labels, mirrored=mirrored)
    both = others if mirrored is None else np.concatenate([others, others[:, ::-1]])
    assert found.d1[0] == 0
    assert found.d2[0] == pytest.approx(brute(refs[:1], both).min(), rel=1e-6)


def test_one_image_is_not_enough():
    with pytest.raises(UserError, match="two distinct images"):
        similarity.ratio_test(line(0.1), line(0.5, 0.5), np.zeros(2, int))


def test_calibrated_by_hand():
    # distances 0.1, 0.3, 0.8: mean of the first two 0.2, of all 0.4
    dist = np.array([[0.1, 0.3, 0.8], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    two = similarity.calibrated_l2(dist, alpha=0.5, n=2)
    np.testing.assert_allclose(two.value, [0.1 / (0.5 * 0.2), 0.0, 2.0])
    assert two.n == 2
    every = similarity.calibrated_l2(dist, alpha=0.25, n=50)
    np.testing.assert_allclose(every.value, [0.1 / (0.25 * 0.4), 0.0, 4.0])
    assert every.n == 3


@pytest.mark.parametrize("chunk", [3, 100])
def test_cosine_is_brute_force(chunk):
    rng = np.random.default_rng(7)
    q, r = rng.normal(size=(11, 5)), rng.normal(size=(17, 5)) + 1
    for shift in (0.0, r.mean(0)):
        a, b = q - shift, r - shift
        cos = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        best, index = similarity.cosine_nearest(q, r, centre=not np.isscalar(shift), chunk=chunk)
        np.testing.assert_allclose(best, cos.max(1))
        np.testing.assert_array_equal(index, cos.argmax(1))


def test_cosine_of_a_copy_is_one_and_of_nothing_zero():
    r = np.random.default_rng(8).normal(size=(20, 7))
    best, index = similarity.cosine_nearest(3 * r, r)
    assert (best == 1.0).all()
    np.testing.assert_array_equal(index, np.arange(20))
    assert similarity.cosine_nearest(np.zeros((1, 7)), r)[0][0] == 0


def test_ams_and_ums_by_hand():
    best = np.array([0.95, 0.92, 0.91, 0.5])
    index = np.array([0, 1, 2, 3])
    found = similarity.ams_ums(best, index, np.array([0.4, 0.9, 0.93, 1.0]), labels=np.array([0, 0, 1, 2, 3]))
    assert found["ams"] == [1.0, 0.75, 0.25, 0.0]
    assert found["unique"] == [3, 2, 1, 0]  # 0 and 1 are one image
    assert found["ums"] == [0.75, 0.5, 0.25, 0.0]
    assert found["coverage"] == [0.75, 0.5, 0.25, 0.0]  # of four images
    assert all(low < high for low, high in zip(found["ums_low"], found["ums_high"], strict=True))
    near = similarity.ams_ums(1 - best, index, np.array([0.06, 0.1]), labels=np.arange(4), distance=True)
    assert near["ams"] == [0.25, 0.75]


@pytest.mark.parametrize("distance", [False, True])
def test_ums_never_exceeds_ams_and_both_are_monotone(distance):
    rng = np.random.default_rng(9)
    for q, r in ((1, 1), (5, 3), (40, 10), (20, 200)):
        labels = np.unique(rng.integers(0, r, r), return_inverse=True)[1]
        found = similarity.ams_ums(
            rng.random(q),
            rng.integers(0, r, q),
            np.linspace(0, 1, 21),
            labels=labels,
            distance=distance,
        )
        sign = 1 if distance else -1
        for name in ("ams", "ums", "coverage"):
            assert (sign * np.diff(found[name]) >= 0).all()
        assert (np.array(found["ums"]) <= np.array(found["ams"])).all()


def test_the_interval_of_coverage_covers():
    # Images with very different chances of being hit; truth is the expected count.
    rng = np.random.default_rng(10)
    images, q = 40, 60
    p = rng.dirichlet(np.full(images, 0.3))
    truth = (1 - (1 - p) ** q).sum() / images
    inside = []
    for _ in range(400):
        index = rng.choice(images, q, p=p)
        found = similarity.ams_ums(np.ones(q), index, np.array([0.5]), labels=np.arange(images))
        low, high = (found[name][0] * q / images for name in ("ums_low", "ums_high"))
        inside.append(low <= truth <= high)
    assert np.mean(inside) >= 0.94


def test_search_widens_until_certain(monkeypatch):
    calls = []
    propose = neighbours._propose

    def counted(rows, blocks, candidates):
        calls.append(candidates)
        return propose(rows, blocks, candidates)

    monkeypatch.setattr(neighbours, "_propose", counted)
    rng = np.random.default_rng(11)
    r = np.float32(1 + 1e-7 * rng.normal(size=(400, 256)))
    r[:200] -= 2
    similarity.nearest(r[:3], r, 1, 128)
    assert calls == [17, 136]  # then every reference directly
