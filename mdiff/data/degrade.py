"""The fixed noisy copies that ambient training is allowed to see (arXiv 2502.21278).

Above the noise cutoff training sees `y_i = x_i + sigma * n_i` and never x_i. What the copy can leak is
bounded: for Gaussian data of covariance Sigma, one draw carries 1/2 log det(I + Sigma / sigma^2) nats
about x_i. Draw the noise m times and it carries 1/2 log det(I + m Sigma / sigma^2), which grows without
bound: the mean of the draws is x_i. So each image gets one draw, for good.

The same count forbids augmenting before the noise. flip(x) + n and x + n are two draws in disguise: flip
the first back and its noise is another one. A flip of the finished copy, flip(x + n), carries nothing new.
"""

from __future__ import annotations

import jax

from mdiff import keys
from mdiff.types import Array


def noisy_copy(x: Array, ids: Array, sigma: float | Array, seed: int) -> Array:
    """The one noisy copy of each image: x + sigma * n_i, n_i a function of (seed, id_i) alone.

    The same image has the same copy in every epoch, order, batch size and process. Two images differ.
    Call it on clean, unaugmented images; augment the copy afterwards.

    Args:
      x: [B,H,W,C] clean images in [-1, 1].
      ids: [B] integer ids of the images.
      sigma: standard deviation of the degradation, in EDM's noise level.
      seed: the run's seed.

    Returns:
      [B,H,W,C] in x's type, not clipped: clipping would make the noise non-Gaussian.
    """
    draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))
    return x + sigma * draw(keys.keys(seed, "degradation", ids))
