"""Ambient training against memorization (Shah et al. 2025, arXiv 2502.21278, algorithm 1).

Every training image x has one fixed noisy copy y = x + tn n, made once. A noise level sigma below the
cutoff tn trains on x as usual. At or above it only y is used: the missing noise is added,

    xt = y + sqrt(sigma^2 - tn^2) z,

and, by Tweedie's formula applied twice, E[y | xt] = a E[x0 | xt] + (1 - a) xt with
a = (sigma^2 - tn^2) / sigma^2. So the network's x0 estimate D is turned into one of y and regressed on it:

    loss = weight * || a D(xt, sigma) + (1 - a) xt - y ||^2.

The residual equals a (D - T) with T = y - (1 - a)/a (xt - y), an unbiased but noisy stand-in for x0 of
variance tn^2 / a per pixel; T diverges at the cutoff, so it is never built. The three weights, as
multiples of EDM's lambda on D - T: `edm` a^2 (the memorization paper), `x0` 1 (with a buffer, since
1/a^2 explodes at the cutoff), `inverse_variance` 1 / (1 + lambda tn^2 / a), which weighs T's own noise in.
"""

from __future__ import annotations

import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model
from mdiff.objectives import denoise as plain
from mdiff.objectives.denoise import Denoise, denoise_with, draw, edm_weight, mean_square
from mdiff.process.gaussian import bcast
from mdiff.types import Array, Batch, Key, Objective, Params


def mixing(sigma: Array, cutoff: float) -> Array:
    """a = (sigma - tn)(sigma + tn) / sigma^2 in float32, 0 at and below the cutoff; sigma's shape."""
    return jnp.maximum(sigma - cutoff, 0.0) * (sigma + cutoff) / sigma**2


def missing_noise(sigma: Array, cutoff: float) -> Array:
    """sqrt(sigma^2 - tn^2), clamped before the root; 0 at and below the cutoff; sigma's shape."""
    variance = jnp.maximum(sigma - cutoff, 0.0) * (sigma + cutoff)
    # The inner `where` keeps the root's infinite slope at 0 out of gradients in sigma.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def ambient_weight(sigma: Array, a: Array, cfg: config.Loss, sigma_data: float) -> Array:
    """Weight of the squared residual a D + (1 - a) xt - y; shapes as sigma."""
    lam = edm_weight(sigma, sigma_data)
    if cfg.weight == "edm":
        return lam
    if cfg.weight == "x0":
        inside = a * cfg.max_gain >= 1.0  # below: the buffer, which must not fall back to clean data
        return jnp.where(inside, lam / jnp.where(inside, a, 1.0) ** 2, 0.0)
    positive = a > 0  # at sigma = tn the residual is exactly 0 too, whatever its weight
    return jnp.where(positive, lam / jnp.where(positive, a**2 + lam * a * cfg.cutoff**2, 1.0), 0.0)


def ambient_loss(
    denoise: Denoise,
    x: Array,
    y: Array,
    sigma: Array,
    eps: Array,
    cfg: config.Loss,
    sigma_data: float,
    key: Key,
) -> Array:
    """Ambient loss per example; one network call serves both branches.

    Args:
      denoise: the x0 estimator.
      x: [B,H,W,C] clean images, used where sigma < cutoff only.
      y: [B,H,W,C] their fixed noisy copies, used where sigma >= cutoff only.
      sigma: [B] noise levels.
      eps: [B,H,W,C] fresh unit noise.
      cfg: cutoff, weight and buffer.
      sigma_data: standard deviation of the data.
      key: for dropout.

    Returns:
      [B] losses, averaged over pixels.
    """
    above = sigma >= cfg.cutoff
    a = jnp.where(above, mixing(sigma, cfg.cutoff), 1.0)
    target = jnp.where(bcast(above, x), y, x)
    added = jnp.where(above, missing_noise(sigma, cfg.cutoff), sigma)
    xt = target + bcast(added, x) * eps
    residual = bcast(a, x) * denoise(xt, sigma, key) + bcast(1.0 - a, x) * xt - target
    weight = jnp.where(above, ambient_weight(sigma, a, cfg, sigma_data), edm_weight(sigma, sigma_data))
    return weight * mean_square(residual)


def make(model: Model, cfg: config.Loss) -> Objective:
    """The ambient objective; with cutoff 0 it *is* the plain one, chosen before tracing.

    `batch["y"]` must hold the fixed noisy copies (see `mdiff.data.degrade`), made before any
    augmentation. `aux` holds each example's sigma [B] and whether it was above the cutoff [B].
    """
    if cfg.cutoff == 0:
        return plain.make(model, cfg)

    def objective(params: Params, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x = batch["x"]
        sigma, eps, key = draw(key, x, cfg)
        denoise = denoise_with(model, params, batch)
        loss = ambient_loss(denoise, x, batch["y"], sigma, eps, cfg, model.sigma_data, key)
        return loss, {"sigma": sigma, "above": sigma >= cfg.cutoff}

    return objective


def check(cfg: config.Loss, process: config.Process) -> None:
    """Is the loss well defined under this noise range?

    Raises:
      UserError: a field is out of range.
    """
    if cfg.cutoff != 0 and not process.sigma_min < cfg.cutoff < process.sigma_max:
        raise UserError(
            f"loss.cutoff = {cfg.cutoff}: must be 0 (plain training) or inside the noise range "
            f"({process.sigma_min}, {process.sigma_max}); useful values are 0.4 to 4"
        )
    if cfg.p_std <= 0:
        raise UserError(f"loss.p_std = {cfg.p_std}: must be above 0")
    if cfg.max_gain <= 1:
        raise UserError(f"loss.max_gain = {cfg.max_gain}: must be above 1 (4 keeps 1/a^2 below 16)")
