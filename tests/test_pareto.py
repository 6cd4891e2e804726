"""Dominance, fronts, areas and intervals over seeds against definitions written out, Monte Carlo and textbook numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mdiff.probes import pareto
from mdiff.probes.intervals import wilson
from mdiff.types import Estimate

HAND = np.array([[1, 5], [2, 3], [2, 3], [2, 4], [3, 3], [4, 1], [5, 1], [1, 6]], float)
"""Front: (1, 5), both (2, 3), (4, 1). The others lose to a point that is equal in one and better in the other."""


def better(a, b) -> bool:
    """The definition, one pair at a time."""
    return a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1])


def exact(value: float, n: int = 100) -> Estimate:
    return Estimate(value, value, value, n)


def test_front_of_a_hand_made_case():
    assert pareto.on_front(HAND).tolist() == [True, True, True, False, False, True, False, False]
    assert pareto.staircase(HAND).tolist() == [[1, 5], [2, 3], [4, 1]]
    beats = pareto.dominates(HAND)
    assert not beats[1, 2] and not beats[2, 1] and not beats.diagonal().any()
    assert beats[1, 3] and beats[2, 4] and not beats[0, 1]


def test_front_is_the_definition_with_many_ties():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 40):
        points = rng.integers(0, 6, (count, 2)).astype(float)
        matrix = [[better(a, b) for b in points] for a in points]
        assert pareto.dominates(points).tolist() == matrix
        assert pareto.on_front(points).tolist() == [not any(row[k] for row in matrix) for k in range(count)]


def test_many_sets_at_once_are_each_alone(monkeypatch):
    points = np.random.default_rng(1).normal(size=(5, 4, 9, 2))
    monkeypatch.setattr(pareto, "_ELEMENTS", 200)  # several blocks
    whole, areas = pareto.on_front(points), pareto.hypervolume(points, (1.0, 0.5))
    for i in np.ndindex(5, 4):
        assert (whole[i] == pareto.on_front(points[i])).all()
        assert areas[i] == pytest.approx(pareto.hypervolume(points[i], (1.0, 0.5)))


def test_a_point_that_is_not_there_changes_nothing():
    points = np.array([[np.nan, 0.0], [1.0, 1.0], [0.0, np.nan], [np.nan, np.nan]])
    assert pareto.on_front(points).tolist() == [False, True, False, False]
    assert pareto.hypervolume(points, (2.0, 3.0)) == 2.0
    assert pareto.hypervolume(np.full((3, 2), np.nan), (2.0, 3.0)) == 0.0
    assert pareto.on_front(np.zeros((0, 2))).shape == (0,)


def test_area_of_a_hand_made_case():
    # Reference (6, 7): columns 1..2 of height 2, 2..4 of height 4, 4..6 of height 6.
    assert pareto.hypervolume(HAND, (6.0, 7.0)) == 1 * 2 + 2 * 4 + 2 * 6
    assert pareto.hypervolume(HAND[:1], (6.0, 7.0)) == 5 * 2
    assert pareto.hypervolume(HAND, (1.0, 7.0)) == 0.0  # no point is better than it in both
    assert pareto.hypervolume(HAND, (2.5, 3.5)) == 0.5 * 0.5


def test_area_is_that_of_thrown_darts():
    rng = np.random.default_rng(2)
    points, corner = rng.normal(size=(25, 2)), (0.6, 0.9)
    low = points.min(0)
    darts = rng.uniform(low, corner, (400_000, 2))
    hit = np.zeros(len(darts), bool)
    for point in points:
        hit |= (darts >= point).all(1)
    box = (corner[0] - low[0]) * (corner[1] - low[1])
    error = box * math.sqrt(hit.mean() * (1 - hit.mean()) / len(darts))
    assert pareto.hypervolume(points, corner) == pytest.approx(box * hit.mean(), abs=4 * error)


def test_area_does_not_depend_on_order_or_copies_and_grows_with_points():
    rng = np.random.default_rng(3)
    points = rng.uniform(size=(12, 2))
    area = pareto.hypervolume(points, (1.0, 1.0))
    assert pareto.hypervolume(rng.permutation(np.concatenate([points, points])), (1.0, 1.0)) == pytest.approx(
        area
    )
    parts = [float(pareto.hypervolume(points[:k], (1.0, 1.0))) for k in range(1, 13)]
    assert (np.diff(parts) >= -1e-12).all() and parts[0] < parts[-1]


# ------------------------------------------------------------------------------------------ over seeds


def test_interval_over_seeds_is_students():
    values = [0.31, 0.36, 0.28, 0.33]
    found = pareto.over_seeds([exact(value) for value in values], 0.9)
    low, high = stats.t.interval(0.9, 3, np.mean(values), stats.sem(values))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((np.mean(values), low, high, 4))


def test_equal_seeds_still_leave_open_what_their_generations_do():
    """Three times 0 of 100: Student's interval has no width; the cells' own upper limits say more."""
    cell = wilson(0, 100)
    found = pareto.over_seeds([cell] * 3, limits=(0.0, 1.0))
    assert found.value == found.low == 0.0
    assert found.high == pytest.approx(cell.high / math.sqrt(3))
    wide = pareto.over_seeds([wilson(1, 100), wilson(30, 100), wilson(2, 100)], limits=(0.0, 1.0))
    assert wide.low == 0.0 and wide.high > 0.4  # a share is not below 0


def test_one_seed_has_no_interval():
    found = pareto.over_seeds([wilson(3, 10)])
    assert found.value == 0.3 and math.isnan(found.low) and math.isnan(found.high) and found.n == 1


def test_difference_is_second_minus_first_over_common_seeds():
    first = {0: exact(0.5), 1: exact(0.7), 2: exact(0.6), 9: exact(100.0)}
    second = {0: exact(0.2), 1: exact(0.3), 2: exact(0.35), 8: exact(-100.0)}
    found = pareto.difference(first, second)
    paired = stats.ttest_rel([0.2, 0.3, 0.35], [0.5, 0.7, 0.6]).confidence_interval(0.95)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((-0.95 / 3, paired.low, paired.high))
    assert found.n == 3 and pareto.difference(first, {8: exact(1.0)}) is None


def test_difference_of_equal_seeds_has_both_cells_noise():
    one, two = Estimate(0.5, 0.4, 0.52, 10), Estimate(0.3, 0.27, 0.35, 10)
    found = pareto.difference({0: one, 1: one}, {0: two, 1: two})
    assert found is not None  # upwards: what two may be above and one below
    assert found.high - found.value == pytest.approx(math.hypot(0.05, 0.1) / math.sqrt(2))
    assert found.value - found.low == pytest.approx(math.hypot(0.03, 0.02) / math.sqrt(2))


# ------------------------------------------------------------------------------------------- bootstrap


def test_draws_have_the_variance_of_their_parts():
    """One seed: a normal law with the interval as its quantiles. Several: the variance of seeds drawn again, too."""
    value = Estimate(2.0, 2.0 - 1.96, 2.0 + 1.96, 50)  # a standard error of 1
    one = pareto.draws([{0: (value, exact(7.0))}], n_resamples=20_000)
    assert one.shape == (20_000, 1, 2)
    assert one[:, 0, 0].mean() == pytest.approx(2.0, abs=0.04) and one[:, 0, 0].std() == pytest.approx(
        1.0, abs=0.02
    )
    assert (one[:, 0, 1] == 7.0).all()
    far = [1.0, 4.0, 10.0]
    several = pareto.draws([{i: (exact(x), value) for i, x in enumerate(far)}], n_resamples=20_000)
    assert several[:, 0, 0].std() == pytest.approx(np.std(far) / math.sqrt(3), rel=0.03)
    assert several[:, 0, 1].std() == pytest.approx(1 / math.sqrt(3), rel=0.03)


def test_draws_keep_to_each_side_of_an_interval():
    drawn = pareto.draws([{0: (wilson(0, 100), Estimate(5.0, 4.0, 5.0, 9))}], n_resamples=4000)[:, 0]
    limit = wilson(0, 100).high
    assert drawn[:, 0].min() == 0.0 and np.quantile(drawn[:, 0], 0.975) == pytest.approx(limit, rel=0.1)
    assert drawn[:, 1].max() == 5.0 and np.quantile(drawn[:, 1], 0.025) == pytest.approx(4.0, abs=0.06)


def test_settings_with_the_same_seeds_are_drawn_together():
    """What a seed does to all settings alike cannot change who dominates whom."""
    luck = [0.0, 10.0, -20.0]
    a = {i: (exact(x), exact(x)) for i, x in enumerate(luck)}
    b = {i: (exact(x + 1), exact(x + 1)) for i, x in enumerate(luck)}
    drawn = pareto.draws([a, b, {}])
    assert np.allclose(drawn[:, 1] - drawn[:, 0], 1.0) and np.isnan(drawn[:, 2]).all()
    assert pareto.on_front(drawn).mean(0).tolist() == [1.0, 0.0, 0.0]
    assert (pareto.draws([a, b, {}]) == drawn)[:, :2].all()
    assert not np.allclose(pareto.draws([a, b, {}], seed=1)[:, 0], drawn[:, 0])
    other = pareto.draws([a, {i + 3: pair for i, pair in b.items()}])
    assert not np.allclose(other[:, 1] - other[:, 0], 1.0)


def test_reflected_interval():
    drawn = np.linspace(1.0, 3.0, 2001)
    found = pareto.reflected(1.8, drawn, 0.9)
    assert (found.low, found.high) == pytest.approx((3.6 - 2.9, 3.6 - 1.1))
    assert pareto.reflected(1.8, drawn, 0.9, least=0.9).low == 0.9


def test_interval_of_an_area_covers_the_truth():
    """Seven settings of three noisy seeds: the area of the means is too large, and its interval allows for that."""
    rng = np.random.default_rng(4)
    truth = np.array([[20, 60], [18, 50], [19, 35], [25, 30], [30, 28], [50, 30], [30, 50]]) / 100
    corner = (0.6, 1.0)
    area = float(pareto.hypervolume(truth, corner))
    covered, too_large = 0, []
    for _ in range(60):
        seen = truth[:, None] + rng.normal(0, 0.04, (7, 3, 2))
        cells = [{s: (exact(x), exact(y)) for s, (x, y) in enumerate(each)} for each in seen]
        value = float(pareto.hypervolume(seen.mean(1), corner))
        found = pareto.reflected(value, pareto.hypervolume(pareto.draws(cells, n_resamples=300), corner))
        covered += found.low <= area <= found.high
        too_large.append(value - area)
    assert np.mean(too_large) > 0
    assert covered >= 42  # 70 %: three seeds
