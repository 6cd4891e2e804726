"""How far a sample is from a set of real images, in a named feature space.

Both distances have the form  s * (2 E f(X,Y) - E f(X,X') - E f(Y,Y'))  with f a distance (s = 1) or a
kernel (s = -1). The means over pairs of one sample leave out a row paired with itself (U-statistic), so
the estimate is unbiased whatever the two sizes are and can be slightly negative when the laws agree. A
sample that repeats the R reference images exactly lies below 0 by about the mean pair distance / R.

The bootstrap draws weights w over rows, and leaves out pairs of equal index there too: a row drawn twice is
not a pair of independent rows at distance 0. The pair mean of a resample is w'Fw / (n^2 - w'w) with the
diagonal of F at 0. Both samples are resampled. When the two laws agree the interval is wider than needed
(the first-order term of the statistic vanishes, that of its resamples does not). Simulated coverage of the
95 % percentile interval, 50 to 256 rows: 0.999 for equal laws, 0.92 to 0.95 for different ones; the basic and
the normal interval do worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from mdiff.probes import intervals
from mdiff.types import Estimate

KERNEL = "mmd2-rbf-median"
"""The kernel distance's name: squared MMD, Gaussian kernel, bandwidth = median pair distance."""


ROWS = 2048
"""The most rows of a set a comparison looks at; its matrices are this square."""


@dataclass(frozen=True)
class TwoSample:
    """Everything a two-sample statistic of pairs needs.

    Attributes:
      within_a: float64 [n,n] pair values, diagonal 0.
      within_b: float64 [m,m] pair values, diagonal 0.
      between: float64 [n,m] pair values.
      sign: 1 for a distance, -1 for a kernel.
    """

    within_a: np.ndarray
    within_b: np.ndarray
    between: np.ndarray
    sign: float

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows of a and of b."""
        n, m = self.between.shape
        return n, m

    def __call__(self, weights_a: np.ndarray, weights_b: np.ndarray) -> np.ndarray:
        """The statistic for weights [B,n] and [B,m] -> [B]; NaN where one row holds all the weight."""
        between = np.sum((weights_a @ self.between) * weights_b, 1) / (weights_a.sum(1) * weights_b.sum(1))
        inside = _pair_mean(self.within_a, weights_a) + _pair_mean(self.within_b, weights_b)
        return self.sign * (2 * between - inside)


def _pair_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    pairs = weights.sum(1) ** 2 - np.sum(weights**2, 1)
    total = np.sum((weights @ values) * weights, 1)
    return np.divide(total, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def energy(a: np.ndarray, b: np.ndarray) -> TwoSample:
    """The energy distance's pairs: Euclidean distances of rows a [n,F] and b [m,F] (Szekely & Rizzo 2013)."""
    a, b = _rows(a), _rows(b)
    return TwoSample(cdist(a, a), cdist(b, b), cdist(a, b), 1.0)


def kernel(a: np.ndarray, b: np.ndarray, bandwidth: float | None = None) -> TwoSample:
    """The kernel distance's pairs: exp(-d^2 / (2 bandwidth^2)) (Gretton et al. 2012, Lemma 6).

    Args:
      a: [n,F] rows.
      b: [m,F] rows of the reference.
      bandwidth: of the kernel; None takes the median pair distance of b. Fix it when numbers against
        several references are to be compared.
    """
    a, b = _rows(a), _rows(b)
    scale = 2 * (median_distance(b) if bandwidth is None else bandwidth) ** 2
    parts = [np.exp(-(cdist(x, y) ** 2) / scale) for x, y in ((a, a), (b, b), (a, b))]
    for square in parts[:2]:
        np.fill_diagonal(square, 0.0)
    return TwoSample(parts[0], parts[1], parts[2], -1.0)


def polynomial(a: np.ndarray, b: np.ndarray) -> TwoSample:
    """The pairs of KID: (x.y / F + 1)^3, whose unbiased estimate it is (arXiv 1801.01401, §4).

    KID as published averages over subsets of 1000 rows, which only saves time; here every pair counts.

    Args:
      a: [n,F] rows.
      b: [m,F] rows of the reference.
    """
    a, b = _rows(a), _rows(b)
    parts = [(x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    for square in parts[:2]:
        np.fill_diagonal(square, 0.0)
    return TwoSample(parts[0], parts[1], parts[2], -1.0)


def median_distance(rows: np.ndarray) -> float:
    """Median Euclidean distance over pairs of different rows [n,F]; 1 when it is 0."""
    rows = _rows(rows)
    pairs = cdist(rows, rows)[np.triu_indices(len(rows), 1)]
    return float(np.median(pairs)) or 1.0


def energy_distance(
    a: np.ndarray, b: np.ndarray, *, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'|, without a square root; 0 for equal laws.

    Args:
      a: [n,F] rows of the sample, n >= 2.
      b: [m,F] rows of the reference, m >= 2.
      n_resamples: bootstrap resamples of both.
      confidence: level.
      seed: of the bootstrap.

    Returns:
      The unbiased estimate in the features' unit, with its bootstrap interval; its n is that of a.
    """
    return _estimate(energy(a, b), n_resamples, confidence, seed)


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    bandwidth: float | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Squared maximum mean discrepancy with a Gaussian kernel; 0 for equal laws, at most 2.

    Args and Returns are those of `energy_distance`; `bandwidth` as in `kernel`.
    """
    return _estimate(kernel(a, b, bandwidth), n_resamples, confidence, seed)


def thinned(rows: np.ndarray, seed: int) -> np.ndarray:
    """At most `ROWS` entries, drawn by seed and in their order; the same ones for sets of one length."""
    if len(rows) <= ROWS:
        return rows
    generator = np.random.Generator(np.random.Philox(seed))
    return rows[np.sort(generator.choice(len(rows), ROWS, replace=False))]


def compare_sets(
    sets: dict[str, np.ndarray], *, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[dict[str, Estimate | None], dict[str, np.ndarray]]:
    """Both distances of generations to training and held-out images, and of those two to each other.

    The floor, training against held-out images, estimates 0 and shows what so few images can resolve. All
    kernels share one bandwidth, the median pair distance of the real images.

    Args:
      sets: rows [.,F] of `generated`, `train` and, if there are any, `heldout`.
      n_resamples: bootstrap resamples.
      confidence: level.
      seed: of the bootstrap; one seed resamples the same generations for every entry.

    Returns:
      `energy_train`, `energy_heldout`, `energy_floor` and the same of `kernel`; None where a set is absent
      or has fewer than 2 rows. And their bootstrap draws [B] by the same names.
    """
    width = median_distance(np.concatenate([rows for name, rows in sets.items() if name != "generated"]))
    estimates: dict[str, Estimate | None] = {}
    draws: dict[str, np.ndarray] = {}
    for suffix, first, second in (
        ("train", "generated", "train"),
        ("heldout", "generated", "heldout"),
        ("floor", "train", "heldout"),
    ):
        a, b = sets.get(first, np.zeros((0, 1))), sets.get(second, np.zeros((0, 1)))
        if min(len(a), len(b)) < 2:
            estimates |= {f"energy_{suffix}": None, f"kernel_{suffix}": None}
            continue
        for kind, pairs in (("energy", energy(a, b)), ("kernel", kernel(a, b, width))):
            name = f"{kind}_{suffix}"
            draws[name] = intervals.resample(pairs, *pairs.sizes, n_resamples=n_resamples, seed=seed)
            value = float(pairs(np.ones((1, len(a))), np.ones((1, len(b))))[0])
            estimates[name] = intervals.percentile(value, draws[name], len(a), confidence)
    return estimates, draws


def _estimate(pairs: TwoSample, n_resamples: int, confidence: float, seed: int) -> Estimate:
    if min(pairs.sizes) < 2:
        raise ValueError(f"samples of {pairs.sizes} rows: each needs at least 2")
    return intervals.bootstrap(pairs, *pairs.sizes, n_resamples=n_resamples, confidence=confidence, seed=seed)


def _rows(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x.reshape(len(x), -1)
