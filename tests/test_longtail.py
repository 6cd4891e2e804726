"""Long tails: Feldman's constants, merging components, and the price of dropping singletons, by noise level."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from mdiff.errors import UserError
from mdiff.probes import longtail

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------ frequencies (T12)


def test_published_constants_of_zipf():
    """arXiv 1906.05271: 50,000 items, 50,000 samples."""
    law = longtail.zipf(50_000)
    assert 50_000 * longtail.tau(law, 50_000) == pytest.approx(0.4717, abs=1e-4)
    assert longtail.seen_share(law, 50_000) == pytest.approx(0.1704, abs=1e-4)


@pytest.mark.parametrize("seen", [0, 1, 2, 6])
def test_tau_against_exact_fractions(seen):
    each, n = [Fraction(1, k * 10) for k in range(1, 7)], 6
    top = sum(a ** (seen + 1) * (1 - a) ** (n - seen) for a in each)
    below = sum(a**seen * (1 - a) ** (n - seen) for a in each)
    assert longtail.tau(np.array(each, float), n, seen) == pytest.approx(float(top / below), rel=1e-12)


def test_shares_against_counting():
    """How often items really occur once and three times among 200 samples; all shares together are 1."""
    law, rng = longtail.zipf(100), np.random.default_rng(0)
    counts = rng.multinomial(200, law, size=4000)
    for seen in (1, 3):
        found = seen * (counts == seen).sum(1) / 200
        assert longtail.seen_share(law, 200, seen) == pytest.approx(
            found.mean(), abs=4 * found.std() / math.sqrt(4000)
        )
    assert sum(longtail.seen_share(law, 200, seen) for seen in range(201)) == pytest.approx(1)


def test_tau_against_simulation():
    """The mean frequency of the items that were seen once, over many samples."""
    law, rng = longtail.zipf(300), np.random.default_rng(0)
    once = rng.multinomial(300, law, size=4000) == 1
    assert longtail.tau(law, 300) == pytest.approx((once @ law).sum() / once.sum(), rel=0.01)
    assert longtail.tau(law, 10**9) == pytest.approx(law[-1], rel=1e-6)  # nothing underflows
    assert longtail.tau(np.array([1.0, 0.5]), 4) == pytest.approx(0.5)  # frequency 1 is never seen once of 4


def test_an_even_law_has_the_same_frequency_for_all():
    assert longtail.tau(np.full(50, 0.02), 50) == pytest.approx(0.02)
    assert longtail.zipf(50, 0.0) == pytest.approx(np.full(50, 0.02))
    assert longtail.zipf(4) == pytest.approx(np.array([12, 6, 4, 3]) / 25)


# --------------------------------------------------------------------------------- merging (lemma 4.5)


@pytest.mark.parametrize(("distance", "sigma"), [(0.0, 1.0), (0.3, 0.5), (2.0, 1.0), (3.0, 0.4)])
def test_total_variation_against_the_integral(distance, sigma):
    def apart(x):
        return abs(stats.norm.pdf(x, 0, sigma) - stats.norm.pdf(x, distance, sigma)) / 2

    found = integrate.quad(apart, -10, 14, points=(distance / 2,), limit=200)[0]
    assert longtail.total_variation(distance, sigma) == pytest.approx(found, abs=1e-7)
    assert found == pytest.approx(2 * stats.norm.cdf(distance / (2 * sigma)) - 1, abs=1e-7)


def mixture(width=0.1):
    means = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    return longtail.Mixture(means, np.array([0.5, 0.3, 0.2]), np.full(3, width))


def test_components_are_counted_by_what_can_be_told_apart():
    law, rng = mixture(), np.random.default_rng(0)
    x0, which = law.sample(rng, 4000)
    noise = rng.standard_normal(x0.shape)

    def count(sigma):
        return longtail.effective_components(law, x0 + sigma * noise, which, sigma)

    perplexity = math.exp(-np.sum(law.weights * np.log(law.weights)))
    assert count(0.05) == pytest.approx(perplexity, rel=0.02)
    assert count(200.0) == pytest.approx(1.0, abs=0.01)
    found = [count(sigma) for sigma in (0.05, 0.5, 1.0, 2.0, 8.0)]
    assert found == sorted(found, reverse=True)


def test_two_components_against_the_integral():
    """I(component; x) by quadrature."""
    law = longtail.Mixture(np.array([[-1.0], [1.0]]), np.array([0.3, 0.7]), np.array([0.2, 0.2]))
    total = math.hypot(0.2, 0.9)

    def integrand(x):
        p = np.array([0.3, 0.7]) * stats.norm.pdf(x, [-1, 1], total)
        return np.sum(p * np.log(p / p.sum() / np.array([0.3, 0.7])))

    exact = integrate.quad(integrand, -9, 9)[0]
    rng = np.random.default_rng(0)
    x0, which = law.sample(rng, 40_000)
    x = x0 + 0.9 * rng.standard_normal(x0.shape)
    assert math.log(longtail.effective_components(law, x, which, 0.9)) == pytest.approx(exact, abs=0.01)


# ------------------------------------------------------------------------------------ denoisers


@pytest.mark.parametrize("sigma", [0.05, 0.7, 5.0])
def test_denoiser_against_bayes_rule_on_a_grid(sigma):
    """E[x0 | x] in one dimension, by quadrature over x0."""
    law = longtail.Mixture(np.array([[-1.0], [0.5]]), np.array([0.3, 0.7]), np.array([0.2, 0.4]))
    grid = np.linspace(-4, 4, 80_001)
    prior = 0.3 * stats.norm.pdf(grid, -1, 0.2) + 0.7 * stats.norm.pdf(grid, 0.5, 0.4)
    for x in (-1.3, 0.1, 0.9):
        weight = prior * stats.norm.pdf(x, grid, sigma)
        exact = (weight * grid).sum() / weight.sum()
        assert law.denoise(np.array([[x]]), sigma)[0, 0] == pytest.approx(exact, abs=1e-6)


def test_no_denoiser_beats_the_one_that_knows_the_law():
    law, rng = mixture(0.3), np.random.default_rng(0)
    x0, _ = law.sample(rng, 20_000)
    x = x0 + 0.8 * rng.standard_normal(x0.shape)
    best = np.mean((law.denoise(x, 0.8) - x0) ** 2)
    others = (
        law.keep(np.array([True, True, False])),
        replace(law, means=law.means + 0.1),
        replace(law, widths=2 * law.widths),
        replace(law, weights=np.array([0.2, 0.3, 0.5])),
    )
    assert all(np.mean((other.denoise(x, 0.8) - x0) ** 2) > best for other in others)


def test_what_is_known_of_components_from_samples():
    samples = np.array([[1.0, 2.0], [3.0, 0.0], [5.0, 5.0]])
    known, counts = longtail.fit(samples, np.array([7, 7, 2]), 0.6)
    assert counts.tolist() == [1, 2]
    np.testing.assert_allclose(known.means, [[5, 5], [2, 1]])
    np.testing.assert_allclose(known.weights, [1 / 3, 2 / 3])
    np.testing.assert_allclose(known.widths, 0.6 * np.sqrt([2, 1.5]))
    left = known.keep(counts > 1)
    np.testing.assert_allclose(left.means, [[2, 1]])
    assert left.weights.sum() == 1


# ------------------------------------------------------------------------------------ the experiment

SMALL = longtail.World(components=60, n=60, size=16, width=0.001, draws=1500, repeats=8)


def by_hand(world):
    """Per repeat, without noise and in its limit: what the low and the high end of the gap must be."""
    law, low, high = longtail.zipf(world.components), [], []
    for seeds in np.random.SeedSequence(world.seed).spawn(world.repeats):
        rng = np.random.Generator(np.random.Philox(seeds))
        means = world.spread * rng.standard_normal((world.components, world.size))
        _, which = longtail.Mixture(means, law, np.full(len(law), world.width)).sample(rng, world.n)
        counts = np.bincount(which, minlength=len(law))
        lost = []
        for enough in (1, 2):
            kept = np.flatnonzero(counts >= enough)
            nearest = [min(np.sum((mean - means[k]) ** 2) for k in kept) for mean in means]
            centre = counts[kept] @ means[kept] / counts[kept].sum()
            lost.append((law @ nearest, np.sum((centre - law @ means) ** 2)))
        low.append((lost[1][0] - lost[0][0]) / world.size)
        high.append((lost[1][1] - lost[0][1]) / world.size)
    return np.mean(low), np.mean(high)


def test_dropping_singletons_costs_their_distance_at_low_noise_and_next_to_nothing_at_high():
    found = longtail.simulate(SMALL, [0.05, 1e4])
    below, above = found.levels
    low, high = by_hand(SMALL)
    # Points this narrow: a dropped or unseen one becomes its nearest neighbour among those kept.
    assert below.gap.low < low < below.gap.high
    assert below.gap.value == pytest.approx(low, rel=0.1)
    # All one: what is left is that the mean moves.
    assert above.gap.low < high < above.gap.high and abs(high) < low / 8
    assert below.relative.value > 100 and above.relative.value < 0.05
    assert below.apart.value > 0.99 and above.apart.value < 0.01
    assert below.components.value > 10 and above.components.value == pytest.approx(1, abs=0.01)


def test_feldmans_value_is_below_the_gap():
    """It counts the singletons only; that unseen items lie nearer when these are kept comes on top."""
    found = longtail.simulate(replace(SMALL, repeats=16), [0.05])
    assert found.tau == longtail.tau(longtail.zipf(60), 60)
    assert 0.6 * found.levels[0].gap.value < found.predicted.value < found.levels[0].gap.value
    assert found.singletons.low < longtail.seen_share(longtail.zipf(60), 60) < found.singletons.high


def test_narrow_noise_needs_no_memory_where_components_are_wide():
    """Below the components' own width the gap falls like sigma^4: the noisy sample says what it is."""
    found = longtail.simulate(replace(SMALL, width=0.3, repeats=4, draws=5000), [0.03, 0.06, 0.5])
    first, second, wide = found.levels
    assert second.gap.value / first.gap.value == pytest.approx(16, rel=0.15)
    assert first.relative.value < 0.03 < 0.1 < wide.relative.low


def test_the_same_seed_is_the_same_experiment_and_levels_do_not_interact():
    world = replace(SMALL, repeats=2, draws=50)
    both, one = longtail.simulate(world, [0.1, 1.0]), longtail.simulate(world, [1.0])
    assert both.levels[1] == one.levels[0]
    assert longtail.simulate(replace(world, seed=1), [1.0]).levels[0] != one.levels[0]


@pytest.mark.parametrize(
    ("world", "sigmas", "word"),
    [
        (replace(SMALL, components=1), [1.0], "components = 1"),
        (replace(SMALL, repeats=1), [1.0], "repeats = 1"),
        (replace(SMALL, width=0.0), [1.0], "width = 0.0"),
        (SMALL, [0.0], "sigma = 0.0"),
        (SMALL, [float("inf")], "sigma = inf"),
    ],
)
def test_worlds_that_cannot_be_are_refused(world, sigmas, word):
    with pytest.raises(UserError, match=word):
        longtail.simulate(world, sigmas)


def test_committed_result_is_the_experiments():
    """results/ambient/longtail.json says what the docs say, and its constants are those of the code."""
    tree = json.loads((ROOT / "results/ambient/longtail.json").read_text())
    assert tree["zipf_50000"]["n_tau_1"] == pytest.approx(0.4717, abs=1e-4)
    assert tree["zipf_50000"]["seen_once"] == pytest.approx(0.1704, abs=1e-4)
    for result in tree["results"]:
        world = longtail.World(**result["world"])
        assert result["tau"] == longtail.tau(longtail.zipf(world.components), world.n)
        gaps = [level["gap"]["value"] for level in result["levels"]]
        assert max(gaps) > 30 * gaps[-1]
        assert result["levels"][-1]["relative"]["high"] < 0.01
    assert (ROOT / "results/ambient/longtail.png").stat().st_size < 300_000
