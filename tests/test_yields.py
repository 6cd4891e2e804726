"""Yields against simulation with planted probabilities, enumeration and hand-made cases."""

import itertools
import math

import numpy as np
import pytest

from mdiff.probes import similarity, yields


@pytest.mark.parametrize("hits", [[3, 1, 0, 2], [0, 0, 0, 0], [8, 0], [1] * 8])
def test_rarefaction_is_the_mean_over_all_subsets(hits):
    draws = 8
    owner = np.concatenate([np.repeat(np.arange(len(hits)), hits), np.full(draws - sum(hits), -1)])
    for n in (0, 1, 3, 8):
        sizes = [len(set(owner[list(s)]) - {-1}) for s in itertools.combinations(range(draws), n)]
        (found,) = yields.rarefaction(np.array(hits), draws, np.array([n]))
        assert found.value == pytest.approx(np.mean(sizes), abs=1e-9)
        assert found.low - 1e-12 <= found.value <= found.high + 1e-12
        assert found.high <= n


def test_rarefaction_is_unbiased_and_its_interval_covers():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(60, 0.7)) * 0.6  # 60 images, 40 % of the generations copy none
    at, draws = np.array([20, 100, 300]), 300
    truth = (1 - (1 - chances[:, None]) ** at).sum(0)
    values, covered = [], []
    for hits in rng.multinomial(draws, np.append(chances, 0.4), size=400)[:, :-1]:
        found = yields.rarefaction(hits, draws, at)
        values.append([f.value for f in found])
        covered.append([f.low <= t <= f.high for f, t in zip(found, truth, strict=True)])
    values = np.array(values)
    assert (np.abs(values.mean(0) - truth) < 3 * values.std(0) / 20).all()
    assert (np.mean(covered, 0) >= 0.94).all()


def test_rarefaction_has_width_when_everything_was_seen():
    # 50 images, all hit: the truth, 50 (1 - 0.98^256) = 49.7, lies below
    (found,) = yields.rarefaction(np.full(50, 5), 256, np.array([256]))
    assert found.value == 50
    assert 45 < found.low < 49.7


def test_rarefaction_of_many_generations_keeps_its_digits():
    # h = 1 for all: U(n) = number of images * n / N exactly
    (found,) = yields.rarefaction(np.ones(20_000, int), 1_000_000, np.array([12_345]))
    assert found.value == pytest.approx(20_000 * 12_345 / 1_000_000, rel=1e-6)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="rarefaction"):
        yields.rarefaction(np.array([1]), 5, np.array([6]))
    with pytest.raises(ValueError, match="copies among"):
        yields.rarefaction(np.array([4]), 3, np.array([1]))


def test_chao1_by_hand():
    # U = 7, f1 = 3, f2 = 2, N = 20: 7 + 19/20 * 3*2 / (2*3) = 7.95
    hits = np.array([1, 1, 1, 2, 2, 4, 5, 0, 0])
    found = yields.chao1(hits, 20)
    assert found.value == pytest.approx(7.95)
    a = 19 / 20
    variance = a * 6 / 6 + a**2 * 3 * 25 / 36 + a**2 * 9 * 2 * 4 / (4 * 81)
    stretch = math.exp(1.959964 * math.sqrt(math.log(1 + variance / 0.95**2)))
    assert (found.low, found.high) == pytest.approx((7 + 0.95 / stretch, 7 + 0.95 * stretch), rel=1e-5)
    # no image seen twice: EstimateS's second form; U = 3, f1 = 3, f2 = 0
    found = yields.chao1(np.array([1, 1, 1]), 10)
    assert found.value == pytest.approx(3 + 0.9 * 3)
    variance = 0.9 * 3 + 0.81 * 3 * 25 / 4 - 0.81 * 81 / (4 * 5.7)
    stretch = math.exp(1.959964 * math.sqrt(math.log(1 + variance / 2.7**2)))
    assert (found.low, found.high) == pytest.approx((3 + 2.7 / stretch, 3 + 2.7 * stretch), rel=1e-5)


def test_chao1_finds_the_planted_number_of_equal_images():
    rng = np.random.default_rng(1)
    values, covered = [], []
    for hits in rng.multinomial(250, np.append(np.full(120, 0.7 / 120), 0.3), size=400)[:, :-1]:
        found = yields.chao1(hits, 250)
        values.append(found.value)
        covered.append(found.low <= 120 <= found.high)
    assert np.mean(values) == pytest.approx(120, rel=0.02)
    assert np.mean(covered) >= 0.93


def test_chao1_stays_below_the_truth_when_images_differ():
    rng = np.random.default_rng(2)
    chances = rng.dirichlet(np.full(120, 0.5))
    found = [yields.chao1(h, 250) for h in rng.multinomial(250, chances, size=200)]
    assert np.mean([f.value for f in found]) < 120
    assert np.mean([f.low <= 120 for f in found]) >= 0.97


def test_chao1_at_its_ends():
    none = yields.chao1(np.zeros(9, int), 50, most=9)
    assert (none.value, none.low, none.high) == (0, 0, 9)
    assert math.isnan(yields.chao1(np.zeros(9, int), 50).high)
    often = yields.chao1(np.full(10, 8), 100)  # nothing seen once: nothing more to expect
    assert often.value == 10
    assert 10 <= often.low <= often.high < 10.5
    capped = yields.chao1(np.ones(30, int), 40, most=50)
    assert (capped.value, capped.high) == (50, 50)


def test_bands_are_differences_of_the_cumulative():
    rng = np.random.default_rng(3)
    best, index, labels = rng.uniform(0.2, 1, 300), rng.integers(0, 80, 300), np.arange(80) // 2
    edges = [(0.4, 0.5), (0.5, 0.6), (0.6, math.inf)]
    found = yields.banded(best, index, edges, labels=labels)
    whole = similarity.ams_ums(best, index, np.array([0.4, 0.5, 0.6]), labels=labels)
    for i, (ams, ums) in enumerate(found):
        after = 0 if i == 2 else 1
        assert ams.value == pytest.approx(whole["ams"][i] - (whole["ams"][i + 1] if after else 0))
        assert ums.value == pytest.approx(whole["ums"][i] - (whole["ums"][i + 1] if after else 0))
        assert ams.low <= ams.value <= ams.high
        assert ums.low <= ums.value <= ums.high
    assert sum(ums.value for _, ums in found) == pytest.approx(whole["ums"][0])


def test_bands_do_not_have_the_published_defect():
    # One generation at 0.9 from image 0; counting pairs in the low band would credit images 1 and 2 too.
    best, index = np.array([0.9, 0.45]), np.array([0, 0])
    (low, ums_low), (_, ums_high) = yields.banded(best, index, [(0.4, 0.5), (0.6, 2)], labels=np.arange(3))
    assert low.value == 0.5
    assert ums_low.value == 0  # image 0 was reached at 0.9
    assert ums_high.value == 0.5


def test_authenticity_by_hand():
    # training images at 0, 1 and 3: the nearest others are 1, 1 and 2 away
    spacing = np.array([1.0, 1.0, 2.0])
    generated = np.array([0.2, -1.5, 1.9, 5.5, 3.0])
    index = np.array([0, 0, 1, 2, 2])
    distance = np.abs(generated - np.array([0, 1, 3])[index])
    found = yields.authentic(distance, index, spacing)
    np.testing.assert_array_equal(found, [False, True, False, True, False])


def test_authenticity_of_known_generators():
    rng = np.random.default_rng(4)
    train = rng.uniform(-1, 1, (200, 20))
    labels = np.arange(200)
    spacing = similarity.ratio_test(train, train, labels).d2

    def share(generated):
        dist, index = similarity.nearest(generated, train, 1)
        return yields.authentic(dist[:, 0], index[:, 0], spacing).mean()

    assert share(train) == 0
    assert share(np.clip(train[:100] + 0.01 * rng.normal(size=(100, 20)), -1, 1)) == 0
    assert share(rng.uniform(-1, 1, (300, 20))) > 0.4
    assert share(3 + rng.uniform(-1, 1, (100, 20))) == 1
