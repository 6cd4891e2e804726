"""The fixed noisy copies that ambient training is allowed to see (arXiv 2502.21278).

Above the noise cutoff training sees `y_i = x_i + sigma * n_i` and never x_i. What the copy can leak is
bounded: for Gaussian data of covariance Sigma, one draw carries 1/2 log det(I + Sigma / sigma^2) nats
about x_i. Draw the noise m times and it carries 1/2 log det(I + m Sigma / sigma^2), which grows without
bound: the mean of the draws is x_i. So each image gets one draw, for good, and the noise belongs to the
image's pixels, not to its number: the same picture under two ids has one copy, and its mirror image has the
mirrored copy.

The same count forbids augmenting before the noise. flip(x) + n and x + n are two draws in disguise: flip
the first back and its noise is another one. A flip of the finished copy, flip(x + n), carries nothing new.

It also decides how copies at several noise levels hang together. x + s n and x + t n with the same n are two
equations for two unknowns and give x away. So the noise is built up in steps of its own, a random walk in the
variance: y_t = y_s + sqrt(t^2 - s^2) n'. Then all of them together carry what the least noisy one does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import keys
from mdiff.types import Array


def noise_keys(x: np.ndarray) -> np.ndarray:
    """Whose noise each image gets, from its pixels: uint32 [B,3].

    Two words of the hash of the image or of its mirror image, whichever is smaller, and 1 where it was the mirror's.

    Args:
      x: [B,H,W,C] uint8.
    """
    found = np.zeros((len(x), 3), np.uint32)
    for place, image in enumerate(x):
        own, other = (_words(each) for each in (image, image[:, ::-1]))
        found[place] = (*min(own, other), other < own)
    return found


def _words(image: np.ndarray) -> tuple[int, int]:
    digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _each(scale: float | Array, x: Array) -> Array:
    """A scale per image, shaped to multiply x."""
    return jnp.reshape(scale, (-1,) + (1,) * (x.ndim - 1))


def noisy_copy(
    x: Array, noise: Array, sigma: float | Array, seed: int | Array, ladder: Sequence[float] = ()
) -> Array:
    """The one noisy copy of each image: x + sigma * n_i, n_i a function of (seed, pixels of image i) alone.

    The same image has the same copy in every epoch, order, batch size and process. Two images differ.
    Call it on clean, unaugmented images; augment the copy afterwards.

    Args:
      x: [B,H,W,C] clean images in [-1, 1].
      noise: uint32 [B,3], from `noise_keys`.
      sigma: [] or [B] standard deviation of the degradation, in EDM's noise level; 0 returns the image.
      seed: the run's seed; may be traced.
      ladder: rising levels above 0, if copies at several of them are ever used; `sigma` is then one of these or 0.

    Returns:
      [B,H,W,C] in x's type, not clipped: clipping would make the noise non-Gaussian.
    """
    base = keys.key(seed, "degradation")

    def draw(words: Array, step: int) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(base, words[0]), words[1])
        n = jax.random.normal(jax.random.fold_in(key, step), x.shape[1:], x.dtype)
        return jnp.where(words[2] > 0, n[:, ::-1], n)

    if not ladder:
        return x + _each(sigma, x) * jax.vmap(lambda words: draw(words, 0))(noise)
    y, below = x, 0.0
    for step, level in enumerate(ladder):
        scale = jnp.where(jnp.asarray(sigma) >= np.float32(level), math.sqrt(level**2 - below**2), 0.0)
        y = y + _each(scale, x) * jax.vmap(lambda words, step=step: draw(words, step))(noise)
        below = level
    return y
