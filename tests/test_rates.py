"""Rates of detectors against brute force, scikit-learn, hand-made cases and simulated coverage."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mdiff.errors import UserError
from mdiff.probes import rates
from mdiff.probes.rates import Rates


def case(seed=0, verbatim=30, template=20, none=250, left=10, shift=2.0, ties=False):
    rng = np.random.default_rng(seed)
    truth = np.repeat(["verbatim", "template", "none", ""], [verbatim, template, none, left])
    up = np.select([truth == "verbatim", truth == "template"], [shift, shift / 2], 0)
    scores = rng.normal(size=len(truth)) + up
    order = rng.permutation(len(truth))
    return (np.round(scores, 1) if ties else scores)[order], truth[order]


def brute(up, down, wanted):
    """(nearest, below): (share found, false alarms), by trying every threshold."""
    points = [(0, 0)] + [(int(np.sum(down >= c)), int(np.sum(up >= c))) for c in np.unique([*up, *down])]
    n, m = len(down), len(up)
    near = min(abs(round(a / n - wanted, 12)) for a, _ in points)
    lowest = min(a for a, _ in points if abs(round(a / n - wanted, 12)) == near)
    nearest = max(h for a, h in points if a == lowest), lowest
    highest = max(a for a, _ in points if round(a / n, 12) < wanted)
    below = max(h for a, h in points if a == highest), highest
    return tuple((h / m, a / n) for h, a in (nearest, below))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("wanted", [0.01, 0.1])
def test_against_brute_force(seed, ties, wanted):
    scores, truth = case(seed, ties=ties, none=(250, 100, 150, 40, 77, 1)[seed])
    found = rates.evaluate("d", scores, truth, false_alarms=wanted, n_resamples=50)
    groups = {"verbatim": ("verbatim",), "template": ("template",), "both": ("verbatim", "template")}
    for group, kinds in groups.items():
        one, up, down = found[group], scores[np.isin(truth, kinds)], scores[truth == "none"]
        assert (one.memorized, one.others) == (len(up), len(down))
        known = np.isin(truth, [*kinds, "none"])
        np.testing.assert_allclose(one.auroc.value, roc_auc_score(truth[known] != "none", scores[known]))
        for point, (share, alarms) in zip((one.nearest, one.below), brute(up, down, wanted), strict=True):
            np.testing.assert_allclose((point.share.value, point.false_alarms), (share, alarms), atol=1e-12)
            assert np.mean(up >= point.threshold) == pytest.approx(share)
            assert np.mean(down >= point.threshold) == pytest.approx(alarms)
            assert point.share.low <= share <= point.share.high and point.share.n == len(up)
        assert one.auroc.low <= one.auroc.value <= one.auroc.high
        false, true = np.array(one.false), np.array(one.true)
        assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
        np.testing.assert_allclose(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2), one.auroc.value)


def test_the_two_conventions_by_hand():
    """100 others, 4 memorized: above all, above all but 1, above all but 2, in the middle."""
    scores = np.concatenate([np.arange(100.0), [200.0, 98.5, 97.5, 50.5]])
    truth = np.array(["none"] * 100 + ["verbatim"] * 4)
    found = rates.evaluate("d", scores, truth, n_resamples=0)["verbatim"]
    # One false alarm of 100 is 1 %, exactly what is asked for, and not under it.
    assert (found.nearest.share.value, found.nearest.false_alarms, found.nearest.threshold) == (
        0.5,
        0.01,
        98.5,
    )
    assert (found.below.share.value, found.below.false_alarms, found.below.threshold) == (0.25, 0.0, 200.0)
    np.testing.assert_allclose(found.auroc.value, (100 + 99 + 98 + 51) / 400)


def test_no_score_above_any_other():
    """A threshold that lets nothing pass is a point of the curve."""
    scores, truth = np.array([1.0, 0.0, 2.0]), np.array(["verbatim", "verbatim", "none"])
    found = rates.evaluate("d", scores, truth)["both"]
    assert found.below.share.value == 0 and found.below.threshold == math.inf
    assert found.auroc.value == 0


def test_the_direction_matters():
    scores, truth = case(1)
    up, down = (rates.evaluate("d", sign * scores, truth, n_resamples=0)["both"] for sign in (1, -1))
    assert up.auroc.value > 0.8 and up.below.share.value > 0.1
    np.testing.assert_allclose(up.auroc.value + down.auroc.value, 1)
    assert down.below.share.value < 0.05


def test_intervals_are_never_of_zero_width():
    scores, truth = np.arange(60.0), np.array(["none"] * 40 + ["verbatim"] * 20)
    found = rates.evaluate("d", scores, truth)["verbatim"]
    for each in (found.auroc, found.nearest.share, found.below.share):
        assert each.value == 1 and each.high == 1 and 0.75 < each.low < 0.99


def test_a_group_without_prompts():
    scores, truth = case(template=0)
    found = rates.evaluate("d", scores, truth, n_resamples=10)
    empty = found["template"]
    assert empty.memorized == 0 and math.isnan(empty.auroc.value) and empty.false == ()
    assert (empty.below.share.low, empty.below.share.high) == (0, 1)
    assert found["both"].auroc == found["verbatim"].auroc
    alone = rates.evaluate("d", scores[truth != "none"], truth[truth != "none"])
    assert alone["verbatim"].others == 0 and math.isnan(alone["verbatim"].below.share.value)


def test_left_out_prompts_do_not_count():
    scores, truth = case(2)
    changed = np.where(truth == "", 1e6, scores)
    one, other = (rates.evaluate("d", s, truth, n_resamples=20) for s in (scores, changed))
    assert one == other


def test_bootstrap_agrees_with_resampled_evaluation():
    """The interval's bootstrap part against prompts drawn by hand and evaluated one by one."""
    scores, truth = case(3, none=300)
    found = rates.evaluate("d", scores, truth, n_resamples=2000)["verbatim"]
    up, down = scores[truth == "verbatim"], scores[truth == "none"]
    rng, draws = np.random.default_rng(0), []
    for _ in range(600):
        again = rng.choice(up, len(up)), rng.choice(down, len(down))
        draws.append([share for share, _ in brute(*again, 0.01)])
    for point, column in zip((found.nearest, found.below), np.transpose(draws), strict=True):
        low, high = np.quantile(column, [0.025, 0.975])
        assert point.share.low <= low + 0.05 and point.share.high >= high - 0.05
        assert point.share.high - point.share.low < high - low + 0.2


def test_coverage():
    """The share found at 1 % false alarms by the true law's threshold lies in nine of ten intervals and more."""
    from scipy.stats import norm

    truth = np.repeat(["verbatim", "none"], [50, 400])
    inside = {"auroc": 0, "below": 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=450) + 2 * (truth == "verbatim")
        found = rates.evaluate("d", scores, truth, n_resamples=100, seed=seed)["verbatim"]
        share, area = norm.sf(norm.isf(0.01) - 2), norm.cdf(2 / 2**0.5)
        inside["below"] += found.below.share.low <= share <= found.below.share.high
        inside["auroc"] += found.auroc.low <= area <= found.auroc.high
    assert min(inside.values()) >= 54, inside


@pytest.mark.parametrize("empty", [False, True])
def test_json(empty):
    scores, truth = case(4, template=0 if empty else 20)
    if empty:
        scores = np.where(truth == "none", scores + 100, scores)  # nothing passes: infinite thresholds
    for one in rates.evaluate("d", scores, truth, n_resamples=20).values():
        tree = json.loads(json.dumps(one.to_json(), allow_nan=False))
        back = Rates.from_json(tree)
        assert back.to_json() == one.to_json() and repr(back) == repr(one)
    with pytest.raises(UserError, match="damaged record"):
        Rates.from_json({"name": "d"})
    with pytest.raises(UserError, match="damaged record"):
        Rates.from_json({**tree, "auroc": None})


def test_wrong_inputs():
    scores, truth = case()
    for call, says in (
        (lambda: rates.evaluate("d", scores[1:], truth), "give one each"),
        (lambda: rates.evaluate("d", scores[:0], truth[:0]), "give one each"),
        (lambda: rates.evaluate("d", np.full(len(truth), np.nan), truth), "310 of 310 scores are not finite"),
        (lambda: rates.evaluate("d", scores, np.where(truth == "", "mem", truth)), "'mem' is none of"),
        (lambda: rates.evaluate("d", scores, truth, false_alarms=0.0), "false_alarms = 0.0"),
    ):
        with pytest.raises(UserError) as raised:
            call()
        assert says in str(raised.value) and "\n" not in str(raised.value)
