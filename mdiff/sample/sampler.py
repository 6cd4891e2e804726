"""Samplers as a scan over a grid of times; each sees only a Denoiser.

The state is kept at unit signal scale, u = xt / alpha, where every Gaussian process follows the same
probability-flow ODE in EDM's sigma (arXiv 2206.00364, eq. 1):

    du/dsigma = (u - D(u; sigma)) / sigma = eps.

Each sample has its own key, and all noise of sample i comes from it, so a sample does not depend on the
batch it was drawn in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.errors import UserError
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.types import Array, Denoiser, Key


class Interval(NamedTuple):
    """One step of the grid: from time t (index `step`) down to time s.

    `last` is known before tracing; then s = 0, where there is no noise left and eps is undefined.
    """

    step: Array
    t: Array
    s: Array
    last: bool


Step = Callable[[Denoiser, Array, Interval, Key, "Array | None"], Array]
"""`(denoiser, u [B,H,W,C], interval, keys [B], cond) -> u at the interval's end`."""


def _noise(keys: Key, step: Array, shape: tuple[int, ...]) -> Array:
    """Unit noise [B,...] of sampling step `step`; row i depends on key i and the step alone."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step + 1), shape[1:]))(keys)


def _eps(process: GaussianProcess, denoiser: Denoiser, u: Array, sigma: Array, cond: Array | None) -> Array:
    """du/dsigma at (u, sigma); sigma is a scalar above 0."""
    t = jnp.broadcast_to(process.time(sigma), u.shape[:1])
    x0 = denoiser(u * bcast(process.alpha(t), u), t, cond).x0
    return (u - x0) / sigma


def heun(process: GaussianProcess, cfg: config.Sample) -> Step:
    """Heun's second-order step with churn (arXiv 2206.00364, algorithm 2)."""
    gamma_max = min(cfg.churn / cfg.steps, 2.0**0.5 - 1.0)

    def step(denoiser: Denoiser, u: Array, at: Interval, keys: Key, cond: Array | None) -> Array:
        sigma, target = process.noise_level(at.t), process.noise_level(at.s)
        if cfg.churn > 0:
            churned = (sigma >= cfg.churn_min) & (sigma <= cfg.churn_max)
            raised = jnp.where(churned, sigma * (1 + gamma_max), sigma)
            added = jnp.sqrt(jnp.maximum(raised - sigma, 0.0) * (raised + sigma))
            u = u + added * cfg.churn_noise * _noise(keys, at.step, u.shape)
            sigma = raised
        if at.last:
            return u - sigma * _eps(process, denoiser, u, sigma, cond)  # Euler; it lands on D

        # Predictor and corrector as a scan of two, so that the network is compiled once.
        def slope(carry: tuple[Array, Array], level: Array) -> tuple[tuple[Array, Array], None]:
            x, total = carry
            d = _eps(process, denoiser, x, level, cond)
            return (u + (target - sigma) * d, total + d), None

        (_, total), _ = jax.lax.scan(slope, (u, jnp.zeros_like(u)), jnp.stack([sigma, target]))
        return u + (target - sigma) * 0.5 * total

    return step


def ddim(process: GaussianProcess, cfg: config.Sample) -> Step:
    """DDIM (arXiv 2010.02502, eq. 12 and 16), eta = 0 deterministic, eta = 1 ancestral."""

    def step(denoiser: Denoiser, u: Array, at: Interval, keys: Key, cond: Array | None) -> Array:
        sigma, target = process.noise_level(at.t), process.noise_level(at.s)
        eps = _eps(process, denoiser, u, sigma, cond)
        x0 = u - sigma * eps
        # Variance of u_s given u_t and x0 is s^2 (t^2 - s^2) / t^2 in units of sigma.
        fresh = cfg.eta * target * jnp.sqrt(jnp.maximum(sigma - target, 0.0) * (sigma + target)) / sigma
        kept = jnp.sqrt(jnp.maximum(target**2 - fresh**2, 0.0))
        u = x0 + kept * eps
        return u + fresh * _noise(keys, at.step, u.shape) if cfg.eta > 0 else u

    return step


METHODS: dict[str, Callable[[GaussianProcess, config.Sample], Step]] = {"heun": heun, "ddim": ddim}


def start(process: GaussianProcess, keys: Key, shape: tuple[int, ...]) -> Array:
    """Starting noise [B,*shape] at t = 1, unit signal scale; row i depends on key i alone."""
    sigma = process.noise_level(jnp.float32(1.0))
    return sigma * jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)


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
      grid: [steps + 1] falling times, first 1, last 0.
      keys: [B] one key per sample.
      shape: (H, W, C) of one image.
      cond: [B,E] conditions or None.

    Returns:
      [B,H,W,C] images, not clipped.
    """
    times = jnp.asarray(grid, jnp.float32)
    final = len(grid) - 2

    def body(u: Array, at: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return step(denoiser, u, Interval(*at, last=False), keys, cond), None

    before = (jnp.arange(final), times[:final], times[1 : final + 1])
    u, _ = jax.lax.scan(body, start(process, keys, shape), before)
    return step(denoiser, u, Interval(jnp.int32(final), times[final], times[-1], last=True), keys, cond)


def check(cfg: config.Sample) -> None:
    """Raises UserError when a sampling field is out of range."""
    for name, low in (("n", 1), ("batch", 1), ("steps", 2)):
        if getattr(cfg, name) < low:
            raise UserError(f"sample.{name} = {getattr(cfg, name)}: must be {low} or more")
    if cfg.method not in METHODS:
        raise UserError(f"sample.method = {cfg.method!r}: must be one of {', '.join(METHODS)}")
    if cfg.churn < 0:
        raise UserError(f"sample.churn = {cfg.churn}: must be 0 (deterministic) or above")
    if not 0 <= cfg.eta <= 1:
        raise UserError(f"sample.eta = {cfg.eta}: must be in [0, 1]")
