"""How many different training images a model gives away, and how that grows with the number of generations.

The raw material is h_j, how many of N generations are copies of image j; every generation is a copy of at most one.

- Rarefaction: how many different images n <= N generations give on average. Two models, or papers, are
  comparable only at one n: the count of different images grows with every further generation.
- Chao1: a lower bound of how many the model would give in the end, from how many were seen once and twice.
- Bands: of similarity, as differences of the cumulative AMS and UMS (`similarity.ams_ums`).
- Authenticity: generations that are no nearer to a training image than training images are to each other.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from mdiff.probes import intervals
from mdiff.probes.intervals import wilson
from mdiff.types import Estimate


def rarefaction(
    hits: np.ndarray, draws: int, at: np.ndarray, *, images: int | None = None, confidence: float = 0.95
) -> list[Estimate]:
    """Expected number of different images in n of the N generations.

    U(n) = sum_j a_j with a_j = 1 - C(N - h_j, n) / C(N, n), unbiased for the expected number in n fresh
    generations (Hurlbert 1971, Ecology 52:577). Its variance over fresh sets of generations is about
    sum_j a_j^2 - U(n)^2 / R (Colwell et al. 2012, Journal of Plant Ecology 5:3, Eq. 5, with the R images known).
    The interval is Wilson's of U(n) out of as many images as give a binomial that variance, R of them at n = N:
    a normal interval would have no width when all images are seen.

    Args:
      hits: int [R], copies of each image among N generations.
      draws: N.
      at: int [k], numbers of generations n, in 0..N.
      images: R, if `hits` leaves out images without a copy.
      confidence: level.

    Returns:
      One estimate per n, in images; its n is that number of generations.

    Raises:
      ValueError: some n is not in 0..N, or there are more hits than generations.
    """
    hits, at = _counts(hits, draws), np.asarray(at, np.int64)
    if at.size and (at.min() < 0 or at.max() > draws):
        raise ValueError(f"rarefaction to {at.min()}..{at.max()} of {draws} generations")
    images = len(hits) if images is None else images
    out = []
    for n in at:
        seen = 1 - _missed(hits, draws, int(n))
        value = float(seen.sum())
        binomial = value - value * value / images
        variance = float(seen @ seen) - value * value / images
        size = images * max(1.0, binomial / variance) if variance > 0 else images
        low, high = intervals.wilson_limits(min(value / images, 1.0), size, confidence)
        out.append(Estimate(value, low * images, min(high * images, float(n)), int(n)))
    return out


def _missed(hits: np.ndarray, draws: int, n: int) -> np.ndarray:
    """C(N - h, n) / C(N, n): the share of subsets of n generations without any of these h."""
    left = draws - hits
    log = special.gammaln(left + 1) - special.gammaln(np.maximum(left - n, 0) + 1)
    log = log - special.gammaln(draws + 1) + special.gammaln(draws - n + 1)
    return np.where(left >= n, np.exp(np.minimum(log, 0.0)), 0.0)


def chao1(hits: np.ndarray, draws: int, *, most: int | None = None, confidence: float = 0.95) -> Estimate:
    """A lower bound of the number of images that endless generation would copy, bias-corrected.

    U + (N - 1)/N f1 (f1 - 1) / (2 (f2 + 1)), with U images copied at all, f1 once and f2 twice (Chao 1984). The
    interval is Chao's (1987, Biometrics 43:783): log-normal in the unseen part, with the variance of the
    bias-corrected form; with at most one image seen once, from the chance of having missed one.

    Args:
      hits: int [R], copies of each image among N generations.
      draws: N.
      most: how many images there are; value and limits stop there.
      confidence: level.

    Returns:
      The estimate in images; its n is N. It bounds from below: with images of very different chances the truth
      is often above the upper limit too. No copy at all says nothing about how many there are: the value is
      0 and the upper limit `most`, or NaN.
    """
    hits = _counts(hits, draws)
    seen, once, twice = (int(np.sum(x)) for x in (hits > 0, hits == 1, hits == 2))
    if seen == 0:
        return Estimate(0.0, 0.0, math.nan if most is None else float(most), draws)
    z = float(special.ndtri(0.5 + confidence / 2))
    factor = (draws - 1) / draws
    unseen = factor * once * (once - 1) / (2 * (twice + 1))
    if unseen > 0:
        variance = _variance(seen + unseen, once, twice, factor)
        stretch = math.exp(z * math.sqrt(math.log1p(variance / unseen**2)))
        low, high = seen + unseen / stretch, seen + unseen * stretch
    else:
        missing = math.exp(-float(hits.sum()) / seen)
        centre = seen / (1 - missing)
        half = z * math.sqrt(seen * missing) / (1 - missing)
        low, high = max(float(seen), centre - half), centre + half
    top = math.inf if most is None else float(most)
    return Estimate(min(seen + unseen, top), min(low, top), min(high, top), draws)


def _variance(total: float, once: int, twice: int, factor: float) -> float:
    if twice == 0:
        tail = factor**2 * once**4 / (4 * total)
        return factor * once * (once - 1) / 2 + factor**2 * once * (2 * once - 1) ** 2 / 4 - tail
    return (
        factor * once * (once - 1) / (2 * (twice + 1))
        + factor**2 * once * (2 * once - 1) ** 2 / (4 * (twice + 1) ** 2)
        + factor**2 * once**2 * twice * (once - 1) ** 2 / (4 * (twice + 1) ** 4)
    )


def _counts(hits: np.ndarray, draws: int) -> np.ndarray:
    hits = np.asarray(hits, np.int64)
    if hits.sum() > draws:
        raise ValueError(f"{hits.sum()} copies among {draws} generations")
    return hits


def banded(
    best: np.ndarray,
    index: np.ndarray,
    edges: list[tuple[float, float]],
    *,
    labels: np.ndarray,
    confidence: float = 0.95,
) -> list[tuple[Estimate, Estimate]]:
    """AMS and UMS within bands of similarity, as differences of the cumulative ones.

    AMS(low) - AMS(high) is the share of generations whose best match lies in [low, high). UMS(low) - UMS(high) counts
    images whose nearest generations reach low and not high, per generation. Both add up over bands. Counting every
    pair inside a band instead (arXiv 2410.02467, Eq. 9) puts an image with a match at 0.9 into the low band too, and
    can credit one generation with many images.

    Args:
      best: [Q], similarity to the best match.
      index: int [Q], that match.
      edges: bands [low, high); the last high may be infinite.
      labels: int [R], cluster of each reference; clusters are what is counted as an image.
      confidence: level.

    Returns:
      (AMS, UMS) of each band; AMS with Wilson's interval over generations (its n), UMS with Wilson's over images
      scaled to generations, as in `similarity.ams_ums`.
    """
    clusters, q = len(np.unique(labels)), len(best)
    reached = np.full(int(labels.max()) + 1, -np.inf)
    np.maximum.at(reached, labels[index], best)
    out = []
    for low, high in edges:
        ams = wilson(int(np.sum((best >= low) & (best < high))), q, confidence)
        ums = wilson(int(np.sum((reached >= low) & (reached < high))), clusters, confidence)
        per = clusters / q
        out.append((ams, Estimate(ums.value * per, ums.low * per, ums.high * per, q)))
    return out


def authentic(distance: np.ndarray, index: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Which generations are no copies by the rule of arXiv 2102.08921, §3.3.

    A generation is authentic when its nearest training image is nearer to another training image than to it. A
    copy of every training image has authenticity 0; fresh draws of the training law about 1/2 or more.

    Args:
      distance: [Q] from each generation to its nearest training image.
      index: int [Q], that image.
      spacing: [R] from each training image to its nearest *different* one. With exact duplicates taken as
        different, spacing is 0 and everything authentic.

    Returns:
      bool [Q].
    """
    return distance > spacing[index]
