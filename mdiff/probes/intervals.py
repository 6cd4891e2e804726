"""Intervals: Wilson for a rate, Newcombe for a difference of paired rates, bootstrap for means and pair
statistics, jackknife for smooth statistics with a bias of order 1/n.

A rate never gets a bootstrap interval: with 0 of n every resample is 0 and the interval would claim
certainty that n draws cannot give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

from mdiff.types import Estimate

Statistic = Callable[..., np.ndarray]
"""`(weights [B,n1], weights [B,n2], …) -> [B]`: the statistic of B weighted samples at once. Weights are
how often each row was drawn; they sum to n."""

_ELEMENTS = 1 << 22  # weights made at once; bounds memory


def wilson(hits: int, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a rate (Wilson 1927, JASA 22:209).

    Args:
      hits: how many of the draws were hits.
      n: draws; 0 gives value NaN with [0, 1].
      confidence: level, such as 0.95.

    Returns:
      hits / n with its interval, never of zero width.

    Raises:
      ValueError: hits is not in 0..n.
    """
    hits, n = int(hits), int(n)
    if not 0 <= hits <= n:
        raise ValueError(f"hits = {hits} of n = {n}")
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    return Estimate(hits / n, *wilson_limits(hits / n, n, confidence), n)


def wilson_limits(p: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The limits for a share p in [0, 1] of n > 0; n need not be whole, as for an effective size."""
    z = float(special.ndtri(0.5 + confidence / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)


def newcombe(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Difference of two rates measured on the same units.

    Method 10 of Newcombe 1998 (Statistics in Medicine 17:2635): the Wilson limits of both rates are
    squared and added, less the part their correlation explains; that correlation is shrunk by a
    continuity correction. At 0 of n against 0 of n the interval still has Wilson's width.

    Args:
      first: bool [n], the first rule's verdict on each unit.
      second: bool [n], the second rule's verdict on the same units.
      confidence: level.

    Returns:
      mean(first) - mean(second) with its interval.

    Raises:
      ValueError: the two are not of one length.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired verdicts of shapes {first.shape} and {second.shape}")
    n = len(first)
    if n == 0:
        return Estimate(math.nan, -1.0, 1.0, 0)
    both, neither = int(np.sum(first & second)), int(np.sum(~first & ~second))
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(~first & second))
    one = wilson(both + only_first, n, confidence)
    two = wilson(both + only_second, n, confidence)

    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product = both * neither - only_first * only_second
    shrunk = max(product - n / 2, 0.0) if product > 0 else float(product)
    phi = shrunk / math.sqrt(margins) if margins else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    value = (only_first - only_second) / n
    low = value - half(one.value - one.low, two.high - two.value)
    high = value + half(one.high - one.value, two.value - two.low)
    return Estimate(value, max(low, -1.0), min(high, 1.0), n)


def invisible_below(n: int, confidence: float = 0.95) -> float:
    """The smallest rate that n draws would show at least once with this confidence.

    Solves 1 - (1 - rate)^n = confidence; 256 draws give 0.012. With n = 0 it is 1.
    """
    return 1.0 if n <= 0 else -math.expm1(math.log1p(-confidence) / n)


def resample(statistic: Statistic, *sizes: int, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """The statistic on bootstrap resamples.

    The draws of sample number s depend on (seed, s, its size) alone. Two statistics resampled with one
    seed and one size of sample 0 therefore share that sample's resamples and may be subtracted draw by
    draw.

    Args:
      statistic: of weighted samples, see `Statistic`. Weights make a pairwise statistic cheap: it is a
        quadratic form in them over one matrix of distances.
      *sizes: rows in each sample; samples are resampled independently of one another.
      n_resamples: B.
      seed: of numpy's Philox generator.

    Returns:
      float64 [B]; NaN where the statistic is undefined on a resample.
    """
    streams = np.random.SeedSequence(seed).spawn(len(sizes))
    generators = [np.random.Generator(np.random.Philox(stream)) for stream in streams]
    batch = max(1, min(n_resamples, _ELEMENTS // max(sizes)))
    draws = []
    for start in range(0, n_resamples, batch):
        count = min(batch, n_resamples - start)
        weights = [_weights(g, count, size) for g, size in zip(generators, sizes, strict=True)]
        draws.append(np.asarray(statistic(*weights), np.float64))
    return np.concatenate(draws) if draws else np.zeros(0)


def _weights(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    index = generator.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
    return np.bincount(index.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def percentile(value: float, draws: np.ndarray, n: int, confidence: float = 0.95) -> Estimate:
    """The percentile interval of bootstrap draws [B]; NaN draws are left out.

    With fewer than two rows, or no defined draw, the limits are NaN: unknown, not zero width.
    """
    known = draws[np.isfinite(draws)]
    if n < 2 or not len(known):
        return Estimate(float(value), math.nan, math.nan, n)
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(float(value), float(low), float(high), n)


def bootstrap(
    statistic: Statistic, *sizes: int, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Percentile bootstrap over rows (Efron 1979); not for rates, see `wilson`.

    Args:
      statistic: of weighted samples, see `Statistic`.
      *sizes: rows in each sample; the first is the estimate's n.
      n_resamples: number of resamples.
      confidence: level.
      seed: of the resamples.

    Returns:
      The statistic on the samples as they are (all weights 1), with its interval.
    """
    value = statistic(*(np.ones((1, size)) for size in sizes))
    draws = resample(statistic, *sizes, n_resamples=n_resamples, seed=seed)
    return percentile(float(np.asarray(value)[0]), draws, sizes[0], confidence)


def mean(values: np.ndarray) -> Statistic:
    """The mean of `values` [n] as a statistic for `bootstrap`."""
    values = np.asarray(values, np.float64)
    return lambda weights: weights @ values / weights.sum(1)


class Jackknife(NamedTuple):
    """A statistic with its standard error, as it is and less its bias of order 1/n.

    Attributes:
      plain: the statistic on all rows.
      corrected: with the bias extrapolated away.
    """

    plain: Estimate
    corrected: Estimate


def jackknife(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    confidence: float = 0.95,
    groups: int = 20,
    seed: int = 0,
) -> Jackknife:
    """Delete-a-group jackknife of a statistic of independent samples (Quenouille 1956, Biometrika 43:353).

    A resample with repeated rows has a bias of its own, which for distances between covariances is as large
    as what is measured; leaving rows out changes the bias a little and by a known law. One sample at a time is
    cut into groups by seed; with t_i the statistic without group i, the bias is (g - 1)(mean t_i - t) and the
    variance (g - 1)/g sum (t_i - mean t_i)^2, summed over samples. Intervals are Student's with g - 1 degrees.

    Args:
      statistic: of samples [n,F], smooth in their laws.
      *samples: each with at least 2 rows, or one more than the statistic needs; the first one's length is the estimates' n.
      confidence: level.
      groups: g; no more than there are rows.
      seed: of the cut into groups.
    """
    value = float(statistic(*samples))
    bias = variance = 0.0
    freedom = math.inf
    for s, sample in enumerate(samples):
        g = min(groups, len(sample))
        order = np.random.Generator(np.random.Philox([seed, s])).permutation(len(sample))
        left = []
        for i in range(g):
            kept = np.sort(np.concatenate([order[j::g] for j in range(g) if j != i]))
            left.append(float(statistic(*samples[:s], sample[kept], *samples[s + 1 :])))
        away = np.array(left) - np.mean(left)
        bias += (g - 1) * (float(np.mean(left)) - value)
        variance += (g - 1) / g * float(away @ away)
        freedom = min(freedom, g - 1)
    half = float(special.stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variance)
    n = len(samples[0])
    fixed = value - bias
    return Jackknife(
        Estimate(value, value - half, value + half, n), Estimate(fixed, fixed - half, fixed + half, n)
    )
