"""Denoisers known exactly, for ground truth without training.

The *empirical* denoiser is the posterior mean under the uniform law on the training images: it memorizes
perfectly. The *Gaussian* one is that under a fitted normal law: it memorizes nothing. Under the law
"empirical with probability `share`, else Gaussian" it is their posterior-weighted mixture, whose samples are
copies at the rate `share`: a memorizer with a known knob.

All three act on images at unit signal scale, x = x0 + sigma n, and are `(x, sigma) -> x0` functions;
`mdiff.nets.denoiser.from_sigma_fn` makes Denoisers of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.errors import UserError
from mdiff.types import Array

SigmaFn = Callable[[Array, Array], Array]
"""`(x [B,H,W,C], sigma [B]) -> x0 [B,H,W,C]`."""


def _squared_distances(rows: Array, points: Array) -> Array:
    """[B,N] by differences, one point at a time: exact near zero, and no [B,N,D] array."""
    return jax.lax.map(lambda point: jnp.sum((rows - point) ** 2, axis=-1), points).T


def _flat(x: Any) -> Any:
    return x.reshape(len(x), -1)


def _dot(a: Array, b: Array) -> Array:
    """Matrix product in full float32; the default of accelerators rounds the factors first."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def empirical(images: np.ndarray) -> SigmaFn:
    """E[x0 | x] = sum_i softmax_i(-||x - x_i||^2 / (2 sigma^2)) x_i (arXiv 2310.02664, eq. 3).

    Args:
      images: [N,H,W,C] float in [-1, 1].
    """
    points = jnp.asarray(_flat(images), jnp.float32)

    def denoise(x: Array, sigma: Array) -> Array:
        logits = -_squared_distances(_flat(x), points) / (2 * sigma[:, None] ** 2)
        return _dot(jax.nn.softmax(logits), points).reshape(x.shape)

    return denoise


def _spectrum(images: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], eigenvectors [D,D] and eigenvalues [D] of the fitted covariance, in float64."""
    rows = _flat(np.asarray(images, np.float64))
    mean = rows.mean(0)
    values, vectors = np.linalg.eigh(np.cov(rows.T) + ridge * np.eye(rows.shape[1]))
    return mean, vectors, np.maximum(values, 0.0)


def gaussian(images: np.ndarray, ridge: float = 1e-3) -> SigmaFn:
    """E[x0 | x] = mu + S (S + sigma^2 I)^-1 (x - mu) for the normal law fitted to `images`.

    Args:
      images: [N,H,W,C] float in [-1, 1].
      ridge: added to the covariance's diagonal, so that few images still give full rank.
    """
    mean, vectors, values = (jnp.asarray(a, jnp.float32) for a in _spectrum(images, ridge))

    def denoise(x: Array, sigma: Array) -> Array:
        shrink = values / (values + sigma[:, None] ** 2)
        along = _dot(_flat(x) - mean, vectors)
        return (mean + _dot(along * shrink, vectors.T)).reshape(x.shape)

    return denoise


def mixture(images: np.ndarray, share: float, ridge: float = 1e-3) -> SigmaFn:
    """The posterior mean under share * empirical + (1 - share) * Gaussian.

    The weight of the empirical part is its posterior probability given x: the ratio of the two marginal
    densities of x at noise sigma, times the prior odds.

    Args:
      images: [N,H,W,C] float in [-1, 1].
      share: prior probability of the empirical part, in [0, 1].
      ridge: as in `gaussian`.

    Raises:
      UserError: share is not a probability.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share = {share}: is a probability; give a number from 0 to 1")
    points = jnp.asarray(_flat(images), jnp.float32)
    mean, vectors, values = (jnp.asarray(a, jnp.float32) for a in _spectrum(images, ridge))
    copy, smooth = empirical(images), gaussian(images, ridge)
    size = points.shape[1]

    def denoise(x: Array, sigma: Array) -> Array:
        rows, variance = _flat(x), sigma[:, None] ** 2
        to_points = -_squared_distances(rows, points) / (2 * variance)
        log_copy = jax.nn.logsumexp(to_points, axis=-1) - jnp.log(len(points)) - size * jnp.log(sigma)
        spread = values + variance
        along = _dot(rows - mean, vectors)
        log_smooth = -0.5 * jnp.sum(along**2 / spread + jnp.log(spread), axis=-1)
        odds = jnp.log(share) - jnp.log1p(-share) + log_copy - log_smooth
        weight = jax.nn.sigmoid(odds)[:, None, None, None]
        return weight * copy(x, sigma) + (1 - weight) * smooth(x, sigma)

    return denoise
