"""How much better a denoiser does on its training images than on images it never saw, by noise level.

At each noise level sigma the same fixed noise is added to training and to held-out images, and

    gap(sigma) = mean held-out error / mean training error,    error = mean over pixels of (D(x + sigma n) - x)^2.

It is 1 for a denoiser that knows the law and no images, and grows as images are learned by heart; it needs no
sampling, and says at which noise levels it happens. The noise is the same at every call, so a curve over training
moves because the network does; it belongs to the image, so that a set may grow and its noise stays. Interval: the two
sets are independent, so the logarithm of the ratio of their means has the standard error sqrt(v_h / m_h^2 + v_t / m_t^2),
v the variances of the means over images (delta method), and Student's quantile with Welch's degrees of freedom (Welch
1947, Biometrika 34:28).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from mdiff.keys import key
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.types import Array, Denoiser, Estimate

RESOLVED = float(np.finfo(np.float32).eps) ** 2
"""Squared errors of pixels in [-1, 1] below this are rounding: they count as this much, so that no ratio is infinite."""


def fixed_noise(seed: int, draw: int | Array, ids: Array, shape: tuple[int, ...]) -> Array:
    """Unit noise [N,*shape]: that of draw number `draw` of the images `ids` [N]; nothing else decides it."""
    base = key(seed, "gap", draw)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(base, i), shape))(ids)


def errors(
    process: GaussianProcess,
    denoiser: Denoiser,
    x0: Array,
    ids: Array,
    levels: tuple[float, ...],
    *,
    draws: int = 2,
    seed: int = 0,
    cond: Array | None = None,
) -> Array:
    """Squared error of the denoised images by noise level; pure, to be traced.

    Args:
      process: the noise law the denoiser was made for.
      denoiser: `(xt, t, cond) -> Prediction`.
      x0: [N,H,W,C] clean images in [-1, 1].
      ids: int [N], which noise each image gets.
      levels: L noise levels (EDM's sigma).
      draws: of noise, averaged over.
      seed: of the noise.
      cond: [N,E] conditions of the images, or None.

    Returns:
      float32 [L,N], mean over pixels and draws.
    """
    sigma = jnp.repeat(jnp.asarray(levels, jnp.float32), draws)
    number = jnp.tile(jnp.arange(draws), len(levels))

    def one(at: tuple[Array, Array]) -> Array:
        t = jnp.full(len(x0), process.time(at[0]))
        noise = fixed_noise(seed, at[1], ids, x0.shape[1:])
        xt = bcast(process.alpha(t), x0) * (x0 + at[0] * noise)
        wrong = denoiser(xt, t, cond).x0 - x0
        return jnp.mean(wrong**2, axis=tuple(range(1, x0.ndim)))

    found = jax.lax.map(one, (sigma, number))  # one trace of the network for all levels
    return found.reshape(len(levels), draws, len(x0)).mean(1)


@dataclass(frozen=True)
class Gap:
    """The loss gap of a denoiser.

    Attributes:
      levels: noise levels.
      ratio: held-out over training error at each level; n is the number of training images.
      train: mean training error at each level.
      heldout: mean held-out error at each level.
      overall: the geometric mean of the ratios over the levels.
    """

    levels: tuple[float, ...]
    ratio: list[Estimate]
    train: list[float]
    heldout: list[float]
    overall: Estimate


def gap(train: np.ndarray, heldout: np.ndarray, levels: tuple[float, ...], confidence: float = 0.95) -> Gap:
    """The gap from errors of training images [L,N] and held-out images [L,M], of at least 2 images each."""
    train, heldout = (np.maximum(np.asarray(side, np.float64), RESOLVED) for side in (train, heldout))
    logs = np.log(heldout.mean(1)) - np.log(train.mean(1))
    # What each image adds to the logarithm, to first order: levels share images, so their sums share errors.
    ours, theirs = (side / side.mean(1, keepdims=True) - 1 for side in (train, heldout))

    def estimate(log: float, a: np.ndarray, b: np.ndarray) -> Estimate:
        half = _half(a, b, confidence)
        return Estimate(math.exp(log), math.exp(log - half), math.exp(log + half), train.shape[1])

    return Gap(
        levels=levels,
        ratio=[estimate(float(log), a, b) for log, a, b in zip(logs, ours, theirs, strict=True)],
        train=train.mean(1).tolist(),
        heldout=heldout.mean(1).tolist(),
        overall=estimate(float(logs.mean()), ours.mean(0), theirs.mean(0)),
    )


def _half(a: np.ndarray, b: np.ndarray, confidence: float) -> float:
    """Half the width of Welch's interval of the difference of two independent means, from their samples [N], [M]."""
    parts = [(rows.var(ddof=1) / len(rows), len(rows) - 1) for rows in (a, b)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    freedom = variance**2 / sum(part**2 / less for part, less in parts)
    return float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variance)
