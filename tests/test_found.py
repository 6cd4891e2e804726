"""What many searches say together, on hand-made records."""

import numpy as np
import pytest

from mdiff.errors import UserError
from mdiff.probes import found
from mdiff.probes.found import Found


def records(*sets):
    return [Found(prompt=p, mode="exact", refined=tuple(s)) for p, s in enumerate(sets)]


def test_disagreement():
    a, b = Found(3, "exact", (1, 2, 4, 9), (1, 2, 4)), Found(3, "fast", (1, 2), (2, 5))
    d = found.disagreement(a, b)
    assert (d.prompt, d.iou, d.missed, d.extra, d.initial, d.same) == (3, 0.25, (1, 4), (5,), 0.5, False)
    assert found.disagreement(*records((), ())[:1] * 2).same
    with pytest.raises(UserError, match="prompts 0 and 1"):
        found.disagreement(*records((1,), (1,)))


def test_stability():
    runs = [records((1, 2), (5,), ()), records((2, 1), (6,), ()), records((1,), (5,), ())]
    mean, each = found.stability([runs[0], runs[1][::-1], runs[2]])
    assert each[:2] == pytest.approx([(1 + 0.5 + 0.5) / 3, (0 + 1 + 0) / 3]) and np.isnan(each[2])
    assert mean.n == 2 and mean.value == pytest.approx(0.5) and mean.low <= 0.5 <= mean.high
    empty, _ = found.stability([records(()), records(())])
    assert empty.n == 0 and np.isnan(empty.value)
    for wrong in (runs[:1], [runs[0], runs[1][:2]]):
        with pytest.raises(UserError, match="stability"):
            found.stability(wrong)


def test_frequency_and_transfer():
    layer = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    some = records((0, 3), (1, 3), (0, 4), (0,), (), (3, 4, 5))
    assert found.frequency(some, 8).tolist() == [3, 1, 0, 3, 2, 1, 0, 0]
    t = found.transfer(some, np.array([True, True, False, False, False, False]), layer)
    assert t.union == (0, 1, 3)
    assert t.counted.tolist() == [2, 4, 0]  # 0, 0 | 4, 3, 4, 5
    assert t.covered[:2] == pytest.approx([1, 0.25]) and np.isnan(t.covered[2])
    assert t.overlap[:2] == pytest.approx([1 / 2, 1 / 3]) and np.isnan(t.overlap[2])
    assert (t.complete.value, t.complete.n) == (pytest.approx(1 / 3), 3)
    for wrong in (np.ones(6, bool), np.zeros(6, bool), np.ones(2, bool)):
        with pytest.raises(UserError, match="known"):
            found.transfer(some, wrong, layer)


def test_random_control():
    layer = np.repeat([0, 1, 2], [10, 6, 4])
    neurons = (0, 3, 9, 12, 15)
    drawn = [found.random_control(neurons, layer, seed) for seed in range(300)]
    for d in drawn:
        assert not set(d) & set(neurons) and len(set(d)) == 5
        assert np.bincount(layer[list(d)], minlength=3).tolist() == [3, 2, 0]
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert set(np.flatnonzero(counts)) == set(range(16)) - set(neurons)
    free = counts[[1, 2, 4, 5, 6, 7, 8]]  # each with chance 3 / 7: 128.6, standard deviation 8.6
    assert (np.abs(free - 300 * 3 / 7) < 5 * 8.6).all()
    assert found.random_control(neurons, layer, 5) == drawn[5]
    assert set(found.random_control((10,), layer, 0, avoid=(11, 12, 13, 14))) == {15}
    assert found.random_control((), layer, 0) == ()
    with pytest.raises(UserError, match="layer 2 has 1 neurons"):
        found.random_control((16, 17, 18), layer, 0)
