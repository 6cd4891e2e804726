"""Which captions make a model recite their training image, and how that depends on how often the image was seen.

A generation of a caption is a copy when it is much nearer to that caption's own image than to any other: the ratio rule of the
audit (arXiv 2310.02664), d(own) / d(nearest other) < `audit.ratio`, with the own image known. Near-duplicates of an own image,
and the other members of its family, are no others. Of a template the nearest member counts: its layout is recited, whatever
its varying part.

How the rate grows with copies is fitted by a logistic curve in log10 copies, P = 1 / (1 + exp(-slope (log10 c - log10 r50))), by
maximum likelihood over verbatim and unique images; r50 is the number of copies at which half the generations are copies.
Intervals resample images, since the generations of one image go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mdiff.config import Audit
from mdiff.features.pixel import flatten
from mdiff.probes import intervals, sets
from mdiff.types import Estimate

RIDGE = 1e-3
"""Weight of a squared penalty on the fitted curve, in generations: keeps it finite when copies part the images perfectly."""
ROUNDS = 40


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Generations of captions, compared with the captions' own images.

    Attributes:
      ratio: float [P,G], d(own) / d(nearest other).
      own: int [P,G], which of the caption's images is nearest, an index into the training images.
      copy: bool [P,G].
    """

    ratio: np.ndarray
    own: np.ndarray
    copy: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """float [P]: share of each caption's generations that are copies."""
        return self.copy.mean(1)


def verdicts(
    generated: np.ndarray, own: Sequence[Sequence[int]], train: np.ndarray, config: Audit
) -> Verdicts:
    """Compares generations with the images of their captions.

    Args:
      generated: uint8 [P,G,H,W,C].
      own: for each caption the indices of its images in `train`: one, or a family.
      train: uint8 [R,H,W,C], each training image once.
      config: uses ratio, near_duplicate, chunk and seed.
    """
    side = sets.reference(train, config, "train", None)
    place = {int(origin): row for row, origin in enumerate(side.origin)}
    count, each = generated.shape[:2]
    rows = flatten(generated.reshape(count * each, *generated.shape[2:])).reshape(count, each, -1)
    ratio, nearest = np.zeros((count, each)), np.zeros((count, each), int)
    for prompt, images in enumerate(own):
        distance = np.sqrt(
            np.stack([np.mean((side.rows - row) ** 2, axis=1, dtype=np.float64) for row in rows[prompt]])
        )
        mine = np.array([place[int(i)] for i in images])
        others = ~np.isin(side.labels, side.labels[mine])
        d1 = distance[:, mine]
        nearest[prompt] = np.asarray(images)[d1.argmin(1)]
        d2 = distance[:, others].min(1) if others.any() else np.full(each, np.inf)
        ratio[prompt] = d1.min(1) / np.maximum(d2, 1e-12)
    return Verdicts(ratio, nearest, ratio < config.ratio)


@dataclass(frozen=True)
class Curve:
    """P(copy | copies seen).

    Attributes:
      rungs: copies -> share of generations that are copies; n counts images.
      r50: copies at which half the generations are; infinite or 0 ends where the data do not bound it.
      slope: of the logit per tenfold copies.
      low, high: fewest and most copies there are.
    """

    rungs: dict[int, Estimate]
    r50: Estimate
    slope: Estimate
    low: int
    high: int

    def to_json(self) -> dict[str, Any]:
        """As a tree."""
        return {**asdict(self), "rungs": {str(c): asdict(each) for c, each in self.rungs.items()}}


def curve(copies: np.ndarray, copy: np.ndarray, config: Audit) -> Curve:
    """Fits how the rate of copies grows.

    Args:
      copies: int [P], how often each image is seen in an epoch.
      copy: bool [P,G], verdicts of its generations.
      config: uses confidence, bootstrap and seed.
    """
    share, x = copy.mean(1), np.log10(np.asarray(copies, float))
    rungs = {int(c): _rate(copy[copies == c], config) for c in np.unique(copies)}

    def both(weights: np.ndarray) -> np.ndarray:
        return logistic(x, share, weights)

    draws = intervals.resample(both, len(x), n_resamples=config.bootstrap, seed=config.seed)
    value = both(np.ones((1, len(x))))[0]
    r50, slope = (
        intervals.percentile(float(value[i]), draws[:, i], len(x), config.confidence) for i in (0, 1)
    )
    return Curve(rungs, r50, slope, int(copies.min()), int(copies.max()))


def _rate(copy: np.ndarray, config: Audit) -> Estimate:
    """Wilson's interval as if each image counted once: the generations of one image are nearly the same."""
    n = len(copy)
    low, high = intervals.wilson_limits(float(copy.mean()), n, config.confidence)
    return Estimate(float(copy.mean()), low, high, n)


def logistic(x: np.ndarray, share: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(r50, slope) [B,2] of B weighted logistic fits of share [n] on x = log10 copies [n], by Newton's method.

    Args:
      x: float [n].
      share: float [n] in [0, 1].
      weights: float [B,n].
    """
    centred = x - x.mean()
    design = np.stack([np.ones_like(centred), centred], axis=1)
    found = np.zeros((len(weights), 2))
    for _ in range(ROUNDS):
        p = 1 / (1 + np.exp(-np.clip(found @ design.T, -30, 30)))
        slope = np.einsum("bn,nk->bk", weights * (share - p), design) - RIDGE * found
        curvature = np.einsum("bn,nk,nl->bkl", weights * p * (1 - p), design, design) + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        found = found + step * np.minimum(1, 3 / np.maximum(np.abs(step).max(1, keepdims=True), 1e-12))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        r50 = 10 ** (x.mean() - found[:, 0] / found[:, 1])
    return np.stack([r50, found[:, 1]], axis=1)
