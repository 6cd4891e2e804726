"""Is a generation near enough to a training image to be called a copy of it: three rules and their curves.

Distances are RMS per pixel on the [0, 1] scale (`probes.neighbours`, whose functions are also found here);
inputs are rows in [-1, 1] (`features.pixel.flatten`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mdiff import processes
from mdiff.errors import UserError
from mdiff.probes.intervals import wilson
from mdiff.probes.neighbours import (
    Neighbours,
    cluster_near_duplicates,
    median_pair_distance,
    nearest,
    nearest_with_flips,
)

__all__ = [
    "Calibrated",
    "Neighbours",
    "Ratio",
    "ams_ums",
    "any_pair",
    "calibrated_l2",
    "cluster_near_duplicates",
    "cosine_nearest",
    "median_pair_distance",
    "nearest",
    "nearest_with_flips",
    "ratio_test",
]


class Ratio(NamedTuple):
    """The ratio rule's numbers for each query.

    Attributes:
      d1: float64 [Q], distance to the nearest reference.
      d2: float64 [Q], distance to the nearest reference of another cluster.
      ratio: float64 [Q], d1 / d2 in [0, 1].
    """

    d1: np.ndarray
    d2: np.ndarray
    ratio: np.ndarray


class Calibrated(NamedTuple):
    """The calibrated distance of each query.

    Attributes:
      value: float64 [Q]; well below 1 is a copy, 1 / alpha is no nearer than the neighbours.
      n: how many neighbours calibrated it.
    """

    value: np.ndarray
    n: int


def ratio_test(
    queries: np.ndarray,
    references: np.ndarray,
    labels: np.ndarray,
    *,
    mirrored: np.ndarray | None = None,
    neighbours: Neighbours | None = None,
    chunk: int = 1024,
    what: str = "train",
) -> Ratio:
    """Distance to the nearest image over distance to the next *different* one (arXiv 2310.02664, §2).

    Taken literally the rule fails where the training set holds near-duplicates: nearest and second nearest
    are then one image and the ratio is about 1. Here the second must be of another cluster, so it is at a
    distance above 0 and the ratio is never 0/0.

    Args:
      queries: [Q,D] rows in [-1, 1].
      references: [R,D] rows in [-1, 1].
      labels: int [R], clusters (`cluster_near_duplicates`).
      mirrored: [R,D] the references mirrored, to compare with both orientations.
      neighbours: of the queries, if known already.
      chunk: rows per distance block.
      what: name of the references in an error.

    Raises:
      UserError: the references are all one cluster.
    """
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"{what}: its {len(labels)} images are near-duplicates of one image; the ratio rule needs two "
            "distinct images: add images or lower audit.near_duplicate"
        )
    if neighbours is None:
        neighbours = nearest_with_flips(queries, references, mirrored, 8, chunk)
    own = labels[neighbours.index[:, 0]]
    other = labels[neighbours.index] != own[:, None]
    found = other.any(1)
    d1 = neighbours.dist[:, 0]
    d2 = np.take_along_axis(neighbours.dist, other.argmax(1)[:, None], 1)[:, 0]
    # A large cluster can fill the whole neighbour list: search again without it.
    for label in np.unique(own[~found]):
        at = np.flatnonzero(~found & (own == label))
        rest = labels != label
        flips = None if mirrored is None else mirrored[rest]
        d2[at] = nearest_with_flips(queries[at], references[rest], flips, 1, chunk).dist[:, 0]
    return Ratio(d1, d2, d1 / d2)


def calibrated_l2(dist: np.ndarray, alpha: float = 0.5, n: int = 50) -> Calibrated:
    """Distance to the nearest image over alpha times the mean to the n nearest (arXiv 2301.13188, §5.1).

    Args:
      dist: [Q,k] distances from each query to its nearest references, nearest first.
      alpha: scale; at 0.5 a query equally far from all neighbours has value 2.
      n: neighbours that calibrate; reduced to k.

    Returns:
      The values and the n used. A query at distance 0 has value 0.
    """
    n = min(n, dist.shape[1])
    scale = alpha * dist[:, :n].mean(1)
    return Calibrated(np.divide(dist[:, 0], scale, out=np.zeros(len(dist)), where=dist[:, 0] > 0), n)


def cosine_nearest(
    features_q: np.ndarray, features_r: np.ndarray, *, centre: bool = False, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """The largest cosine of each query with any reference, in any feature space.

    Args:
      features_q: [Q,F].
      features_r: [R,F].
      centre: subtract the references' mean from both first.
      chunk: rows per block.

    Returns:
      best: float64 [Q] in [-1, 1]; 0 against a zero vector; exactly 1 within 1e-12 of it, so that copies
        pass the threshold 1.
      index: int64 [Q] into the references.
    """
    mean = np.asarray(features_r, np.float64).mean(0) if centre else 0.0
    starts = range(0, len(features_q), chunk)

    def part(place: int) -> tuple[np.ndarray, np.ndarray]:
        rows = _unit(features_q[starts[place] : starts[place] + chunk], mean)
        best, index = np.full(len(rows), -np.inf), np.zeros(len(rows), np.int64)
        for start in range(0, len(features_r), chunk):
            cosines = rows @ _unit(features_r[start : start + chunk], mean).T
            top = cosines.max(1)
            index = np.where(top > best, start + cosines.argmax(1), index)
            best = np.maximum(top, best)
        return best, index

    parts = [(np.zeros(0), np.zeros(0, np.int64)), *processes.spread(len(starts), part)]
    best, index = (np.concatenate(each) for each in zip(*parts, strict=True))
    return np.where(best > 1 - 1e-12, 1.0, np.maximum(best, -1.0)), index


def any_pair(
    features_q: np.ndarray,
    features_r: list[np.ndarray],
    edges: list[tuple[float, float]],
    *,
    chunk: int = 1024,
) -> np.ndarray:
    """Which references have a query's cosine inside a band, any query's (arXiv 2410.02467, eq. 9 before counting).

    Unlike in `ams_ums` a query may be credited to many references, and to some in every band.

    Args:
      features_q: [Q,F].
      features_r: [R,F] each: the references, and where flips count the mirrored ones; the larger cosine is taken.
      edges: bands [low, high).
      chunk: rows of queries per block.

    Returns:
      bool [bands,R].
    """
    units = [_unit(rows, 0.0) for rows in features_r]
    starts = range(0, len(features_q), chunk)

    def part(place: int) -> list[np.ndarray]:
        rows = _unit(features_q[starts[place] : starts[place] + chunk], 0.0)
        cosines = np.max([rows @ unit.T for unit in units], axis=0)
        cosines = np.where(cosines > 1 - 1e-12, 1.0, cosines)  # as in `cosine_nearest`
        return [np.stack([((cosines >= low) & (cosines < high)).any(0) for low, high in edges])]

    return np.any([found for (found,) in processes.spread(len(starts), part)], axis=0)


def _unit(rows: np.ndarray, mean: Any) -> np.ndarray:
    rows = np.asarray(rows, np.float64) - mean
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def ams_ums(
    best: np.ndarray,
    index: np.ndarray,
    taus: np.ndarray,
    *,
    labels: np.ndarray,
    distance: bool = False,
    confidence: float = 0.95,
) -> dict[str, list[float]]:
    """How many generations match, and how many different images they match, over thresholds.

    AMS(tau) is the share of generations whose best match passes tau. UMS(tau) counts the different images
    that are such a best match, over the generations. Both follow arXiv 2410.02467, with two changes:
    cumulative instead of bands, and only the nearest image is credited; counting every pair inside a band
    can credit one generation with many images, and UMS then exceeds AMS. `coverage` is the same count
    over the images.

    AMS has Wilson's interval over generations. For UMS and coverage it is Wilson's over images: whether an
    image is hit varies by at most p(1-p), which is concave in p, and hits of different images compete,
    so the interval is conservative. (Resampling generations instead loses images hit once.)

    Args:
      best: [Q], similarity (or distance) to the best match.
      index: int [Q], that match.
      taus: thresholds; a match passes at similarity >= tau, or at distance <= tau.
      labels: int [R], cluster of each reference; clusters are what is counted as an image.
      distance: `best` is a distance, so that smaller is closer.
      confidence: level.

    Returns:
      Lists over taus: tau, ams, ams_low, ams_high, ums, ums_low, ums_high, coverage, unique.
    """
    clusters, q = len(np.unique(labels)), len(best)
    names = ("tau", "ams", "ams_low", "ams_high", "ums", "ums_low", "ums_high", "coverage", "unique")
    out: dict[str, list[float]] = {name: [] for name in names}
    for tau in np.asarray(taus, np.float64):
        passed = best <= tau if distance else best >= tau
        unique = len(np.unique(labels[index[passed]]))
        ams, cover = wilson(int(passed.sum()), q, confidence), wilson(unique, clusters, confidence)
        per = clusters / q
        row = (tau, ams.value, ams.low, ams.high, unique / q, cover.low * per, cover.high * per)
        for name, value in zip(names, (*row, cover.value, unique), strict=True):
            out[name].append(float(value))
    return out
