"""Denoisers known exactly, for ground truth without training.

The *empirical* denoiser is the posterior mean under the uniform law on the training images: it memorizes
perfectly. The *Gaussian* one is that under a fitted normal law: it memorizes nothing. Under the law
"empirical with probability `share`, else Gaussian" it is their posterior-weighted mixture, whose samples are
copies at the rate `share`: a memorizer with a known knob.

The *ambient* one minimises the ambient loss over all functions: above the cutoff it knows the noisy copies exactly, and
below it the images. Its samples are copies of training images too, whatever the cutoff.

All four act on images at unit signal scale, x = x0 + sigma n, and are `(x, sigma) -> x0` functions;
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
        squared = _squared_distances(_flat(x), points)
        # Counted from the nearest, whose logit is then 0 exactly. Else a compiler that works a logit out twice, in two
        # ways, is off by more than 1 where logits are 1e7 and more, at low noise: softmax would be wrong, or NaN.
        logits = -(squared - squared.min(axis=-1, keepdims=True)) / (2 * sigma[:, None] ** 2)
        return _dot(jax.nn.softmax(logits), points).reshape(x.shape)

    return denoise


def ambient(images: np.ndarray, noisy: np.ndarray, cutoff: float) -> SigmaFn:
    """What minimises the ambient loss for fixed noisy copies y_i = x_i + tn n_i (arXiv 2502.21278, lemma 4.1).

    Below the cutoff it is `empirical(images)`. Above, with u^2 = sigma^2 - tn^2, a = u^2 / sigma^2 and
    w_i = softmax_i(-||x - y_i||^2 / (2 u^2)), the loss is least where a D + (1 - a) x = sum_i w_i y_i, so

        D(x, sigma) = (sum_i w_i y_i - (1 - a) x) / a = x + (sum_i w_i y_i - x) / a.

    Then dx/dsigma = (x - D) / sigma is dx/du = (x - sum_i w_i y_i) / u: the ordinary flow of the noisy copies in u, which ends
    on one of them at the cutoff. At the cutoff itself a = 0 and every D is a minimum; it is that of the images there, while
    just above it D goes to infinity as 1/u.

    Args:
      images: [N,H,W,C] float in [-1, 1].
      noisy: [N,H,W,C] their copies at unit signal scale.
      cutoff: tn, above 0.

    Raises:
      UserError: the cutoff is not above 0, or there are not as many copies as images.
    """
    if not cutoff > 0:
        raise UserError(f"cutoff = {cutoff}: must be above 0; without noisy copies use empirical(images)")
    if np.shape(images) != np.shape(noisy):
        raise UserError(
            f"noisy: shape {np.shape(noisy)} for images of {np.shape(images)}; give one copy of each image"
        )
    below, copies = empirical(images), empirical(noisy)

    def denoise(x: Array, sigma: Array) -> Array:
        variance = jnp.maximum(sigma - cutoff, 0.0) * (sigma + cutoff)
        above = variance > 0
        # Before the root and the quotient, so that what is not chosen is finite, and its gradient too.
        variance = jnp.where(above, variance, 1.0)
        a = (variance / sigma**2)[:, None, None, None]
        known = x + (copies(x, jnp.sqrt(variance)) - x) / a
        return jnp.where(above[:, None, None, None], known, below(x, sigma))

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
