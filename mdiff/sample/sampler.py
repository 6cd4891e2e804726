"""Samplers as a scan over a grid of times; each sees only a Denoiser.

Each sample has its own key, and all noise of sample i comes from it, so a sample does not depend on the
batch it was drawn in.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.errors import UserError
from mdiff.process.gaussian import GaussianProcess
from mdiff.process.times import make_grid
from mdiff.sample.steps import METHODS, Interval, State, Step
from mdiff.types import Array, Denoiser, Key


def start(level: float | Array, keys: Key, shape: tuple[int, ...]) -> Array:
    """Starting noise [B,*shape] of standard deviation `level`; row i depends on key i alone.

    The image is neglected beside the noise: at unit signal scale its share of the variance is 1/level^2.
    """
    return level * jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)


def integrate(
    process: GaussianProcess,
    denoiser: Denoiser,
    step: Step,
    grid: np.ndarray,
    keys: Key,
    shape: tuple[int, ...],
    cond: Array | None = None,
) -> Array:
    """Draw one sample per key.

    Args:
      process: the noise law the denoiser was made for.
      denoiser: `(xt, t, cond) -> Prediction`.
      step: from `METHODS`.
      grid: [steps + 1] falling times, the first that of the starting noise, the last 0.
      keys: [B] one key per sample.
      shape: (H, W, C) of one image.
      cond: [B,E] conditions or None.

    Returns:
      [B,H,W,C] images, not clipped.
    """
    times = jnp.asarray(grid, jnp.float32)
    u = start(process.noise_level(times[0]), keys, shape)
    return descend(denoiser, step, u, times, keys, cond)


def descend(
    denoiser: Denoiser, step: Step, u: Array, times: Array, keys: Key, cond: Array | None = None
) -> Array:
    """Denoise from where an image is; from pure noise this is `integrate`.

    Args:
      denoiser: `(xt, t, cond) -> Prediction`.
      step: from `METHODS`.
      u: [B,H,W,C] noisy images at unit signal scale, at the noise level of times[0].
      times: [steps + 1] falling, the last 0.
      keys: [B] one key per sample, for methods that add noise.
      cond: [B,E] conditions or None.

    Returns:
      [B,H,W,C] images, not clipped.
    """
    before = jnp.concatenate([times[:1], times[:-2]])
    final = len(times) - 2

    def body(state: State, at: tuple[Array, Array, Array, Array]) -> tuple[State, None]:
        return step(denoiser, state, Interval(*at, last=False), keys, cond), None

    intervals = (jnp.arange(final), before[:final], times[:final], times[1 : final + 1])
    state, _ = jax.lax.scan(body, State(u, jnp.zeros_like(u)), intervals)
    at = Interval(jnp.int32(final), before[final], times[final], times[-1], last=True)
    return step(denoiser, state, at, keys, cond).u


def sample(
    process: GaussianProcess,
    cfg: config.Sample,
    denoiser: Denoiser,
    keys: Key,
    shape: tuple[int, ...],
    cond: Array | None = None,
) -> Array:
    """Draw one sample per key by the configured method on the configured grid; arguments as `integrate`.

    With `until` the grid ends at that noise level, and the sample is the denoiser's estimate there (truncated
    sampling, for a denoiser that knows no lower levels).
    """
    step = METHODS[cfg.method](process, cfg)
    return integrate(process, denoiser, step, grid_of(process, cfg), keys, shape, cond)


def grid_of(process: GaussianProcess, cfg: config.Sample) -> np.ndarray:
    """The configured sampling times [steps + 1], falling from that of sigma_max to 0."""
    lowest = max(process.sigma_min, cfg.until or 0.0)
    return make_grid(process, cfg.grid, cfg.steps, lowest, process.sigma_max, process.rho)


def settings(cfg: config.Config) -> config.Sample:
    """How a trained model is sampled: down to the lowest noise level that its training knew, unless said otherwise."""
    loss, until = cfg.loss, cfg.sample.until
    if until is None:
        everywhere = not loss.copies or loss.clean != "never" or loss.consistency > 0
        clean = loss.clean_share > 0 or 0 in loss.cutoff_of.values()
        until = 0.0 if everywhere or clean else loss.levels[0]
    return replace(cfg.sample, until=until)


APPLIES = {
    "churn": ("heun",),
    "churn_min": ("heun",),
    "churn_max": ("heun",),
    "churn_noise": ("heun",),
    "eta": ("ddim",),
}
"""Fields that only some methods use."""


def check(cfg: config.Sample) -> None:
    """Raises UserError when a sampling field is out of range or has no effect on the method chosen."""
    for name, low in (("n", 1), ("batch", 1), ("steps", 2)):
        if getattr(cfg, name) < low:
            raise UserError(f"sample.{name} = {getattr(cfg, name)}: must be {low} or more")
    if cfg.method not in METHODS:
        raise UserError(f"sample.method = {cfg.method!r}: must be one of {', '.join(METHODS)}")
    if cfg.grid not in ("karras", "uniform", "logsnr"):
        raise UserError(f"sample.grid = {cfg.grid!r}: must be karras, uniform or logsnr")
    for name, methods in APPLIES.items():
        if cfg.method not in methods and getattr(cfg, name) != getattr(config.Sample, name):
            raise UserError(
                f"sample.{name} = {getattr(cfg, name)}: has no effect on method {cfg.method}; leave it out or "
                f"set sample.method to {' or '.join(methods)}"
            )
    if not 0 <= cfg.churn < math.inf:
        raise UserError(f"sample.churn = {cfg.churn}: must be 0 (deterministic) or above, and finite")
    if not 0 <= cfg.churn_min < cfg.churn_max:
        raise UserError(
            f"sample.churn_min = {cfg.churn_min}, churn_max = {cfg.churn_max}: need 0 <= churn_min < churn_max"
        )
    if not 0 < cfg.churn_noise < math.inf:
        raise UserError(
            f"sample.churn_noise = {cfg.churn_noise}: must be above 0; usual values are 1 to 1.01"
        )
    if cfg.until is not None and not 0 <= cfg.until < math.inf:
        raise UserError(f"sample.until = {cfg.until}: must be 0 or above, and finite; 0 goes on to sigma_min")
    if not 0 <= cfg.eta <= 1:
        raise UserError(f"sample.eta = {cfg.eta}: must be in [0, 1]")
