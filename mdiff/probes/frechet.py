"""Fréchet distance between two sets of rows, and how much of it is too few rows.

Between normal laws fitted to both sets (Heusel et al., arXiv 1706.08500, Eq. 6):

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))

The root of the symmetric product has the trace of (S1 S2)^(1/2), and eigenvalues that cannot turn complex. The
distance of two samples of one law is above 0 by about c/n: comparable only at equal n, and only with its floor
beside it. `frechet` therefore gives it plain and extrapolated to infinitely many rows; the extrapolation rests on
the same 1/n law as FID-infinity (arXiv 1911.07023), by jackknife instead of a regression over sizes. The law
needs more rows than features.
"""

from __future__ import annotations

import numpy as np

from mdiff.probes import intervals
from mdiff.probes.intervals import Jackknife


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of rows a [n,F] and b [m,F], each of at least 2, in the features' unit squared; float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return normal_distance(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def normal_distance(m1: np.ndarray, s1: np.ndarray, m2: np.ndarray, s2: np.ndarray) -> float:
    """The distance of two normal laws, with means [F] and covariances [F,F]; never below 0."""
    root = _root(s1)
    cross = root @ s2 @ root
    values = _clipped(np.linalg.eigvalsh((cross + cross.T) / 2))
    distance = np.sum((m1 - m2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(values).sum()
    return max(float(distance), 0.0)


def frechet(a: np.ndarray, b: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Jackknife:
    """The distance with intervals, plain and less its bias.

    Args:
      a: [n,F] rows, n >= 3.
      b: [m,F] rows, m >= 3.
      confidence: level.
      seed: of the groups left out.

    Returns:
      Both estimates. The corrected one is unbiased to first order and can be slightly negative when the laws
      agree. In simulation (normal laws, 8 and 32 features, 50 to 256 rows) its 95 % interval covered the true
      distance in 0.95 to 0.99 of the cases, also with as few as 1.5 rows per feature, where the plain
      distance of two equal laws was 17; the plain one's interval shows its spread, not its bias.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return intervals.jackknife(frechet_distance, a, b, confidence=confidence, seed=seed)


def _covariance(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(0)
    return centred.T @ centred / (len(rows) - 1)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(_clipped(values))) @ vectors.T


def _clipped(values: np.ndarray) -> np.ndarray:
    """Eigenvalues with those that are rounding as 0: their roots would not be small."""
    least = len(values) * np.finfo(np.float64).eps * max(float(values.max()), 0.0)
    return np.where(values > least, values, 0.0)
