"""How sharp images are beside others: total variation, and the share of high frequencies.

A denoiser that knows few images by heart answers with one of them however little it sees, so its answers are as
sharp as images; the mean over all that may lie behind strong noise is blurred (arXiv 2502.21278, figure 3).

    total variation     mean absolute difference of neighbouring pixels, along rows plus along columns
    high frequencies    energy of the cosine transform above a quarter cycle per pixel (half of the Nyquist frequency)
                        over its energy at all frequencies but zero

The cosine transform goes on beyond the border with the mirror image; a Fourier transform would see an edge there.
The share is one of a whole set, the sums over its images divided: one that is nearly constant, whose own share is
mostly rounding, counts for little. Intervals are over images: delta method, with Student's quantile.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.fft import dct
from scipy.special import stdtrit

from mdiff.types import Array, Estimate

HIGH = 0.25
"""Frequencies above it are high, in cycles per pixel; along one axis they end below 0.5."""


def total_variation(x: Array) -> Array:
    """Mean absolute difference of neighbours in images [N,H,W,C], along rows plus along columns: [N]."""
    down, across = (jnp.abs(jnp.diff(x, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2))
    return down + across


def energies(x: Array) -> tuple[Array, Array]:
    """Energy per pixel of images [N,H,W,C] at high frequencies [N], and at all but zero [N]: their variance."""
    wave = dct(dct(x, axis=1, norm="ortho"), axis=2, norm="ortho")
    rows, columns = (np.arange(side) / (2 * side) for side in x.shape[1:3])
    frequency = np.hypot(rows[:, None], columns[None, :])[..., None]
    power = wave**2 / math.prod(x.shape[1:])
    return (power * (frequency > HIGH)).sum(axis=(1, 2, 3)), (power * (frequency > 0)).sum(axis=(1, 2, 3))


def mean(a: np.ndarray, confidence: float = 0.95) -> Estimate:
    """The mean of a [N], of at least 2 images."""
    a = np.asarray(a, np.float64)
    return _estimate(float(a.mean()), a, confidence)


def ratio(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> Estimate:
    """mean(a) / mean(b) of two columns [N] of the same images; NaN where b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not b.mean():
        return Estimate(math.nan, math.nan, math.nan, len(a))
    value = float(a.mean() / b.mean())
    return _estimate(value, (a - value * b) / b.mean(), confidence)


def ratio_of_shares(
    part: np.ndarray, whole: np.ndarray, other: np.ndarray, its_whole: np.ndarray, confidence: float = 0.95
) -> Estimate:
    """mean(part) / mean(whole) over mean(other) / mean(its_whole), columns [N] of the same images; NaN where one is 0."""
    part, whole, other, its_whole = (np.asarray(each, np.float64) for each in (part, whole, other, its_whole))
    if not (whole.mean() and other.mean()):
        return Estimate(math.nan, math.nan, math.nan, len(part))
    share, its_share = part.mean() / whole.mean(), other.mean() / its_whole.mean()
    value = float(share / its_share)
    ours = (part - share * whole) / (whole.mean() * its_share)
    theirs = other / other.mean() - its_whole / its_whole.mean()
    return _estimate(value, ours - value * theirs, confidence)


def _estimate(value: float, influence: np.ndarray, confidence: float) -> Estimate:
    """A value with its interval, from what each image adds to it [N], to first order."""
    n = len(influence)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * math.sqrt(influence.var(ddof=1) / n)
    return Estimate(value, value - half, value + half, n)
