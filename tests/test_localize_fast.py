"""Fast and gradient mode against exact mode, and against brute force over all sets."""

import math

import numpy as np
import pytest

from mdiff.errors import UserError
from mdiff.nemo import Nemo
from mdiff.probes import found, localize, localize_fast
from mdiff.probes.localize import Neurons


class Scores:
    """`score(prompt, off [N])` as an `Evaluate` that counts its rows."""

    def __init__(self, score):
        self.score, self.rows, self.calls = score, 0, 0

    def __call__(self, prompts, off):
        self.rows, self.calls = self.rows + len(off), self.calls + 1
        return np.float32([self.score(int(p), row) for p, row in zip(prompts, off, strict=True)])


def flat(n, layers=1):
    """Neurons without a story: mean 0, std 1, so that an activation of 9 is an outlier."""
    return Neurons(np.zeros(n), np.ones(n), np.arange(n) * layers // n)


def monotone(seed, n, prompts):
    """A score that falls with every neuron switched off, and a tau: a minimum over a few conjunctions of neurons."""
    rng = np.random.default_rng(seed)
    weight = rng.exponential(1, (prompts, n)) * (rng.random((prompts, n)) < 0.3)
    need = rng.random((prompts, 3, n)) < rng.choice([0.05, 0.15])

    def score(p, off):
        ways = max(0.5 if off[way].all() and way.any() else 0.0 for way in need[p])
        return math.exp(-weight[p] @ off) * (1 - ways)

    return score, float(rng.uniform(0.05, 0.6))


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("order", ["deep", "shallow"])
def test_monotone_scores_give_the_exact_neurons(width, order):
    cfg = Nemo(width=width, batch=8, order=order)
    removed = 0
    for seed in range(40):
        score, tau = monotone(seed, 18, 3)
        rng = np.random.default_rng(seed)
        a = rng.uniform(0, 9, (3, 18))
        exact = {r.prompt: r for r in localize.exact(Scores(score), a, flat(18, 3), tau, cfg)}
        for r in localize_fast.fast(Scores(score), a, flat(18, 3), tau, cfg):
            difference = found.disagreement(exact[r.prompt], r)
            assert difference.same and difference.iou == 1 and r.violations == 0
            assert (r.initial, r.tau_ref, r.score) == (
                exact[r.prompt].initial,
                exact[r.prompt].tau_ref,
                exact[r.prompt].score,
            )
            removed += len(r.initial) - len(r.refined)
    assert removed > 200


@pytest.mark.parametrize(("n", "k", "most"), [(54, 4, 30), (210, 21, 130), (674, 21, 201)])
def test_fewer_evaluations(n, k, most):
    """With k of n neurons needed, no more than plain doubling from 1 takes on average, verification aside."""
    rng = np.random.default_rng(k)
    need = np.zeros((20, n), bool)
    for row in need:
        row[rng.choice(n, k, replace=False)] = True
    evaluate = Scores(lambda p, off: 0.0 if off[need[p]].all() else 1.0)
    cfg = Nemo(width=1)
    got = list(localize_fast.fast(evaluate, np.full((20, n), 9.0), flat(n), 0.5, cfg))
    assert all(r.refined == tuple(np.flatnonzero(need[r.prompt])) for r in got)
    verified = np.mean([sum(d.stage == "verify" for d in r.decisions) for r in got])
    assert verified == k
    assert np.mean([r.evaluations for r in got]) - 1 - verified < most
    information = math.log2(math.comb(n, k))  # each test tells one bit at most
    assert np.mean([r.evaluations for r in got]) > information


def test_nothing_removable_costs_no_more_than_exact():
    """tau is never reached and every neuron counts: all stay, at about one test each."""
    evaluate = Scores(lambda p, off: 1 - off.mean() / 4)
    a = np.full((1, 60), 9.0)
    (r,) = localize_fast.fast(evaluate, a, flat(60), 0.1, Nemo(width=1))
    assert r.refined == tuple(range(60)) and r.reason == "tau not reached"
    assert r.evaluations < 60 * 1.2


def test_a_score_that_is_not_monotone_is_told():
    """3 must stay off as long as 7 is off: exact keeps it, fast jumps over both, or finds out when it verifies."""

    def score(p, off):
        hurt = not off[3] and off[7]
        return 0.9 if hurt or not off[11] else 0.1

    a = np.full((1, 12), 9.0)
    cfg = Nemo(width=1)
    (exact,) = localize.exact(Scores(score), a, flat(12), 0.5, cfg)
    (fast,) = localize_fast.fast(Scores(score), a, flat(12), 0.5, cfg)
    assert exact.refined == (3, 11)
    difference = found.disagreement(exact, fast)
    assert (
        not difference.same and difference.iou == 0.5 and difference.missed == (3,) and difference.extra == ()
    )
    assert difference.initial == 1

    def late(p, off):  # needed only while 11 is off, which goes last
        return 0.9 if not off[5] or (not off[0] and off[11]) else 0.1

    (fast,) = localize_fast.fast(Scores(late), a, flat(12), 0.5, cfg)
    assert fast.refined == (5,) and fast.violations == 1
    assert any(d.stage == "verify" and d.passed for d in fast.decisions)
    assert late(0, np.isin(np.arange(12), fast.refined)) < 0.5


def test_noise_never_breaks_the_result():
    """Whatever the scores: what fast mode returns is below the reference, and a subset of the initial set."""
    rng = np.random.default_rng(0)
    seen: dict[bytes, float] = {}

    def score(p, off):
        return seen.setdefault(bytes([p]) + off.tobytes(), float(rng.random()))

    differ = 0
    for tau in (0.2, 0.5, 0.8):
        a = rng.uniform(0, 9, (10, 20))
        exact = {r.prompt: r for r in localize.exact(Scores(score), a, flat(20, 3), tau, Nemo(width=1))}
        for mode in (localize_fast.fast, localize_fast.gradient):
            for r in mode(Scores(score), a, flat(20, 3), tau, Nemo(width=1, refine=True)):
                off = np.isin(np.arange(20), r.refined)
                assert set(r.refined) <= set(r.initial) and r.score <= r.tau_ref
                assert not off.any() or r.score == float(np.float32(score(r.prompt, off)))
                differ += not found.disagreement(exact[r.prompt], r).same
    assert differ > 10


def test_fast_runs_in_any_company():
    score, tau = monotone(3, 18, 6)
    a = np.random.default_rng(0).uniform(0, 9, (6, 18))
    cfg = Nemo(width=1, batch=4)
    alone = [
        next(localize_fast.fast(Scores(score), a, flat(18, 3), tau, cfg, prompts=[p], rows=1))
        for p in range(6)
    ]
    evaluate = Scores(score)
    together = sorted(localize_fast.fast(evaluate, a, flat(18, 3), tau, cfg), key=lambda r: r.prompt)
    assert together == alone and evaluate.calls < evaluate.rows


def test_gradient_finds_the_shortest_prefix_of_the_ranking():
    """Brute force over prefix lengths, and refined to a set of which no neuron can be spared."""
    for seed in range(30):
        score, tau = monotone(seed, 14, 4)
        rng = np.random.default_rng(seed)
        importance = rng.random((4, 14)).round(1)
        for cfg in (Nemo(width=1, refine=True), Nemo(width=4, refine=True)):
            for r in localize_fast.gradient(Scores(score), importance, flat(14, 2), tau, cfg):
                order = sorted(range(14), key=lambda i: (-importance[r.prompt, i], i))
                values = [
                    float(np.float32(score(r.prompt, np.isin(np.arange(14), order[:m]))))
                    for m in range(1, 15)
                ]
                below = [m for m, v in enumerate(values, 1) if v <= tau]
                assert (r.reason == "below tau") == bool(below)
                if below:
                    assert r.top == below[0] and r.initial == tuple(order[: r.top]) and math.isnan(r.theta)
                    off = np.isin(np.arange(14), r.refined)
                    assert score(r.prompt, off) < tau
                    for i in r.refined:
                        assert score(r.prompt, off & (np.arange(14) != i)) >= tau


def test_gradient_is_cheap_when_the_ranking_is_right():
    need = np.arange(600) % 150 == 7  # 4 of 600
    rng = np.random.default_rng(0)
    evaluate = Scores(lambda p, off: 0.0 if off[need].all() else 1.0)
    importance = rng.random((1, 600)) * 0.9 + need
    (r,) = localize_fast.gradient(evaluate, importance, flat(600, 7), 0.5, Nemo(width=1, refine=True))
    assert r.refined == (7, 157, 307, 457) and r.top == 4
    assert r.evaluations <= 3 + 1 + 4 + 4  # 1, 2, 4; 3; layers; neurons


def test_gradient_keeps_the_more_important():
    """5 or 2 will do beside 0, which the ranking has last; the weaker of the two goes, whatever their numbers."""
    evaluate = Scores(lambda p, off: 0.1 if off[0] and off[[2, 5]].any() else 0.9)
    importance = np.array([[0.1, 0, 0.7, 0, 0, 0.9, 0, 0], [0.1, 0, 0.9, 0, 0, 0.7, 0, 0]])
    first, second = localize_fast.gradient(evaluate, importance, flat(8), 0.5, Nemo(width=1, refine=True))
    assert first.initial == (5, 2, 0) and first.refined == (0, 5)
    assert second.initial == (2, 5, 0) and second.refined == (0, 2)


def test_gradient_that_never_reaches_tau_takes_the_lowest():
    evaluate = Scores(lambda p, off: 0.8 if off[2] else 0.9)
    importance = np.arange(16.0)[None, ::-1]
    (r,) = localize_fast.gradient(evaluate, importance, flat(16), 0.1, Nemo(width=1))
    assert r.reason == "tau not reached" and r.tau_ref == r.score_initial == pytest.approx(0.8)
    assert r.top == 4 and r.initial == (0, 1, 2, 3)  # of the lengths 1, 2, 4, 8, 16 the first of the lowest


def test_bad_ranking():
    with pytest.raises(UserError, match=r"importance has shape \[1, 3\]"):
        localize_fast.gradient(Scores(lambda p, off: 0), np.ones((1, 3)), flat(4), 0.5, Nemo())
    with pytest.raises(UserError, match="importance of prompt 1"):
        localize_fast.gradient(Scores(lambda p, off: 0), np.array([[1.0], [np.inf]]), flat(1), 0.5, Nemo())


def test_unrefined_leading_neurons_cost_a_logarithm():
    """Neurons 3, 7 and 11 each take a third: the three that lead are enough, and what stands between them stays."""
    carriers = np.array([3, 7, 11])
    importance = np.zeros((1, 600))
    importance[0, carriers] = 3.0, 2.0, 1.0
    importance[0, 5] = 2.5  # leads, and does nothing

    def score(prompt, off):
        return 1.0 - off[carriers].sum() / 3

    found = {
        refine: next(
            iter(
                localize_fast.gradient(
                    Scores(score), importance, flat(600, 7), 0.1, Nemo(width=1, refine=refine)
                )
            )
        )
        for refine in (False, True)
    }
    assert found[False].refined == (3, 5, 7, 11) and found[True].refined == (3, 7, 11)
    assert found[False].evaluations <= 2 * 10 and found[False].score == pytest.approx(0)
