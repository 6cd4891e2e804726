"""How often a classifier is right, how well it knows that, and the temperature that makes it know best, by noise level.

Labels may be soft. Accuracy asks for the teacher's favourite class; calibration takes the teacher's probability of the class
that the classifier chose, which is the chance that it is right if labels are drawn from the teacher. Hard labels make both one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, ndtri, softmax

from mdiff.probes import intervals
from mdiff.types import Estimate

BINS = 15
"""Equal bins of confidence (arXiv 1706.04599, section 5)."""
RANGE = (1e-2, 1e2)
"""Temperatures sought."""


@dataclass(frozen=True)
class Calibration:
    """A classifier on held-out images, by noise level.

    Attributes:
      levels: L noise levels (EDM's sigma), rising.
      accuracy: share of images whose class is that of the teacher; Wilson's intervals.
      ece: expected calibration error before the temperature; bootstrap over images.
      temperature: T that the logits are to be divided by.
    """

    levels: tuple[float, ...]
    accuracy: tuple[Estimate, ...]
    ece: tuple[Estimate, ...]
    temperature: tuple[Estimate, ...]


def measure(
    logits: np.ndarray,
    teacher: np.ndarray,
    levels: Sequence[float],
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Accuracy, calibration error and temperature at each noise level.

    Args:
      logits: [L,N,K] of N held-out images at L levels.
      teacher: [N,K] their class probabilities.
      levels: the noise levels, rising.
      confidence: level of the intervals.
      n_resamples: bootstrap resamples of the calibration error.
      seed: of those.
    """
    each = [
        (
            accuracy(part, teacher, confidence),
            calibration_error(part, teacher, confidence, n_resamples, seed),
            temperature(part, teacher, confidence),
        )
        for part in logits
    ]
    return Calibration(tuple(levels), *(tuple(column) for column in zip(*each, strict=True)))


def accuracy(logits: np.ndarray, teacher: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Share of logits [N,K] whose largest is at the largest of the teacher's probabilities [N,K]."""
    hits = np.argmax(logits, axis=1) == np.argmax(teacher, axis=1)
    return intervals.wilson(int(hits.sum()), len(hits), confidence)


def calibration_error(
    logits: np.ndarray,
    teacher: np.ndarray,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Expected calibration error: mean over images of |accuracy - confidence| of their bin (arXiv 1706.04599, eq. 5).

    The interval is a percentile bootstrap. The error of a calibrated classifier is not 0 but about what chance makes of N images
    in 15 bins, and resamples have that twice: read the interval as its width.

    Args:
      logits: [N,K].
      teacher: [N,K] class probabilities.
      confidence: level of the interval.
      n_resamples: bootstrap resamples.
      seed: of those.
    """
    said = softmax(np.asarray(logits, np.float64), axis=1)
    chosen = said.argmax(axis=1)
    rows = np.arange(len(said))
    sure, right = said[rows, chosen], np.asarray(teacher, np.float64)[rows, chosen]
    # Bins are closed above, as in the paper: a confidence of 1 is in the last one.
    bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    excess = np.zeros((len(said), BINS))
    excess[rows, bins] = right - sure

    def error(weights: np.ndarray) -> np.ndarray:
        return np.abs(weights @ excess).sum(1) / weights.sum(1)

    return intervals.bootstrap(error, len(said), n_resamples=n_resamples, confidence=confidence, seed=seed)


def temperature(logits: np.ndarray, teacher: np.ndarray, confidence: float = 0.95) -> Estimate:
    """The T whose softmax(logits / T) has the least cross-entropy with the teacher (arXiv 1706.04599, section 4.2).

    Where all images are classified correctly that falls for ever with T, and where the logits know nothing it rises for ever. So
    ln T has a standard normal prior, which counts as much as one image; this is its posterior's mode, and the interval Laplace's:
    with h the second derivative of an image's loss in ln T, the variance of ln T is 1 / (sum h + 1).

    Args:
      logits: [N,K].
      teacher: [N,K] class probabilities.
      confidence: level of the interval.
    """
    logits, teacher = np.asarray(logits, np.float64), np.asarray(teacher, np.float64)
    n = len(logits)

    def loss(log_t: float) -> float:
        each = np.sum(teacher * log_softmax(logits * math.exp(-log_t), axis=1), axis=1)
        return float(log_t**2 / 2 - each.sum())

    bounds = (math.log(RANGE[0]), math.log(RANGE[1]))
    found = float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)
    # With z = logits / T and p = softmax(z): d loss / d ln T = sum (teacher - p) z, and that has the derivative var_p(z) - itself.
    scaled = logits * math.exp(-found)
    said = softmax(scaled, axis=1)
    mean = np.sum(said * scaled, axis=1, keepdims=True)
    curvature = np.sum(said * (scaled - mean) ** 2) - np.sum((teacher - said) * scaled)
    half = float(ndtri(0.5 + confidence / 2)) / math.sqrt(max(curvature, 0.0) + 1)
    return Estimate(math.exp(found), math.exp(found - half), math.exp(found + half), n)
