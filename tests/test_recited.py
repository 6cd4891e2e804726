"""Which captions are recited: verdicts by brute force, the fitted curve by scikit-learn and simulation."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mdiff.config import Audit
from mdiff.probes import recited

RULES = Audit(bootstrap=200)


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 6, 3)).astype(np.uint8)


def test_verdicts_by_brute_force():
    train = images(8)
    train[7] = np.clip(train[6].astype(int) + 3, 0, 255)  # a near-duplicate: no other image of either
    own = [(0,), (1, 2), (6,)]
    rng = np.random.default_rng(1)
    near = [train[0], train[2], train[7]]
    generated = np.stack(
        [
            np.stack([np.clip(each + rng.normal(0, s, each.shape), 0, 255) for s in (5, 40, 90)])
            for each in near
        ]
    ).astype(np.uint8)
    found = recited.verdicts(generated, own, train, RULES)
    for p in range(3):
        for g in range(3):
            d = np.sqrt(np.mean((train / 127.5 - generated[p, g] / 127.5) ** 2, axis=(1, 2, 3)))
            mine = list(own[p])
            others = [i for i in range(8) if i not in mine and not (p == 2 and i == 7)]
            assert found.ratio[p, g] == pytest.approx(d[mine].min() / d[others].min(), rel=1e-4)
            assert found.own[p, g] == mine[int(np.argmin(d[mine]))]
            assert found.copy[p, g] == (d[mine].min() / d[others].min() < RULES.ratio)
    assert found.copy.any() and not found.copy.all()


def test_another_image_is_no_copy_of_ones_own():
    train = images(6)
    found = recited.verdicts(train[None, 3:4], [(0,)], train, RULES)
    assert found.ratio[0, 0] > 100 and not found.copy[0, 0]


def test_the_curve_is_logistic_regression():
    rng = np.random.default_rng(0)
    copies = np.repeat([1, 3, 10, 30, 100], 40)
    p = 1 / (1 + np.exp(-3 * (np.log10(copies) - np.log10(12))))
    copy = rng.random((200, 5)) < p[:, None]
    fitted = recited.curve(copies, copy, RULES)
    x = np.repeat(np.log10(copies), 5)[:, None]
    other = LogisticRegression(C=1e6).fit(x, copy.ravel())
    assert fitted.slope.value == pytest.approx(other.coef_[0, 0], rel=0.01)
    assert fitted.r50.value == pytest.approx(10 ** (-other.intercept_[0] / other.coef_[0, 0]), rel=0.01)
    assert fitted.r50.low < 12 < fitted.r50.high and fitted.slope.low < 3 < fitted.slope.high
    assert fitted.rungs[1].value == pytest.approx(copy[copies == 1].mean())
    assert fitted.rungs[1].n == 40 and fitted.rungs[1].low < fitted.rungs[1].value < fitted.rungs[1].high


def test_a_perfect_step_is_bounded_by_its_rungs():
    copies = np.repeat([1, 3, 10, 30, 100], 10)
    fitted = recited.curve(copies, np.repeat(copies[:, None] >= 10, 4, axis=1), RULES)
    assert 3 < fitted.r50.value < 10 and fitted.slope.value > 5


def test_falling_with_copies_has_a_negative_slope():
    copies = np.repeat([1, 10, 100], 20)
    share = np.repeat((copies < 50)[:, None], 3, axis=1) & (np.random.default_rng(0).random((60, 3)) < 0.8)
    assert recited.curve(copies, share, RULES).slope.high < 0
