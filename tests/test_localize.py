"""NeMo's search against a plain sequential one, and on scores whose minimal sets are known."""

import dataclasses
import json
import math

import numpy as np
import pytest

from mdiff.errors import UserError
from mdiff.nemo import Nemo
from mdiff.probes import localize
from mdiff.probes.found import Found
from mdiff.probes.localize import Neurons


def sequential(score, a, mu, sd, layer, tau, cfg):
    """The algorithm as the paper tells it: one prompt, one test after the other, python sets. Also counts tests."""
    tests, theta, k, n = 0, cfg.theta, 0, len(a)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (np.asarray(a, float) - mu) / sd
    z = np.where(np.isnan(z), 0.0, z)
    while True:
        names = []
        for number in sorted(set(layer)):
            members = [i for i in range(n) if layer[i] == number]
            out = [i for i in members if (abs(z[i]) if cfg.two_sided else z[i]) > theta]
            largest = sorted(members, key=lambda i: (-a[i], i))[:k]
            names.append(out + [i for i in largest if i not in out])
        off = {i for group in names for i in group}
        mem, tests = score(off), tests + 1
        if mem <= tau or theta == cfg.theta_min:
            break
        theta, k = max(theta - cfg.theta_step, cfg.theta_min), k + cfg.top
    start, ref = [i for group in names for i in group], tau if mem <= tau else mem
    names = [group for group in (names[::-1] if cfg.order == "deep" else names) if group]
    for group in names:
        tests += 1
        if score(off - set(group)) < ref:
            off -= set(group)
    for i in [i for group in names for i in group]:
        if i in off:
            tests += 1
            if score(off - {i}) < ref:
                off -= {i}
    return start, sorted(off), theta, k, ref, tests


def noise(seed, prompt, off):
    """A number in [0, 1) that depends on nothing but these."""
    word = np.uint64(seed * 7919 + prompt * 104729 + 1)
    for i in np.flatnonzero(off):
        word ^= np.uint64((int(i) + 1) * 0x9E3779B97F4A7C15 % 2**64)
        word = np.uint64(int(word) * 0xBF58476D1CE4E5B9 % 2**64) ^ (word >> np.uint64(29))
    return float(int(word) % 2**20) / 2**20


class Scores:
    """A score function of sets, as `Evaluate`, that counts what it is asked."""

    def __init__(self, score):
        self.score, self.calls, self.rows, self.asked = score, 0, 0, []

    def __call__(self, prompts, off):
        assert prompts.dtype == np.int32 and off.dtype == bool and len(prompts) == len(off) > 0
        assert off.any(1).all(), "asked for the whole network"
        self.calls, self.rows = self.calls + 1, self.rows + len(off)
        self.asked += [(int(p), row.tobytes()) for p, row in zip(prompts, off, strict=True)]
        return np.float32([self.score(int(p), row) for p, row in zip(prompts, off, strict=True)])


def world(seed, n=14, layers=3, prompts=1):
    """Activations with outliers, their statistics, layers in any order, and a random score of one of four kinds."""
    rng = np.random.default_rng(seed)
    layer = rng.integers(0, layers, n)
    mean, std = rng.uniform(0.1, 1, n), rng.uniform(0.05, 0.3, n)
    std[rng.random(n) < 0.1] = 0
    a = np.maximum(mean + rng.standard_t(1.5, (prompts, n)) * np.maximum(std, 0.02), 0).astype(np.float32)
    weight = rng.exponential(1, (prompts, n)) * (rng.random((prompts, n)) < 0.4)
    signed = rng.normal(0.3, 1, (prompts, n))
    mix = rng.integers(0, 4)

    def score(p, off):
        if not off.any():
            return 1.0
        if mix == 0:  # falls with every neuron
            return math.exp(-weight[p] @ off)
        if mix == 1:  # not monotone
            return 1 / (1 + math.exp(signed[p] @ off))
        if mix == 2:  # nothing but noise
            return noise(seed, p, off)
        return 0.7 * math.exp(-weight[p] @ off) + 0.3 * noise(seed, p, off)

    tau = float(rng.uniform(0.1, 0.7))
    if seed % 3:
        return a, Neurons(mean, std, layer), score, tau
    # Eighths, so that scores and tau are often equal.
    return a, Neurons(mean, std, layer), lambda p, off: math.ceil(8 * score(p, off)) / 8, round(8 * tau) / 8


def by_prompt(records):
    return {r.prompt: r for r in records}


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("order", ["deep", "shallow"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_exact_is_the_sequential_algorithm(width, order, two_sided):
    cfg = Nemo(order=order, two_sided=two_sided, width=width, theta=4.0, theta_step=0.5, batch=7)
    reached = removed = 0
    for seed in range(60):
        a, neurons, score, tau = world(seed, prompts=3)
        evaluate = Scores(score)
        got = by_prompt(localize.exact(evaluate, a, neurons, tau, cfg))
        assert len(evaluate.asked) == len(set(evaluate.asked)), "a score was asked for twice"
        for p in range(3):

            def one(off, p=p, score=score):
                return float(np.float32(score(p, np.isin(np.arange(14), list(off)))))

            start, final, theta, k, ref, tests = sequential(
                one, a[p], neurons.mean, neurons.std, neurons.layer, tau, cfg
            )
            r = got[p]
            assert (list(r.initial), list(r.refined)) == (start, final)
            assert (r.theta, r.top, r.tau_ref) == (theta, k, ref)
            assert len(r.decisions) == tests
            assert r.score == pytest.approx(one(set(final))) and r.score_initial == one(set(start))
            assert r.evaluations >= r.rounds and (width > 1 or r.evaluations == r.rounds <= tests)
            assert (r.reason == "below tau") == (r.score_initial <= tau)
            reached += r.reason == "below tau"
            removed += len(start) - len(final)
        assert sum(r.evaluations for r in got.values()) == evaluate.rows
    assert 60 < reached < 180 and removed > 300  # both endings, and something to refine


def test_company_and_batch_change_nothing():
    cfg = Nemo(width=1, batch=16)
    a, neurons, score, tau = world(6, n=20, prompts=9)  # noise and ablation mixed
    alone = [next(localize.exact(Scores(score), a, neurons, tau, cfg, prompts=[p])) for p in range(9)]
    for rows in (1, 4, 16):
        evaluate = Scores(score)
        together = by_prompt(localize.exact(evaluate, a, neurons, tau, cfg, rows=rows))
        assert [together[p] for p in range(9)] == alone  # evaluations and rounds too
        total = sum(r.evaluations for r in alone)
        assert evaluate.rows == total
        if rows == 4:  # batches are full but at the end
            assert evaluate.calls <= total / 4 + max(r.rounds for r in alone)
        if rows == 16:
            assert evaluate.calls == max(r.rounds for r in alone)


def test_room_of_a_batch_goes_to_sets_ahead():
    layer = np.zeros(40, int)
    neurons = Neurons(np.zeros(40), np.ones(40), layer)
    evaluate = Scores(lambda p, off: 0.0 if off[33] else 1.0)
    (r,) = localize.exact(evaluate, np.full((1, 40), 9.0), neurons, 0.5, Nemo(width=2, batch=16))
    assert r.refined == (33,) and r.rounds == 1 + 3 + 1  # S; 16 and 16, 2 of which 33 fails; the rest
    (narrow,) = localize.exact(evaluate, np.full((1, 40), 9.0), neurons, 0.5, Nemo(width=1, batch=16))
    assert narrow.rounds == narrow.evaluations == 41


def test_resume_in_the_middle():
    cfg = Nemo(width=4, batch=6)
    a, neurons, score, tau = world(11, n=20, prompts=10)
    whole = by_prompt(localize.exact(Scores(score), a, neurons, tau, cfg))
    saved = {}
    for r in localize.exact(Scores(score), a, neurons, tau, cfg):
        saved[r.prompt] = json.loads(json.dumps(dataclasses.asdict(r)))
        if len(saved) == 4:
            break  # killed
    left = [p for p in range(10) if p not in saved]
    evaluate = Scores(score)
    rest = by_prompt(localize.exact(evaluate, a, neurons, tau, cfg, prompts=left))
    assert {p for p, _ in evaluate.asked} == set(left) == set(rest)
    for p, r in whole.items():
        again = Found.load(saved[p]) if p in saved else rest[p]
        assert (again.refined, again.initial, again.decisions) == (r.refined, r.initial, r.decisions)
        assert again.tau_ref == r.tau_ref and again.reason == r.reason


@pytest.mark.parametrize(
    ("n", "k", "width", "rounds", "rows"), [(54, 4, 8, 9, 69), (210, 21, 8, 37, 293), (674, 21, 32, 33, 1047)]
)
def test_rounds_of_speculation(n, k, width, rounds, rows):
    """All of k neurons must stay off; rounds and evaluations as an independent simulation of the scheme has them."""
    rng = np.random.default_rng(n)
    need = np.zeros((12, n), bool)
    for row in need:
        row[rng.choice(n, k, replace=False)] = True
    neurons = Neurons(np.zeros(n), np.ones(n), np.zeros(n, int))
    evaluate = Scores(lambda p, off: 0.0 if off[need[p]].all() else 1.0)
    cfg = Nemo(width=width, batch=width)
    got = [
        next(localize.exact(evaluate, np.full((12, n), 9.0), neurons, 0.5, cfg, prompts=[p]))
        for p in range(12)
    ]
    assert all(r.refined == tuple(np.flatnonzero(need[r.prompt])) for r in got)
    assert np.mean([r.rounds - 1 for r in got]) == pytest.approx(rounds, rel=0.08)  # 1: the initial set
    assert np.mean([r.evaluations - 1 for r in got]) == pytest.approx(rows, rel=0.08)


LAYERS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
NINE = Neurons(np.ones(9), np.full(9, 0.5), LAYERS)
ALL = np.full((1, 9), 9.0)


@pytest.mark.parametrize("order", ["deep", "shallow"])
def test_known_minimal_sets(order):
    """One is enough: the one that is tested last stays. Two are needed: both stay. Each stage once, no test twice."""
    cfg = Nemo(order=order, width=1)
    either = Scores(lambda p, off: 0.1 if off[[1, 4, 5, 7]].any() else 0.9)
    (r,) = localize.exact(either, ALL, NINE, 0.5, cfg)
    assert r.refined == ((1,) if order == "deep" else (7,))
    assert [d.index for d in r.decisions if d.stage == "layer"] == (
        [2, 1, 0] if order == "deep" else [0, 1, 2]
    )
    assert either.rows == 1 + 2 + 3  # the set, two layers (the third alone is all there is), three neurons

    both = Scores(lambda p, off: 0.1 if off[[1, 7]].all() else 0.9)
    (r,) = localize.exact(both, ALL, NINE, 0.5, cfg)
    assert r.refined == (1, 7) and r.score == pytest.approx(0.1) and r.reason == "below tau"
    assert r.tau_ref == 0.5 and (r.theta, r.top) == (5.0, 0) and r.violations == 0


def test_stays_at_the_level_it_reached():
    """The score never comes to tau: refined to less than the score of the last set, theta_min, which is tried (T6)."""
    weight = np.array([0.05, -0.02, 0, 0, 0.1, 0, 0, 0, 0])
    evaluate = Scores(lambda p, off: 0.8 - weight @ off)
    a = np.ones((1, 9)) + 0.5 * np.linspace(1.1, 1.2, 9)  # outliers at theta = 1 only
    (r,) = localize.exact(evaluate, a, NINE, 0.3, Nemo(width=1, top=0))
    assert r.reason == "tau not reached" and r.theta == 1.0 and r.initial == tuple(range(9))
    assert r.tau_ref == r.score_initial == pytest.approx(0.67) and r.score == pytest.approx(0.65)
    # 1 hindered; those that change nothing do not bring the score below what it was until 1 is gone
    assert 1 not in r.refined and {0, 4} <= set(r.refined)
    assert sum(d.stage == "initial" for d in r.decisions) == 17
    assert evaluate.rows <= 1 + 3 + 9  # sixteen empty sets cost nothing


def test_which_side_equality_is_on():
    """|z| > theta is an outlier; a score <= tau ends D3; one < tau_ref drops a neuron."""
    neurons = Neurons(np.zeros(3), np.ones(3), np.zeros(3, int))
    assert localize.outliers(np.array([5, 5.5, 4]), neurons, 5, 0).tolist() == [1]
    half = Scores(lambda p, off: 0.5)
    (r,) = localize.exact(half, np.full((1, 3), 9.0), neurons, 0.5, Nemo(width=1))
    assert r.reason == "below tau" and r.theta == 5 and r.refined == (0, 1, 2)


def test_nothing_to_find():
    evaluate = Scores(lambda p, off: 0.9)
    (r,) = localize.exact(evaluate, np.ones((1, 9)), NINE, 0.3, Nemo(width=1, top=0))
    assert (
        r.reason == "no candidate" and r.initial == r.refined == () and r.score == 1.0 and evaluate.rows == 0
    )
    (r,) = localize.exact(evaluate, ALL, NINE, 0.3, Nemo(), memorized=np.array([False]))
    assert r.reason == "not memorized" and r.refined == () and math.isnan(r.score) and evaluate.rows == 0
    assert Found.load(json.loads(json.dumps(dataclasses.asdict(r)))).reason == "not memorized"


def test_decisions_near_the_threshold_are_logged():
    evaluate = Scores(lambda p, off: 0.5 - 4e-6 if off.sum() == 8 else 0.2 if off.all() else 0.9)
    (r,) = localize.exact(evaluate, ALL, NINE, 0.5, Nemo(width=1))
    assert r.close and all(d.stage == "neuron" and d.passed for d in r.close)


def test_outliers():
    layer = np.array([1, 0, 1, 0, 1, 0])
    mean, std = np.array([1, 1, 1, 1, 1, 2.0]), np.array([0.1, 0.1, 0.1, 0.1, 0, 0])
    a = np.array([1.55, 0.4, 1.45, 1.2, 1.001, 2.0])
    neurons = Neurons(mean, std, layer)
    assert localize.outliers(a, neurons, 5, 0).tolist() == [
        1,
        0,
        4,
    ]  # layer 0 first; no spread: any change counts
    assert localize.outliers(a, neurons, 5, 0, two_sided=False).tolist() == [0, 4]
    assert localize.outliers(a, neurons, 5, 2).tolist() == [1, 5, 3, 0, 4, 2]  # layer 0's largest: 5, 3
    assert localize.outliers(a, neurons, 5.6, 1).tolist() == [1, 5, 4, 0]  # 4 an outlier, 0 the largest
    assert localize.outliers(a, neurons, 5, 99).tolist() == [1, 5, 3, 0, 4, 2]
    ties = localize.outliers(np.ones(6), Neurons(np.ones(6), np.ones(6), np.zeros(6, int)), 1, 3)
    assert ties.tolist() == [0, 1, 2]


def test_thetas():
    assert localize.thetas(Nemo()) == [5 - i / 4 for i in range(17)]
    assert localize.thetas(Nemo(theta=2, theta_step=0.3)) == pytest.approx([2, 1.7, 1.4, 1.1, 1.0])
    assert localize.thetas(Nemo(theta=1, theta_min=1)) == [1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(cfg=Nemo(theta_step=0.0)), "theta_step = 0"),
        (dict(cfg=Nemo(theta=0.5)), "theta = 0.5"),
        (dict(cfg=Nemo(width=-1)), "width = -1"),
        (dict(cfg=Nemo(batch=0)), "batch = 0"),
        (dict(activation=ALL[:, :4]), r"\[1, 4\]"),
        (dict(activation=ALL * np.nan), "activation of prompt 0"),
        (dict(neurons=Neurons(np.ones(9), -np.ones(9), LAYERS)), "std"),
        (dict(neurons=Neurons(np.ones(8), np.ones(9), LAYERS)), "mean"),
        (dict(tau=math.nan), "tau = nan"),
        (dict(prompts=[1]), "prompt 1"),
        (dict(memorized=np.ones(3, bool)), "memorized"),
    ],
)
def test_bad_input(change, words):
    given = dict(activation=ALL, neurons=NINE, tau=0.5, cfg=Nemo(), prompts=None, memorized=None) | change
    evaluate = Scores(lambda p, off: 0.5)
    with pytest.raises(UserError, match=words) as error:
        localize.exact(evaluate, **given)
    assert "\n" not in str(error.value) and evaluate.rows == 0


def test_a_score_that_is_not_a_number():
    with pytest.raises(UserError, match="prompt 0: score"):
        list(localize.exact(Scores(lambda p, off: math.nan), ALL, NINE, 0.5, Nemo(width=1)))
