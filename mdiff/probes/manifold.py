"""How much of a reference set's support a sample covers, and how much of the sample lies in it.

Each set's support is estimated by balls around its rows, as wide as the distance to the row's k-th nearest
neighbour in its own set (itself left out).

- precision: share of the sample inside some ball of the reference; recall: share of the reference inside some
  ball of the sample (Kynkäänniemi et al., arXiv 1904.06991, Eq. 1-2).
- density: how many balls of the reference a row of the sample lies in, over k, 1 on average for equal laws;
  coverage: share of the reference's balls that hold a row of the sample (Naeem et al., arXiv 2002.09797, Eq. 2-3).
- Vendi score: how many different rows there are in effect (Friedman & Dieng, arXiv 2210.02410).

All depend on how many rows either set has: compare at equal sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from mdiff.probes import intervals
from mdiff.probes.intervals import Jackknife
from mdiff.types import Estimate

K = 5
"""Neighbours that set a ball's radius."""

_ELEMENTS = 1 << 22  # distances held at once


@dataclass(frozen=True)
class Support:
    """What the sample and the reference cover of each other.

    Attributes:
      precision: over rows of the sample.
      recall: over rows of the reference.
      density: mean over rows of the sample.
      coverage: over rows of the reference.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def support(
    sample: np.ndarray,
    reference: np.ndarray,
    *,
    k: int = K,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Support:
    """Precision, recall, density and coverage.

    The intervals (Wilson's; for density a bootstrap over the sample) are those of a fresh row against these
    balls; how the balls vary with the rows that made them is left out. For recall and coverage the fresh row is one
    of the reference: they do not tell how another draw of the sample would do.

    Args:
      sample: [n,F] rows, n > k.
      reference: [m,F] rows, m > k.
      k: neighbours.
      n_resamples: of the bootstrap.
      confidence: level.
      seed: of the bootstrap.

    Raises:
      ValueError: a set has no k neighbours.
    """
    sample, reference = np.asarray(sample, np.float64), np.asarray(reference, np.float64)
    own, other = radii(sample, k), radii(reference, k)
    n, m = len(sample), len(reference)
    within = np.zeros(n, np.int64)  # balls of the reference that hold the row
    recalled, covered = np.zeros(m, bool), np.zeros(m, bool)
    for part, dist in _distances(sample, reference):
        inside = dist <= other
        within[part] = inside.sum(1)
        covered |= inside.any(0)
        recalled |= (dist <= own[part, None]).any(0)
    return Support(
        precision=intervals.wilson(int((within > 0).sum()), n, confidence),
        recall=intervals.wilson(int(recalled.sum()), m, confidence),
        density=intervals.bootstrap(
            intervals.mean(within / k), n, n_resamples=n_resamples, confidence=confidence, seed=seed
        ),
        coverage=intervals.wilson(int(covered.sum()), m, confidence),
    )


def radii(rows: np.ndarray, k: int = K) -> np.ndarray:
    """Distance [n] from each row [n,F] to its k-th nearest other row.

    Raises:
      ValueError: there are not more than k rows.
    """
    if not 0 < k < len(rows):
        raise ValueError(f"{len(rows)} rows have no {k} nearest neighbours")
    out = np.empty(len(rows))
    for part, dist in _distances(rows, rows):
        out[part] = np.partition(dist, k, axis=1)[:, k]  # the row itself is at place 0
    return out


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of `a` and their Euclidean distances to all of `b`, by differences."""
    step = max(1, _ELEMENTS // len(b))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        yield part, cdist(a[part], b)


def vendi_score(rows: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K / n, with K the cosines of rows [n,F].

    Returns:
      Between 1 (all rows point one way) and min(n, F). Rows of length 0 count as one more direction of
      their own. NaN where there are no rows.
    """
    rows = np.asarray(rows, np.float64)
    if not len(rows):
        return float("nan")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    # The Gram matrix of features has the eigenvalues of K, whichever of the two is smaller.
    gram = unit.T @ unit if unit.shape[1] < len(unit) else unit @ unit.T
    share = np.append(np.linalg.eigvalsh(gram), float(np.sum(norms == 0))) / len(rows)
    share = share[share > 1e-15]
    return float(np.exp(-np.sum(share * np.log(share))))


def vendi(rows: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Jackknife:
    """`vendi_score` of rows [n,F], n >= 2, with intervals; the score grows with n, the corrected one less so."""
    rows = np.asarray(rows, np.float64)
    return intervals.jackknife(vendi_score, rows, confidence=confidence, seed=seed)
