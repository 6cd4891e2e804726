"""How much generations repeat each other, and the strength of guidance chosen by it, without seeing a training image.

A model that gives training images away gives the same ones again: two generations from different noise that are one
image are unlikely otherwise. Two measures, both among generations only:

- cosine: the mean cosine of a generation with the k nearest others that were asked for the same cluster, less that
  of unguided generations with as many of their own;
- groups: the share of generations that belong to m or more near-identical ones, as the cliques of
  arXiv 2301.13188, section 4. Near-identical is what lies within a part of the median distance between unguided
  generations, as near-duplicates in the audit. m within that distance of one of them make a group, so these are
  pairwise within twice it: a clique without a search for cliques (density-based clustering does it).

A model pushed too far repeats itself too, one image or its artefacts, without copying anything. So a strength
counts only while its images lie where unguided ones do (`quality`: precision, against artefacts) and are about as
different from each other (`spread`: Vendi score, against one image for all).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import DBSCAN

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.features.pixel import Features, flatten
from mdiff.features.spaces import make_features
from mdiff.probes import intervals, manifold, sets
from mdiff.probes.neighbours import median_pair_distance
from mdiff.types import Estimate

_ELEMENTS = 1 << 22  # cosines held at once


@dataclass(frozen=True)
class Repetition:
    """How much generations at one strength repeat each other.

    Attributes:
      cosine: mean over generations of the mean cosine with the k nearest of the same cluster.
      excess: the same less that of the unguided ones.
      grouped: share of generations in groups of m or more near-identical ones.
      groups: how many such groups, per generation: the unique copies, where `grouped` counts all.
      threshold: RMS distance on [0, 1] up to which two are near-identical.
    """

    cosine: Estimate
    excess: Estimate
    grouped: Estimate
    groups: Estimate
    threshold: float


@dataclass(frozen=True)
class Quality:
    """Where the generations at one strength lie, beside unguided ones.

    Attributes:
      precision: share inside the support of the unguided ones (arXiv 1904.06991).
      spread: Vendi score over that of as many unguided ones: how many different images there are in effect.
    """

    precision: Estimate
    spread: float


def repetition(
    generated: np.ndarray,
    labels: np.ndarray | None,
    config: Audit,
    unguided: np.ndarray,
    *,
    unguided_labels: np.ndarray | None = None,
    features: Features | None = None,
    k: int = 3,
    size: int = 3,
) -> Repetition:
    """Repetition among generations.

    The interval of `cosine` and `excess` is a bootstrap over generations with their neighbours held; that of
    `grouped` Wilson's, and of `groups` Wilson's over as many groups as there could be, Q / size. Generations of one group
    are not independent: read them as descriptions of this set, not of the model.

    Args:
      generated: [Q,H,W,C] uint8, or float in [-1, 1], each from noise of its own.
      labels: int [Q], cluster asked for; -1 is a cluster of none. None: all are one cluster.
      config: `features`, `components`, `near_duplicate`, `confidence`, `bootstrap`, `seed`.
      unguided: [U,H,W,C], drawn by the model alone: what is typical, and where the space of cosines is fitted.
      unguided_labels: int [U], clusters they belong to. None: Q of them (give as many) are dealt the labels of
        `generated`, as if clusters had been asked for in vain.
      features: space of cosines; None makes the one `config.features` names, fitted on `unguided`.
      k: nearest others; fewer where a cluster has fewer, and generations alone in theirs are left out.
      size: m, generations that make a group.

    Raises:
      UserError: settings, images or labels that do not fit, or nothing to compare.
    """
    if k < 1 or size < 2:
        raise UserError(f"k = {k}, size = {size}: give k of 1 or more and size of 2 or more")
    given = sets.against(generated, {"unguided": unguided}, None, config)
    generated, side = given.generated, given.sides["unguided"]
    labels = _labels("labels", labels, len(generated))
    base_images, base_labels = side.images, unguided_labels
    if base_labels is None:  # clusters of the same sizes: the nearest of many are nearer
        generator = np.random.Generator(np.random.Philox(config.seed))
        picked = np.sort(generator.permutation(len(base_images))[: len(labels)])
        base_images, base_labels = base_images[picked], generator.permutation(labels)[: len(picked)]
    else:
        base_labels = _labels("unguided_labels", base_labels, len(base_images))
    space = features or make_features(config, side.images)
    found, base = (
        _nearest(np.asarray(space(images), np.float64), each, k)
        for images, each in ((generated, labels), (base_images, base_labels))
    )
    for name, values in (("labels", found), ("unguided_labels", base)):
        if not len(values):
            raise UserError(f"{name}: no cluster has 2 generations; draw more, or ask for fewer clusters")

    threshold = config.near_duplicate * median_pair_distance(side.rows, seed=config.seed)
    group = near_identical(flatten(generated), threshold, size)
    q, level = len(generated), config.confidence
    most = max(1, q // size)
    different = intervals.wilson(int(group.max()) + 1, most, level)
    scale = most / q
    boot = functools.partial(
        intervals.bootstrap, n_resamples=config.bootstrap, confidence=level, seed=config.seed
    )
    return Repetition(
        cosine=boot(intervals.mean(found), len(found)),
        excess=boot(lambda a, b: a @ found / len(found) - b @ base / len(base), len(found), len(base)),
        grouped=intervals.wilson(int((group >= 0).sum()), q, level),
        groups=Estimate(different.value * scale, different.low * scale, different.high * scale, q),
        threshold=threshold,
    )


def near_identical(rows: np.ndarray, threshold: float, size: int) -> np.ndarray:
    """Groups of near-identical rows.

    Args:
      rows: [Q,D] in [-1, 1].
      threshold: RMS distance on [0, 1]; 0 joins equal rows.
      size: rows that make a group: so many within the threshold of one of them, itself included.

    Returns:
      int [Q], the group of each row, from 0; -1 for rows in none. Groups that share a dense row are one.
    """
    rows = np.asarray(rows, np.float64)
    radius = 2 * threshold * math.sqrt(rows.shape[1])  # Euclidean, on the [-1, 1] scale
    return DBSCAN(eps=max(radius, 1e-9), min_samples=size).fit(rows).labels_


def quality(guided: np.ndarray, unguided: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Quality:
    """Precision and spread of guided generations beside unguided ones, in one feature space.

    Args:
      guided: [n,F] rows; those of strength 0 give the values that `choose` compares with.
      unguided: [m,F] rows drawn from other noise, or precision is 1 by itself.
      confidence: level.
      seed: of the draw that brings both to one size for the spread.

    Raises:
      UserError: a set is too small, or rows are not finite.
    """
    guided, unguided = np.asarray(guided, np.float64), np.asarray(unguided, np.float64)
    for name, rows in (("guided", guided), ("unguided", unguided)):
        if rows.ndim != 2 or len(rows) <= manifold.K or not np.isfinite(rows).all():
            raise UserError(
                f"{name}: rows of shape {rows.shape}; give finite features [N,F] of more than {manifold.K} images"
            )
    precision = manifold.support(guided, unguided, n_resamples=1, confidence=confidence).precision
    n, generator = min(len(guided), len(unguided)), np.random.Generator(np.random.Philox(seed))
    one, other = (
        manifold.vendi_score(rows[np.sort(generator.choice(len(rows), n, replace=False))])
        for rows in (guided, unguided)
    )
    return Quality(precision, one / other)


def choose(
    by_scale: Mapping[float, float],
    quality: Mapping[float, float],
    floor: float,
    *,
    spread: Mapping[float, float] | None = None,
    least_spread: float = 0.5,
) -> float:
    """The strength at which generations repeat each other most, among those that are still good.

    Args:
      by_scale: strength -> repetition, such as `Repetition.grouped.value` or `excess.value`.
      quality: strength -> `Quality.precision.value`; that of strength 0 is the measure.
      floor: least part of the quality at strength 0 (`side.quality_floor`).
      spread: strength -> `Quality.spread`, also measured by that of strength 0.
      least_spread: least part of the spread at strength 0.

    Returns:
      A strength of `by_scale`; the smallest of equal ones. 0 when nothing repeats more than the model alone.

    Raises:
      UserError: strength 0 is missing, a number is missing or not finite, or the floor is not in [0, 1].
    """
    given = {"repetition": by_scale, "quality": quality} | ({} if spread is None else {"spread": spread})
    for name, value in (("quality_floor", floor), ("least_spread", least_spread)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} = {value}; give a part from 0 to 1")
    for name, numbers in given.items():
        if 0.0 not in numbers:
            raise UserError(f"{name}: has no strength 0, which the others are measured by; add 0 to scales")
        for scale in by_scale:
            if not math.isfinite(numbers.get(scale, math.nan)):
                raise UserError(
                    f"{name} of strength {scale:g} is {numbers.get(scale)}; measure it, or leave that strength out"
                )
    allowed = [
        scale
        for scale in sorted(by_scale)
        if quality[scale] >= floor * quality[0.0]
        and (spread is None or spread[scale] >= least_spread * spread[0.0])
    ]
    return max(allowed, key=lambda scale: (by_scale[scale], -scale))


def _labels(name: str, labels: np.ndarray | None, count: int) -> np.ndarray:
    if labels is None:
        return np.zeros(count, np.int64)
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name}: {labels.dtype} of shape {labels.shape} for {count} generations; give one int each"
        )
    return labels


def _nearest(rows: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Mean cosine of each row with its k nearest others of its label; rows alone in theirs are left out."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    found = []
    for label in np.unique(labels[labels >= 0]):
        mine = unit[labels == label]
        most = min(k, len(mine) - 1)
        if most < 1:
            continue
        step = max(1, _ELEMENTS // len(mine))
        for start in range(0, len(mine), step):
            cosines = mine[start : start + step] @ mine.T
            at = np.arange(len(cosines))
            cosines[at, start + at] = -np.inf
            found.append(np.partition(cosines, -most, axis=1)[:, -most:].mean(1))
    return np.concatenate(found) if found else np.zeros(0)
