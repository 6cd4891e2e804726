"""Does an unconditional model know labels it was never told? Probes on its features, beside two controls.

At each noise level the features of noisy images (`recipes.evidence.features`) are asked for the labels: by a linear probe, whose
cross-validated accuracy says how much of the label is there to be read off, and by k-means, whose agreement with the
labels says how much of it stands out unasked. Noise hides labels and random features keep some, so both are measured on
the noisy pixels and on an untrained network as well, under the same noise; what counts is the difference, paired
over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mdiff.errors import UserError
from mdiff.probes import intervals
from mdiff.types import Estimate

FOLDS = 5
"""Parts of the cross-validation."""


@dataclass(frozen=True)
class Agreement:
    """How two partitions of the same images agree; 0 is chance for `ari`, and a little above it for `nmi`.

    Attributes:
      nmi: mutual information over the mean of the entropies.
      ari: adjusted Rand index (Hubert and Arabie 1985).
    """

    nmi: Estimate
    ari: Estimate


@dataclass(frozen=True)
class Implicit:
    """What features say about labels; lists are over noise levels.

    Attributes:
      levels: noise levels.
      chance: share of the most frequent label: the accuracy of saying it always.
      accuracy: space -> of the linear probe.
      labels: space -> agreement of its k-means clusters, as many as there are labels, with the labels.
      clusters: space -> agreement of its k-means clusters, as many as those, with the surrogate clusters; empty without.
      above: control -> accuracy of the first space less that of the control, paired over images.
    """

    levels: tuple[float, ...]
    chance: Estimate
    accuracy: dict[str, list[Estimate]]
    labels: dict[str, list[Agreement]]
    clusters: dict[str, list[Agreement]]
    above: dict[str, list[Estimate]]


def implicit(
    rows: Mapping[str, np.ndarray],
    labels: np.ndarray,
    levels: tuple[float, ...],
    *,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Implicit:
    """Linear probes and cluster agreement by space and noise level.

    Args:
      rows: space -> [L,N,F] features of the same N images; the first is the model, the others are controls.
      labels: int [N], what was never told.
      levels: L noise levels.
      clusters: int [N], surrogate clusters; those below 0 are left out.
      seed: of the folds and of k-means.
      confidence: level.

    Raises:
      UserError: features do not fit the labels or are not finite, or a label has fewer than `FOLDS` images.
    """
    labels = np.asarray(labels)
    for name, values in rows.items():
        if np.ndim(values) != 3 or values.shape[:2] != (len(levels), len(labels)):
            raise UserError(
                f"{name}: features of shape {np.shape(values)} for {len(levels)} levels and {len(labels)} labels; give "
                "[levels, images, features]"
            )
    right = {name: [hits(each, labels, seed) for each in values] for name, values in rows.items()}
    model = next(iter(rows))

    def agree(values: np.ndarray, with_: np.ndarray) -> list[Agreement]:
        kept = with_ >= 0
        count = len(np.unique(with_[kept]))
        return [
            agreement(kmeans(each[kept], count, seed), with_[kept], seed=seed, confidence=confidence)
            for each in values
        ]

    return Implicit(
        levels=tuple(levels),
        chance=intervals.wilson(int(np.unique(labels, return_counts=True)[1].max()), len(labels), confidence),
        accuracy={
            name: [intervals.wilson(int(each.sum()), len(each), confidence) for each in found]
            for name, found in right.items()
        },
        labels={name: agree(values, labels) for name, values in rows.items()},
        clusters={}
        if clusters is None
        else {name: agree(values, np.asarray(clusters)) for name, values in rows.items()},
        above={
            name: [intervals.newcombe(a, b, confidence) for a, b in zip(right[model], found, strict=True)]
            for name, found in right.items()
            if name != model
        },
    )


def hits(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """bool [N]: does a linear probe that has not seen image i name its label?

    Logistic regression on standardized features (scikit-learn), cross-validated over `FOLDS` parts with equal shares of labels.

    Args:
      features: [N,F].
      labels: int [N].
      seed: of the parts.

    Raises:
      UserError: features are not finite, there is one label only, or one with fewer than `FOLDS` images.
    """
    _check(features)
    found, counts = np.unique(labels, return_counts=True)
    if len(found) < 2:
        raise UserError(f"labels: all are {found[0]}; a probe needs two labels or more")
    if counts.min() < FOLDS:
        rare = found[counts.argmin()]
        raise UserError(
            f"labels: {rare} has {counts.min()} images; give {FOLDS} or more of each, or leave it out"
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    said = cross_val_predict(probe, np.asarray(features, np.float64), labels, cv=folds)
    return np.asarray(said == labels)


def kmeans(features: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """int [N]: clusters of standardized features [N,F] by k-means, k-means++ with 5 starts."""
    _check(features)
    if not 1 <= count <= len(features):
        raise UserError(f"clusters: {count} of {len(features)} images; give from 1 to as many as images")
    standard = StandardScaler().fit_transform(np.asarray(features, np.float64))
    return np.asarray(KMeans(count, n_init=5, random_state=seed).fit_predict(standard))


def agreement(a: np.ndarray, b: np.ndarray, *, seed: int = 0, confidence: float = 0.95) -> Agreement:
    """Agreement of two partitions int [N] of the same images, with jackknife intervals over images."""
    pairs = np.stack([np.asarray(a), np.asarray(b)], axis=1)

    def estimate(score: Callable[[np.ndarray, np.ndarray], float], low: float) -> Estimate:
        found = intervals.jackknife(
            lambda rows: float(score(rows[:, 0], rows[:, 1])),
            pairs,
            confidence=confidence,
            seed=seed,
        ).plain
        return Estimate(found.value, max(found.low, low), min(found.high, 1.0), found.n)

    return Agreement(nmi=estimate(normalized_mutual_info_score, 0.0), ari=estimate(adjusted_rand_score, -1.0))


def _check(features: np.ndarray) -> None:
    broken = int(np.sum(~np.isfinite(features)))
    if broken:
        raise UserError(f"features: {broken} values are not finite; {math.prod(features.shape)} were given")
