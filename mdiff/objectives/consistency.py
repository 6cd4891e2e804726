"""The consistency loss: noise levels below the cutoff, learned without clean images.

Along the reverse diffusion the posterior mean is a martingale (Daras et al. 2023, arXiv 2302.09057, theorem 3.1 there):
for sigma' < sigma, and x' at sigma' drawn by running the reverse SDE from x at sigma,

    D(x, sigma) = E[D(x', sigma') | x].

Above the cutoff D is learned from noisy images; asking for this equation carries it below. Its squared error,
||E[D(x', sigma')] - D(x, sigma)||^2, is not the mean of squared errors, which would also punish the spread of
D(x', sigma'). With two independent draws x'_1, x'_2 the product

    (D(x'_1, sigma') - D(x, sigma)) . (D(x'_2, sigma') - D(x, sigma))

has the squared error as its mean; a single value may be negative. The draws are not differentiated through.

Here sigma follows the law of the noise levels, and sigma' the same law below sigma. A state x at or above the image's
cutoff tn comes from its noisy copy, x = y + sqrt(sigma^2 - tn^2) z; one below it from running the reverse SDE from y.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mdiff.objectives.denoise import Denoise
from mdiff.process.gaussian import bcast
from mdiff.process.times import HALF_STEP, Times
from mdiff.types import Array, Key


def reverse(denoise: Denoise, x: Array, sigma: Array, target: Array, steps: int, key: Key) -> Array:
    """Run the reverse SDE at unit signal scale from x [B,H,W,C] at noise levels sigma [B] down to target [B].

    `steps` ancestral steps, equal in ln sigma: each draws from the normal law of the next state given this one and
    D for the clean image (arXiv 2006.11239, eq. 7). Where target >= sigma, x is returned as it is.
    """
    target = jnp.minimum(target, sigma)
    ratio = (target / sigma) ** (1.0 / steps)

    def step(state: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        at, level = state
        below = level * ratio
        now, noise = jax.random.split(jax.random.fold_in(key, number))
        x0 = denoise(at, level, now)
        kept = bcast(ratio**2, x)
        spread = below * jnp.sqrt(jnp.maximum(1.0 - ratio, 0.0) * (1.0 + ratio))
        moved = x0 + kept * (at - x0) + bcast(spread, x) * jax.random.normal(noise, x.shape)
        return (jnp.where(bcast(ratio < 1, x), moved, at), below), None

    return jax.lax.scan(step, (x, sigma), jnp.arange(steps))[0][0]


def levels(key: Key, times: Times, n: int) -> tuple[Array, Array]:
    """Pairs sigma > sigma' [n]: sigma from the law of the noise levels, sigma' from the law below sigma."""
    u = jax.random.uniform(key, (2, n)) + HALF_STEP
    return times.sigma(u[0]), times.sigma(jnp.maximum(u[0] * u[1], HALF_STEP))


def consistency_error(
    denoise: Denoise,
    fixed: Denoise,
    y: Array,
    cutoff: Array,
    sigma: Array,
    target: Array,
    steps: int,
    key: Key,
) -> Array:
    """The two-sample estimate of mean over pixels of (E[D(x', sigma')] - D(x, sigma))^2, per example.

    Args:
      denoise: the x0 estimator, differentiated.
      fixed: the same without gradient, which the states are drawn with.
      y: [B,H,W,C] noisy copies.
      cutoff: [B] their noise levels.
      sigma: [B] levels of x.
      target: [B] levels sigma' below them.
      steps: of each run of the reverse SDE.
      key: of all noise.

    Returns:
      [B]; unbiased, and so negative at times.
    """
    start, first, second, *dropout = jax.random.split(key, 6)
    above = jnp.maximum(sigma, cutoff)  # where the noisy copy is taken to
    added = jnp.sqrt(jnp.maximum(above - cutoff, 0.0) * (above + cutoff))
    x = y + bcast(added, y) * jax.random.normal(start, y.shape)
    # An image of cutoff 0 needs no run below it; 1 keeps the logarithm finite there.
    x = reverse(fixed, x, jnp.where(above > 0, above, 1.0), sigma, steps, first)
    x = jax.lax.stop_gradient(x)
    twice = lambda a: jnp.concatenate([a, a])  # noqa: E731
    ahead = reverse(fixed, twice(x), twice(sigma), twice(target), steps, second)
    ahead = jax.lax.stop_gradient(ahead)
    here = denoise(x, sigma, dropout[0])
    there = denoise(ahead, twice(target), dropout[1])
    one, two = jnp.split(there, 2)
    return jnp.mean((one - here) * (two - here), axis=tuple(range(1, y.ndim)))
