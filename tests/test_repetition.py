"""Repetition among generations against brute force and planted memorizers, and the strength it chooses."""

import math
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import one_line
from extraction_helper import Given, copies, law, numbered, partial

from mdiff.config import Audit
from mdiff.features.pixel import PixelPCA, flatten
from mdiff.probes import repetition
from mdiff.probes.neighbours import median_pair_distance

CFG = Audit(bootstrap=200)
TRAIN, UNGUIDED = law(40, 1), law(240, 2)


def test_the_mean_cosine_by_brute_force():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(30, 6)), rng.integers(-1, 4, 30)
    labels[0] = 9  # alone in its cluster
    found = repetition.repetition(
        numbered(list(range(30))),
        labels,
        CFG,
        numbered(list(range(20)), 1),
        unguided_labels=np.zeros(20, int),
        features=Given(rows),
        k=2,
    )

    def brute(rows, labels):
        values = []
        for i, label in enumerate(labels):
            others = [j for j in range(len(rows)) if j != i and labels[j] == label]
            if label >= 0 and others:
                cosines = [
                    rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for j in others
                ]
                values.append(np.mean(sorted(cosines)[-2:]))
        return values

    expected, base = brute(rows, labels), brute(rows[:20], np.zeros(20, int))
    assert found.cosine.value == pytest.approx(np.mean(expected))
    assert found.cosine.n == len(expected)
    assert found.excess.value == pytest.approx(np.mean(expected) - np.mean(base))
    assert found.excess.low < found.excess.value < found.excess.high


def test_groups_by_hand():
    # RMS distances on [0, 1] of rows in [-1, 1]: half of the Euclidean one over the root of the columns.
    x = np.array([0.0, 0.1, 0.2, 0.9, 1.0, -1.0])[:, None] * np.ones((1, 4))
    # Distances are half of the differences: 0.05 between neighbours among the first three.
    np.testing.assert_array_equal(repetition.near_identical(x, 0.06, 3), [0, 0, 0, -1, -1, -1])
    np.testing.assert_array_equal(repetition.near_identical(x, 0.04, 3), [-1] * 6)
    np.testing.assert_array_equal(repetition.near_identical(x, 0.06, 2), [0, 0, 0, 1, 1, -1])
    np.testing.assert_array_equal(repetition.near_identical(np.zeros((3, 4)), 0.0, 3), [0, 0, 0])


def test_every_member_of_a_group_lies_in_a_clique():
    rows = flatten(np.concatenate([copies(TRAIN[:5], 40, 3, noise=12.0), UNGUIDED]))
    threshold = 0.3 * median_pair_distance(flatten(UNGUIDED))
    group = repetition.near_identical(rows, threshold, 4)
    dist = np.sqrt(((rows[:, None] - rows) ** 2).mean(-1)) / 2
    assert 0 < (group >= 0).sum() < len(rows)
    for i in np.flatnonzero(group >= 0):
        balls = [np.flatnonzero(dist[j] <= threshold) for j in np.flatnonzero(dist[i] <= threshold)]
        cliques = [b for b in balls if len(b) >= 4 and i in b]
        assert any((dist[np.ix_(b, b)] <= 2 * threshold).all() for b in cliques)


def test_fresh_generations_do_not_repeat_and_copies_do():
    labels = np.arange(240) % 4
    fresh = repetition.repetition(law(240, 4), labels, CFG, UNGUIDED)
    assert fresh.grouped.value == 0 and fresh.groups.value == 0
    assert abs(fresh.excess.value) < 0.02
    found = repetition.repetition(copies(TRAIN, 240, 5), labels, CFG, UNGUIDED)
    assert found.grouped.value > 0.85  # 240 draws of 40 images: 94 % in images drawn 3 times or more
    assert found.groups.value == pytest.approx(40 / 240, abs=0.03)
    assert found.excess.low > 0.1
    planted = repetition.repetition(partial(TRAIN[:10], 240, 0.4, 6), labels, CFG, UNGUIDED)
    assert planted.grouped.value == pytest.approx(
        np.mean(np.random.default_rng(6).random(240) < 0.4), abs=0.02
    )


def test_the_default_baseline_has_clusters_of_the_same_sizes():
    """Among more unguided images the nearest are nearer; dealt like the generations they are not."""
    generated, labels = law(100, 7), np.arange(100) % 5
    few = repetition.repetition(generated, labels, CFG, law(100, 8))
    many = repetition.repetition(generated, labels, CFG, law(1000, 8), features=None)
    assert abs(few.excess.value) < 0.05 and abs(many.excess.value) < 0.05


def strengths(collapse):
    """What a planted memorizer draws: copies of 40 images grow with the strength to 60 %, then it collapses."""
    drawn = {scale: partial(TRAIN, 300, share, 30) for scale, share in ((0.0, 0.05), (2.0, 0.3), (5.0, 0.6))}
    return drawn | {9.0: collapse}


ARTEFACT = np.zeros((300, 8, 8, 1), np.uint8)
ARTEFACT[:, ::2] = 255


@pytest.mark.parametrize(
    "collapse", [ARTEFACT, np.repeat(UNGUIDED[:1], 300, axis=0), np.repeat(TRAIN[:1], 300, axis=0)]
)
@pytest.mark.parametrize("measure", ["excess", "grouped"])
def test_a_planted_memorizer_that_collapses_chooses_its_peak(collapse, measure):
    drawn, labels = strengths(collapse), np.arange(300) % 3
    space = PixelPCA.fit(UNGUIDED, 32)
    found = {s: repetition.repetition(x, labels, CFG, UNGUIDED, features=space) for s, x in drawn.items()}
    by_scale = {s: getattr(r, measure).value for s, r in found.items()}
    assert by_scale[0.0] < by_scale[2.0] < by_scale[5.0] < by_scale[9.0]  # alone it would choose the collapse
    good = {s: repetition.quality(space(x), space(UNGUIDED)) for s, x in drawn.items()}
    quality = {s: q.precision.value for s, q in good.items()}
    spread = {s: q.spread for s, q in good.items()}
    assert repetition.choose(by_scale, quality, 0.8, spread=spread) == 5.0
    assert spread[9.0] < 0.2 < 0.5 < min(spread[s] for s in (0.0, 2.0, 5.0))
    if collapse is ARTEFACT:
        assert repetition.choose(by_scale, quality, 0.8) == 5.0
        assert quality[9.0] == 0


def test_quality_of_the_same_law_and_of_itself():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 4)), rng.normal(size=(200, 4))
    same = repetition.quality(a, b)
    assert same.precision.value > 0.85 and same.spread == pytest.approx(1, abs=0.1)
    assert repetition.quality(a, a).spread == pytest.approx(1)
    far = repetition.quality(a + 20, b)
    assert far.precision.value == 0


def test_choosing_by_hand():
    by_scale = {0.0: 0.1, 1.0: 0.2, 3.0: 0.5, 9.0: 0.9}
    quality = {0.0: 0.8, 1.0: 0.8, 3.0: 0.75, 9.0: 0.2}
    assert repetition.choose(by_scale, quality, 0.9) == 3.0  # 0.72 or more
    assert repetition.choose(by_scale, quality, 0.95) == 1.0
    assert repetition.choose(by_scale, quality, 0.0) == 9.0
    assert repetition.choose(by_scale, quality, 0.0, spread={0.0: 2.0, 1.0: 1.9, 3.0: 1.0, 9.0: 0.9}) == 3.0
    assert repetition.choose({0.0: 0.5, 1.0: 0.5, 2.0: 0.4}, dict.fromkeys((0.0, 1.0, 2.0), 1.0), 0.9) == 0.0


def test_wrong_inputs_are_one_line():
    generated = law(20, 9)
    labels = np.zeros(20, int)
    for options in ({"k": 0}, {"size": 1}):
        with one_line("k = ", "size = "):
            repetition.repetition(generated, labels, CFG, UNGUIDED, **options)
    with one_line("labels", "20 generations"):
        repetition.repetition(generated, labels[:5], CFG, UNGUIDED)
    with one_line("labels: no cluster has 2"):
        repetition.repetition(generated, np.arange(20), CFG, UNGUIDED)
    with one_line("unguided: images are 4x4x1"):
        repetition.repetition(generated, labels, CFG, UNGUIDED[:, :4, :4])
    with one_line("audit.near_duplicate"):
        repetition.repetition(generated, labels, replace(CFG, near_duplicate=-1.0), UNGUIDED)
    with one_line("guided", "more than 5"):
        repetition.quality(np.zeros((5, 2)), np.zeros((9, 2)))
    ones = {0.0: 1.0, 1.0: 1.0}
    with one_line("repetition: has no strength 0"):
        repetition.choose({1.0: 1.0}, ones, 0.9)
    with one_line("quality of strength 1 is None"):
        repetition.choose(ones, {0.0: 1.0}, 0.9)
    with one_line("repetition of strength 1 is nan"):
        repetition.choose({0.0: 1.0, 1.0: math.nan}, ones, 0.9)
    with one_line("quality_floor = 1.5"):
        repetition.choose(ones, ones, 1.5)
