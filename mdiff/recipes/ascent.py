"""The control without a diffusion model: images that a classifier alone makes."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.errors import UserError
from mdiff.keys import keys
from mdiff.process.gaussian import bcast
from mdiff.recipes.guided import check_labels
from mdiff.sample.guidance import Guide
from mdiff.types import Array, Key, Params

CERTAIN = 1e-6
"""Slope per pixel below which steps shrink: log p is then 0 but for rounding, and so is its gradient's direction."""


def ascent(
    guide: Guide,
    guide_params: Params,
    index: Any,
    label: Any,
    *,
    seed: int = 0,
    steps: int = 200,
    level: float = 0.3,
    rate: float = 0.03,
    start: Literal["noise", "grey"] = "noise",
    sigma_data: float = 0.5,
) -> Array:
    """Images by gradient ascent on log p(label | x) alone, without a diffusion model: what the classifier knows by itself.

    Each step adds fresh noise of one low level, as the classifier has seen it, and moves the image by `rate` (root mean
    square over pixels) along the gradient, within [-1, 1]. The rate falls linearly to 0.

    Args:
      guide: the classifier.
      guide_params: its parameters.
      index: int [B] sample numbers; image i is a function of (seed, i, its label).
      label: int [B] classes.
      seed: of start and noise.
      steps: of ascent.
      level: noise level (EDM's sigma) it is asked at.
      rate: length of the first step.
      start: "noise" of standard deviation `sigma_data`, or mid-"grey".
      sigma_data: the data's standard deviation.

    Returns:
      [B,H,W,C] in [-1, 1].

    Raises:
      UserError: a label is none of the guide's classes, or a number is out of range.
    """
    label = jnp.asarray(check_labels(label, guide.classes), jnp.int32)
    if steps < 1 or not 0 < level < math.inf or not 0 < rate < math.inf:
        raise UserError(
            f"ascent: steps = {steps}, level = {level}, rate = {rate}: need 1 step or more, and level and rate above 0"
        )
    every = keys(seed, "ascent", jnp.asarray(index, jnp.int32))
    x = jnp.zeros((len(label), *guide.shape))
    if start == "noise":
        x = jnp.clip(sigma_data * _noise(every, 0, x), -1.0, 1.0)
    step = _ascend(guide)
    for number in range(steps):
        length = np.float32(rate * (1 - number / steps))
        x = step(guide_params, x, label, every, np.int32(number + 1), np.float32(level), length)
    return x


def _noise(every: Key, step: Any, like: Array) -> Array:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step), like.shape[1:]))(every)


@functools.lru_cache(maxsize=8)
def _ascend(guide: Guide) -> Any:
    @jax.jit
    def step(
        params: Params, x: Array, label: Array, every: Key, number: Array, level: Array, length: Array
    ) -> Array:
        t = jnp.broadcast_to(guide.process.time(level), label.shape)
        alpha = bcast(guide.process.alpha(t), x)
        noise = level * _noise(every, number, x)

        def total(u: Array) -> Array:
            return guide.log_prob(params, alpha * (u + noise), t, label).sum()

        slope = jax.grad(total)(x)
        size = jnp.sqrt(jnp.mean(jnp.square(slope), axis=(1, 2, 3), keepdims=True))
        return jnp.clip(x + length * slope / jnp.maximum(size, CERTAIN), -1.0, 1.0)

    return step
