"""Training noise levels against scipy's laws, and sampling grids against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from mdiff import config
from mdiff.errors import UserError
from mdiff.process import laws
from mdiff.process.times import make_grid, make_times

KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
LAWS = ("lognormal", "uniform", "logsnr", "logit_normal")
LOW, HIGH = 0.002, 80.0


def level_of(kind, t):
    """float64 noise level of a time, from the definition of the law."""
    return {
        "ve": lambda: 80.0 * t**7,
        "vp_linear": lambda: np.sqrt(np.expm1(0.1 * t + (20.0 - 0.1) * t**2 / 2)),
        "vp_cosine": lambda: np.tan(np.pi * t / 2),
        "flow": lambda: t / (1 - t),
    }[kind]()


def time_of(kind, level):
    """Its inverse, by bisection."""
    low, high = np.zeros_like(level), np.ones_like(level)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (
            np.where(level_of(kind, middle) < level, middle, low),
            np.where(level_of(kind, middle) < level, high, middle),
        )
    return (low + high) / 2


def expected_quantile(kind, law, u, mean, std):
    """float64 noise level at probability u, by scipy's quantile functions."""
    if law == "lognormal":
        return stats.lognorm.ppf(u, std, scale=np.exp(mean))
    if law == "logsnr":
        return stats.loguniform.ppf(u, LOW, HIGH)
    if law == "uniform":
        ends = time_of(kind, np.array([LOW, HIGH]))
        return level_of(kind, stats.uniform.ppf(u, ends[0], ends[1] - ends[0]))
    return level_of(kind, expit(stats.norm.ppf(u, mean, std)))


def times_of(kind="ve", law="lognormal", **fields):
    span = config.Process(kind=kind)
    mean = {"lognormal": -1.2, "logit_normal": 0.1}.get(law, 0.0)
    loss = config.Loss(**{"times": law, "p_mean": mean, "p_std": 0.9, **fields})
    return make_times(loss, laws.make_process(span), span)


def draw(times, n, seed=0):
    return np.asarray(jax.jit(lambda key: times.draw(key, n))(jax.random.key(seed)))


def draw_many(times, n, runs):
    """[runs, n] independent batches, compiled once."""
    seeds = jax.random.split(jax.random.key(1), runs)
    return np.asarray(jax.jit(jax.vmap(lambda key: times.draw(key, n)))(seeds))


# ---------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", LAWS)
def test_quantiles_are_scipys(kind, law):
    times = times_of(kind, law)
    u = np.float32(np.r_[1e-5, np.linspace(0.001, 0.999, 201), 1 - 1e-5])
    expected = expected_quantile(kind, law, np.float64(u), {"lognormal": -1.2}.get(law, 0.1), 0.9)
    sigma = np.asarray(times.sigma(u))
    # Near u = 0 and 1 of `ve`, t**7 magnifies a rounded t by 7, and ppf's own slope the rest.
    np.testing.assert_allclose(sigma, expected, rtol=1e-4 if kind == "ve" else 2e-5)
    np.testing.assert_allclose(times.cdf(jnp.float32(expected)), u, atol=2e-6)
    assert np.all(np.diff(sigma) > 0)


def test_tails_keep_their_digits():
    """The complement of u is carried along, so the upper tail is as exact as the lower one."""
    times = times_of(p_mean=0.0, p_std=1.0, cutoff=80.0, share=0.5)
    assert times.natural == pytest.approx(stats.norm.sf(np.log(80.0)), rel=1e-5)
    u = np.float32(1 - np.linspace(0.001, 0.499, 50))
    tail = 2 * (1 - np.float64(u)) * stats.norm.sf(np.log(80.0))
    np.testing.assert_allclose(times.sigma(u), np.exp(stats.norm.isf(tail)), rtol=1e-5)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_draws_follow_the_law(law, stratified):
    times = times_of("flow", law, stratified=stratified)
    drawn = draw(times, 20_000)
    mean = {"lognormal": -1.2}.get(law, 0.1)
    grid = expected_quantile("flow", law, np.linspace(0.01, 0.99, 99), mean, 0.9)
    distance = np.abs(np.mean(drawn[:, None] < grid, axis=0) - np.linspace(0.01, 0.99, 99)).max()
    assert distance < (1.5e-4 if stratified else 1.63 / np.sqrt(20_000))  # Kolmogorov's 1 % point
    assert drawn.dtype == np.float32 and np.all(np.isfinite(drawn)) and np.all(drawn > 0)


def test_default_law_is_edms():
    log = np.log(draw(make_times(config.Loss(), laws.VarianceExploding(), config.Process()), 200_000))
    assert log.mean() == pytest.approx(-1.2, abs=0.01)
    assert log.std() == pytest.approx(1.2, abs=0.01)
    assert stats.kurtosis(log) == pytest.approx(0.0, abs=0.05)


# --------------------------------------------------------------------------------- share and cutoff


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("share", "cutoff"), [(0.5, 1.3), (0.07, 0.2), (0.93, 4.0)])
def test_share_is_exact_and_branches_keep_their_law(law, share, cutoff):
    natural, shared = times_of("vp_cosine", law), times_of("vp_cosine", law, share=share, cutoff=cutoff)
    drawn = draw(shared, 40_000)
    above = drawn >= np.float32(cutoff)
    assert stats.binomtest(int(above.sum()), len(drawn), share).pvalue > 1e-3
    before = float(natural.cdf(jnp.float32(cutoff)))
    # Within a branch, the law's own probabilities, rescaled, are uniform again.
    own = np.asarray(natural.cdf(drawn), np.float64)
    assert stats.kstest(own[~above] / before, "uniform").pvalue > 1e-3
    assert stats.kstest((own[above] - before) / (1 - before), "uniform").pvalue > 1e-3
    np.testing.assert_allclose(shared.cdf(shared.sigma(own[:500])), own[:500], atol=3e-6)


@pytest.mark.parametrize("cutoff", [0.37, 0.1, 1.0, 3.3333])
def test_no_rounding_across_the_cutoff(cutoff):
    times = times_of("flow", share=0.4, cutoff=cutoff)
    u = np.float32(0.6) + np.arange(-3000, 3000, dtype=np.float32) * np.float32(2.0**-24)
    above = np.asarray(times.sigma(u) >= cutoff)
    np.testing.assert_array_equal(above, u >= np.float32(0.6))
    assert above.any() and not above.all()


def test_natural_share_changes_nothing():
    natural = times_of()
    share = stats.norm.sf((np.log(0.8) + 1.2) / 0.9)
    u = np.float32(np.linspace(0.001, 0.999, 501))
    np.testing.assert_allclose(times_of(share=share, cutoff=0.8).sigma(u), natural.sigma(u), rtol=2e-5)


def test_share_of_a_stratified_batch_is_as_even_as_possible():
    for n, share in ((32, 0.3), (8, 0.5), (50, 0.05)):
        times = times_of(share=share, cutoff=1.0, stratified=True)
        counts = np.sum(draw_many(times, n, 100) >= 1.0, axis=1)
        assert set(counts) <= {int(np.floor(n * share)), int(np.ceil(n * share))}
        assert counts.mean() == pytest.approx(n * share, abs=4 * 0.5 / np.sqrt(100))


# ------------------------------------------------------------------------------------ stratification


def test_stratified_draws_take_one_from_each_part():
    times, n = times_of(stratified=True), 64
    batches = np.asarray(times.cdf(draw_many(times, n, 400)))
    ranks = np.floor(np.sort(batches, axis=1) * n - 1e-3)
    assert np.mean(ranks == np.arange(n)) > 0.99  # up to float32 at the parts' edges
    gaps = np.diff(np.sort(batches, axis=1), axis=1)
    np.testing.assert_allclose(gaps, 1 / n, atol=1e-5)
    # The common shift is uniform over a part.
    assert stats.kstest(np.sort(batches, axis=1)[:, 0] * n, "uniform").pvalue > 1e-3


def test_place_in_the_batch_says_nothing_about_the_level():
    times, n, runs = times_of(stratified=True), 16, 3000
    batches = np.asarray(times.cdf(draw_many(times, n, runs)))
    for place in range(n):  # each place has the whole law
        assert stats.kstest(batches[:, place], "uniform").pvalue > 1e-4, place
    halves = batches[:, : n // 2].mean(1) - batches[:, n // 2 :].mean(1)  # two devices
    assert abs(halves.mean()) < 4 * halves.std() / np.sqrt(runs)
    neighbours = np.corrcoef(batches[:, 0], batches[:, 1])[0, 1]
    assert neighbours == pytest.approx(-1 / (n - 1), abs=4 / np.sqrt(runs))  # drawn without replacement


def test_draws_are_a_function_of_the_key():
    for stratified in (False, True):
        times = times_of(stratified=stratified)
        np.testing.assert_array_equal(draw(times, 9, 3), draw(times, 9, 3))
        assert not np.any(np.isin(draw(times, 9, 3), draw(times, 9, 4)))


def test_times_can_be_made_inside_a_jit():
    @jax.jit
    def inside(key):
        return times_of("flow", "uniform", share=0.3, cutoff=1.0).draw(key, 50)

    expected = draw(times_of("flow", "uniform", share=0.3, cutoff=1.0), 50)
    np.testing.assert_allclose(inside(jax.random.key(0)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"share": 1.0, "cutoff": 1.0}, "loss.share = 1.0: must be 0"),
        ({"share": -0.1, "cutoff": 1.0}, "loss.share = -0.1: must be 0"),
        ({"share": 0.5}, "needs a loss.cutoff above 0"),
        ({"share": 0.5, "law": "uniform", "cutoff": 90.0}, "no noise levels at or above cutoff 90.0"),
        ({"share": 0.5, "law": "logsnr", "cutoff": 0.001}, "no noise levels below cutoff 0.001"),
        ({"p_std": 0.0}, "p_std = 0.0"),
        ({"p_mean": float("nan")}, "p_mean = nan"),
        ({"p_std": 30.0}, "too wide for float32"),
        ({"kind": "flow", "law": "logit_normal", "p_std": 9.0}, "too wide for float32"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        times_of(**fields)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------- sampling grids


def grid_of(kind, name, steps=18):
    return make_grid(laws.make_process(config.Process(kind=kind)), name, steps, LOW, HIGH, 7.0)


@pytest.mark.parametrize("kind", KINDS)
def test_grids_are_spaced_as_they_say(kind):
    steps = 18
    for name in ("karras", "uniform", "logsnr"):
        grid = grid_of(kind, name, steps)
        assert grid.dtype == np.float32 and len(grid) == steps + 1
        assert grid[-1] == 0 and np.all(np.diff(grid) < 0)
        level = level_of(kind, grid[:-1].astype(np.float64))
        np.testing.assert_allclose(level[[0, -1]], [HIGH, LOW], rtol=2e-5)
        spaced = {"karras": level ** (1 / 7), "uniform": grid[:-1], "logsnr": np.log(level)}[name]
        gaps = np.diff(spaced)
        np.testing.assert_allclose(gaps, gaps.mean(), atol=1e-4 * abs(gaps.mean()))


def test_karras_grid_is_the_one_of_edm():
    i = np.arange(18, dtype=np.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    for kind in KINDS:
        level = level_of(kind, grid_of(kind, "karras")[:-1].astype(np.float64))
        np.testing.assert_allclose(level, expected, rtol=1e-5)
    assert grid_of("ve", "karras")[0] == 1.0


def test_a_grid_too_fine_for_float32_is_refused():
    with pytest.raises(UserError, match="cannot tell the times"):
        make_grid(laws.RectifiedFlow(), "logsnr", 200_000, LOW, 5000.0)
