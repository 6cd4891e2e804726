"""Scores of an extraction against planted shares, brute force in float64, simulation and hand-made cases."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import one_line
from extraction_helper import Given, copies, law, numbered, partial
from scipy import stats

from mdiff.config import Audit
from mdiff.features.pixel import PixelPCA
from mdiff.probes import against, extraction
from mdiff.types import Estimate

CFG = Audit(bootstrap=300)
TRAIN, HELDOUT = law(60, 1), law(60, 2)
SETS = {"train": TRAIN, "heldout": HELDOUT}


def score(generated, references=None, **options):
    return extraction.score(generated, references or SETS, CFG, **({"control": "heldout"} | options))


@pytest.fixture(scope="module")
def memorizer():
    return score(copies(TRAIN, 300, 3))


def test_a_perfect_memorizer_gives_everything_away(memorizer):
    found = memorizer["train"].estimates
    for name in against.VERDICTS:
        assert found[name].value == 1
    for name in ("memorized", "calibrated", "inauthentic", "area"):  # all of this law are within cosine 0.5
        assert found[f"{name}_excess"].low > 0.1
    assert found["memorized_excess"].value == pytest.approx(1, abs=0.02)
    # 300 draws from 60: an image is missed with probability (59/60)^300 = 0.6 %
    assert found["coverage"].value >= 58 / 60
    assert found["unique_per_generation"].value == pytest.approx(found["coverage"].value * 60 / 300)
    assert found["area"].value > 0.99
    assert 58 <= found["chao1"].value <= 60
    assert memorizer["heldout"].estimates["memorized"].value < 0.02
    assert "memorized_excess" not in memorizer["heldout"].estimates


def test_fresh_draws_have_no_excess():
    found = score(law(400, 4))["train"].estimates
    for name in (*against.VERDICTS, "area", "coverage"):
        excess = found[f"{name}_excess"]
        assert excess.low <= 0.01 and excess.high >= -0.01, name
        assert abs(excess.value) < 0.1
    assert found["memorized"].value < 0.02


def test_a_planted_share_is_recovered():
    planted = np.mean(np.random.default_rng(5).random(500) < 0.3)
    found = score(partial(TRAIN, 500, 0.3, 5))["train"].estimates
    assert found["memorized"].value == pytest.approx(planted, abs=0.01)
    assert found["memorized_excess"].low < planted < found["memorized_excess"].high


def test_copies_of_the_control_have_a_negative_excess():
    found = score(copies(HELDOUT, 100, 6))["train"].estimates
    for name in ("memorized", "calibrated", "area", "p95", "coverage", "inauthentic"):
        assert found[f"{name}_excess"].high < 0, name
    curve = score(copies(HELDOUT, 100, 6))["train"].curves
    assert curve["cosine"]["excess"][60] < -0.9  # at 0.90
    assert curve["rms"]["excess"][1] < -0.9  # at 0.02


def test_every_column_by_brute_force():
    generated = partial(TRAIN, 40, 0.5, 7)
    rng = np.random.default_rng(0)
    project = rng.normal(size=(64, 5))

    class Space:
        name = "projected"

        def __call__(self, images):
            return (images.reshape(len(images), -1) / 255.0 - 0.4) @ project

    one = score(generated, features=Space())["train"]
    a, b = (x.reshape(len(x), -1).astype(float) / 255 for x in (generated, TRAIN))
    dist = np.sqrt(((a[:, None] - b) ** 2).mean(-1))
    ranked = np.sort(dist, axis=1)
    np.testing.assert_array_equal(one.columns["nearest"], dist.argmin(1))
    np.testing.assert_allclose(one.columns["d1"], ranked[:, 0], atol=1e-6)
    np.testing.assert_array_equal(one.columns["memorized"], ranked[:, 0] / ranked[:, 1] < 1 / 3)
    np.testing.assert_array_equal(
        one.columns["calibrated"], ranked[:, 0] / (0.5 * ranked[:, :50].mean(1)) < 1
    )
    within = np.sqrt(((b[:, None] - b) ** 2).mean(-1)) + 9 * np.eye(60)
    np.testing.assert_array_equal(one.columns["inauthentic"], ranked[:, 0] <= within.min(1)[dist.argmin(1)])
    p, q = Space()(generated), Space()(TRAIN)
    cosines = (p @ q.T) / np.linalg.norm(p, axis=1)[:, None] / np.linalg.norm(q, axis=1)
    np.testing.assert_allclose(one.columns["cosine"], cosines.max(1), atol=1e-9)
    np.testing.assert_array_equal(one.columns["over_half"], cosines.max(1) > 0.5)
    edges = [0.4, 0.5, 0.6, 9]
    for band, low, high in zip(one.bands, edges, edges[1:], strict=False):
        inside = (cosines >= low) & (cosines < high)
        assert band["ums_any_pair"].value == pytest.approx(inside.any(0).sum() / 40)
        best = cosines.max(1)
        assert band["ams"].value == pytest.approx(np.mean((best >= low) & (best < high)))


def test_the_area_is_the_integral_of_ams_and_p95_a_quantile():
    one = score(partial(TRAIN, 150, 0.3, 8))["train"]
    best = one.columns["cosine"]
    tau = (np.arange(200_000) + 0.5) / 200_000
    ams = 1 - np.searchsorted(np.sort(best), tau) / len(best)
    assert one.estimates["area"].value == pytest.approx(ams.mean(), abs=1e-5)
    p95 = one.estimates["p95"]
    assert p95.value == np.quantile(best, 0.95, method="inverted_cdf")
    assert p95.low <= p95.value <= p95.high and {p95.low, p95.high} <= set(best)


def test_the_interval_of_p95_covers():
    rng = np.random.default_rng(9)
    truth, covered = stats.norm(0.4, 0.05).ppf(0.95), []
    for _ in range(300):
        found = against._interval(rng.normal(0.4, 0.05, 200), "p95", CFG)
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) >= 0.93
    few = against._interval(rng.normal(0.4, 0.05, 20), "p95", CFG)
    assert math.isnan(few.high)  # 20 values bound no 95th percentile from above


def test_ums_exceeds_ams_by_any_pair_and_never_by_the_nearest():
    # One generation at cosine 0.45 from three images: AMS(low) is 1, and three images are credited to it.
    rows = [[1, 0, 0, 0], *([0.45, *np.sqrt(1 - 0.45**2) * np.eye(3)[i]] for i in range(3)), [-1, 0, 0, 0]]
    references = {"train": numbered([1, 2, 3, 4])}
    found = extraction.score(numbered([0], 1), references, CFG, features=Given(rows))
    low = found["train"].bands[0]
    assert (low["band"], low["ams"].value, low["ums"].value, low["ums_any_pair"].value) == ("low", 1, 1, 3)
    for name in ("cosine", "rms"):
        for seed in range(3):
            curve = score(partial(TRAIN, 80, 0.5, 20 + seed))["train"].curves[name]
            assert np.all(np.array(curve["ums"]) <= np.array(curve["ams"]))


def test_bands_add_up_to_the_cumulative_and_curves_never_rise():
    one = score(partial(TRAIN, 200, 0.2, 9))["train"]
    curve = one.curves["cosine"]
    tau = np.array(curve["tau"])
    assert tau[0] == 0.3 and tau[-1] == 1 and len(tau) == 71
    assert (np.diff(curve["ams"]) <= 0).all() and (np.diff(curve["ums"]) <= 0).all()
    assert (np.diff(one.curves["rms"]["ams"]) >= 0).all()
    at = {t: i for i, t in enumerate(tau)}
    for band, (low, high) in zip(one.bands, ((0.4, 0.5), (0.5, 0.6), (0.6, None)), strict=True):
        for name in ("ams", "ums"):
            rest = curve[name][at[high]] if high else 0
            assert band[name].value == pytest.approx(curve[name][at[low]] - rest)


def test_excess_curves_are_differences():
    found = score(partial(TRAIN, 200, 0.3, 9))
    for kind in ("cosine", "rms"):
        one, other = (np.array(found[name].curves[kind]["ams"]) for name in ("train", "heldout"))
        curve = found["train"].curves[kind]
        np.testing.assert_allclose(curve["excess"], one - other, atol=1e-12)
        assert (np.array(curve["excess_low"]) <= curve["excess"]).all()
        assert (np.array(curve["excess_high"]) >= curve["excess"]).all()


def test_near_duplicates_count_once():
    doubled = np.concatenate([TRAIN[:30], TRAIN[:30]])
    found = score(TRAIN[:30], {"train": doubled, "heldout": HELDOUT})
    one = found["train"]
    assert one.clusters == 30
    assert one.estimates["memorized"].value == 1
    assert (one.estimates["coverage"].value, one.estimates["coverage"].n) == (1, 30)
    assert any("60 images are 30 different" in note for note in found.notes)


def test_rarefaction_against_subsets():
    found = score(partial(TRAIN, 300, 0.4, 10), at=(20, 100, 300))["train"]
    owner = np.where(found.columns["memorized"], found.labels[found.columns["nearest"]], -1)
    rng = np.random.default_rng(0)
    for estimate in found.rarefaction:
        sizes = [len(set(rng.permutation(owner)[: estimate.n]) - {-1}) for _ in range(2000)]
        assert estimate.value == pytest.approx(np.mean(sizes), abs=4 * np.std(sizes) / np.sqrt(2000) + 1e-9)


def test_three_denominators_by_hand():
    # 10 generations for 4 prompts (one not asked for): images 0 twice and 5 once are copied, for prompts 7 and 2.
    generated = law(10, 11)
    generated[[0, 1]], generated[4] = TRAIN[0], TRAIN[5]
    prompts = np.array([7, 7, 1, 1, 2, 2, 0, 0, 0, -1])
    found = score(generated, prompts=prompts)["train"].estimates
    assert found["unique_per_generation"].value == pytest.approx(2 / 10)
    assert found["unique_per_prompt"].value == pytest.approx(2 / 4)
    assert found["coverage"].value == pytest.approx(2 / 60)
    assert found["prompts_with_copies"].value == pytest.approx(2 / 4)
    assert [found[k].n for k in ("unique_per_generation", "unique_per_prompt", "coverage")] == [10, 4, 60]
    assert "unique_per_prompt" not in score(generated)["train"].estimates


def test_the_crossed_design():
    """One set of generations, half of them copies of A, against A, B and C."""
    a, b, c = (law(50, seed) for seed in (12, 13, 14))
    found = score(partial(a, 300, 0.5, 15), {"A": a, "B": b, "C": c}, control="C")
    copied = found["A"].columns["memorized"].mean()
    assert found["A"].estimates["memorized_excess"].value == pytest.approx(0.5, abs=0.08)
    assert abs(found["B"].estimates["memorized_excess"].value) < 0.02
    one, other = extraction.excess_of(found, "A", "B"), extraction.excess_of(found, "B", "A")
    for name in ("memorized", "area", "coverage", "inauthentic"):
        assert one[name].low > 0 and other[name].high < 0
        assert one[name].value == pytest.approx(-other[name].value)
    assert one["memorized"].value == pytest.approx(copied - found["B"].columns["memorized"].mean())
    same = extraction.excess_of(found, "B", "C")
    assert same["memorized"].low < 0.01 and same["area"].low < 0.01
    with one_line("'D'", "A, B, C"):
        extraction.excess_of(found, "A", "D")


def test_the_order_and_names_of_sets_do_not_matter_to_the_audit_s_numbers():
    from mdiff.probes.audit import audit

    generated = partial(TRAIN, 100, 0.3, 16)
    found, known = score(generated)["train"].estimates, audit(generated, TRAIN, HELDOUT, CFG).estimates
    for ours, theirs in (
        ("memorized", "memorized"),
        ("memorized_excess", "excess"),
        ("calibrated", "calibrated"),
    ):
        assert found[ours] == known[theirs]


def test_the_space_of_several_sets_is_fitted_on_all_of_each():
    a, b, c = (law(n, seed) for n, seed in ((40, 12), (40, 13), (50, 14)))
    found = score(law(20, 15), {"A": a, "B": b, "C": c}, control="C")
    assert len(found["C"].labels) == 40
    space = PixelPCA.fit(np.concatenate([a, b, c[found["C"].origin]]), CFG.components)
    p, q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (space(law(20, 15)), space(a)))
    np.testing.assert_allclose(found["A"].columns["cosine"], (p @ q.T).max(1), atol=1e-6)


def test_counts_are_bounded_by_generations():
    found = score(TRAIN[:3], prompts=np.array([0, 0, 1]))["train"].estimates
    assert found["unique_per_generation"].value == found["unique_per_generation"].high == 1
    assert (found["unique_per_prompt"].value, found["unique_per_prompt"].high) == (1.5, 1.5)


def test_pooling_counts_an_image_once_and_seeds_as_seeds():
    several = [
        score(partial(TRAIN, 100, share, 40 + i), prompts=np.arange(100) % 7)
        for i, share in enumerate((0.1, 0.3, 0.5))
    ]
    pooled, means = extraction.pool(several)
    assert pooled.n == 300 and len(pooled.prompts) == 300 and len(np.unique(pooled.prompts)) == 21
    whole = score(
        np.concatenate([partial(TRAIN, 100, share, 40 + i) for i, share in enumerate((0.1, 0.3, 0.5))])
    )
    for key, estimate in whole["train"].estimates.items():
        got = pooled["train"].estimates[key]
        np.testing.assert_allclose(
            (got.value, got.low, got.high), (estimate.value, estimate.low, estimate.high)
        )
    assert [r["ums_any_pair"] for r in pooled["train"].bands] == [
        r["ums_any_pair"] for r in whole["train"].bands
    ]
    values = [s["train"].estimates["memorized_excess"].value for s in several]
    mean = means["train"]["memorized_excess"]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (mean.value, mean.low, mean.high, mean.n) == (
        pytest.approx(np.mean(values)),
        pytest.approx(low),
        pytest.approx(high),
        3,
    )
    assert mean.high - mean.low > 2 * (
        pooled["train"].estimates["memorized_excess"].high - pooled["train"].estimates["memorized_excess"].low
    )
    _, alone = extraction.pool(several[:1])
    assert math.isnan(alone["train"]["memorized"].low)


def test_pooling_different_sets_puts_them_side_by_side():
    other = law(60, 50)
    several = [score(TRAIN), score(other, {"train": other, "heldout": HELDOUT})]
    pooled, _ = extraction.pool(several)
    coverage = pooled["train"].estimates["coverage"]
    assert (coverage.value, coverage.n) == (1, 120)
    assert pooled["heldout"].estimates["coverage"].n == 60


def test_the_control_is_cut_and_notes_say_what_is_wrong():
    found = score(law(20, 51), {"train": TRAIN[:40], "heldout": HELDOUT})
    assert len(found["heldout"].labels) == 40
    found = score(law(20, 51), {"train": TRAIN, "heldout": np.concatenate([HELDOUT[:20], TRAIN[:5]])})
    assert any("only 25 images" in note for note in found.notes)
    assert any("5 of 25 images of the control are near-duplicates" in note for note in found.notes)
    assert any("no control" in note for note in extraction.score(law(20, 51), {"train": TRAIN}, CFG).notes)


def test_json_is_strict_and_rates_are_whole(memorizer):
    tree = json.loads(json.dumps(extraction.to_json(memorizer), allow_nan=False))
    rate = tree["references"]["train"]["estimates"]["memorized"]
    assert set(rate) == {"value", "low", "high", "n"} and rate["value"] == 1 and rate["n"] == 300
    assert set(tree["references"]["train"]["bands"][0]["ums_any_pair"]) == {"value", "low", "high", "n"}
    assert len(tree["references"]["train"]["curves"]["cosine"]["excess"]) == 71


def test_flips_find_mirrored_copies():
    mirrored = TRAIN[:, :, ::-1]
    blind = score(mirrored)["train"].estimates["memorized"].value
    seeing = extraction.score(mirrored, SETS, replace(CFG, flips=True), control="heldout")["train"]
    assert blind < 0.1 and seeing.estimates["memorized"].value == 1
    assert seeing.estimates["area"].value > 0.99


def test_difference_of_independent_rates():
    # Newcombe 1998, example (a) of his paper on independent rates: 56/70 - 48/80, method 10: 0.0524 to 0.3339
    from mdiff.probes.intervals import wilson

    found = against.difference(wilson(56, 70), wilson(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert against.difference(Estimate(0.5, 0.4, 0.6, 9), Estimate(0.7, 0.6, 0.9, 9)).high < 0.1


def test_wrong_inputs_are_one_line():
    generated = law(10, 60)
    with one_line("B: images are 4x4x1", "8x8x1"):
        score(generated, {"A": TRAIN, "B": TRAIN[:, :4, :4], "heldout": HELDOUT})
    with one_line("references", "control 'C'"):
        score(generated, SETS, control="C")
    with one_line("references: heldout"):
        score(generated, {"heldout": HELDOUT})
    with one_line("prompts", "10 generations"):
        score(generated, prompts=np.zeros(9, int))
    with one_line("prompts", "float64"):
        score(generated, prompts=np.zeros(10))
    with one_line("at = 5..11", "1..10"):
        score(generated, at=(5, 11))
    with one_line("scores: none"):
        extraction.pool([])
    with one_line("pool those of one design"):
        extraction.pool([score(generated), extraction.score(generated, {"train": TRAIN}, CFG)])
    with one_line("audit settings"):
        extraction.pool([score(generated), extraction.score(generated, SETS, Audit(), control="heldout")])
    broken = TRAIN / 127.5 - 1
    broken[3] = np.nan
    with one_line("train: 1 of 60"):
        score(generated, {"train": broken, "heldout": HELDOUT})
