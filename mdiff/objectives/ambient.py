"""Ambient training against memorization (Shah et al. 2025, arXiv 2502.21278, algorithm 1).

Every training image x has one fixed noisy copy y = x + tn n, made once. A noise level sigma below the
cutoff tn trains on x as usual. At or above it only y is used: the missing noise is added,

    xt = y + sqrt(sigma^2 - tn^2) z,

and, by Tweedie's formula applied twice, E[y | xt] = a E[x0 | xt] + (1 - a) xt with
a = (sigma^2 - tn^2) / sigma^2. So the network's x0 estimate D is turned into one of y and regressed on it:

    loss = weight * || a D(xt, sigma) + (1 - a) xt - y ||^2.

The residual equals a (D - T) with T = y - (1 - a)/a (xt - y), over redraws of n an unbiased but noisy stand-in
for x0 of variance tn^2 / a per pixel (over the one draw of each of finitely many images, the minimum knows their
noisy copies: D = (E_i[y_i | xt] - (1 - a) xt) / a); T diverges at the cutoff, so it is never built. The three weights, as
multiples of the level's weight lambda on D - T: `edm` a^2 (the memorization paper), `x0` 1 (with a buffer,
since 1/a^2 explodes at the cutoff), `inverse_variance` 1 / (1 + lambda tn^2 / a), which weighs T's own noise in.

All of this runs at unit signal scale, where every process adds noise of standard deviation sigma; the
network is called on alpha xt. So the same lines are exact under VP and flow matching.
"""

from __future__ import annotations

import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model
from mdiff.objectives import denoise as plain
from mdiff.objectives.denoise import (
    Denoise,
    DrawnObjective,
    Draws,
    check_model,
    denoise_with,
    discount,
    draw,
    edm_weight,
    level_weight,
    mean_square,
)
from mdiff.process.gaussian import bcast
from mdiff.process.times import make_times
from mdiff.types import Array, Batch, Key, Params


def mixing(sigma: Array, cutoff: float) -> Array:
    """a = (sigma - tn)(sigma + tn) / sigma^2 in float32, 0 at and below the cutoff; sigma's shape."""
    return jnp.maximum(sigma - cutoff, 0.0) * (sigma + cutoff) / sigma**2


def missing_noise(sigma: Array, cutoff: float) -> Array:
    """sqrt(sigma^2 - tn^2), clamped before the root; 0 at and below the cutoff; sigma's shape."""
    variance = jnp.maximum(sigma - cutoff, 0.0) * (sigma + cutoff)
    # The inner `where` keeps the root's infinite slope at 0 out of gradients in sigma.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def ambient_weight(lam: Array, a: Array, cfg: config.Loss) -> Array:
    """Weight [B] of the squared residual a D + (1 - a) xt - y, from the level's weight lam [B]."""
    if cfg.weight == "edm":
        return lam
    if cfg.weight == "x0":
        inside = a * cfg.max_gain >= 1.0  # below: the buffer, which must not fall back to clean data
        return jnp.where(inside, lam / jnp.where(inside, a, 1.0) ** 2, 0.0)
    positive = a > 0  # at sigma = tn the residual is exactly 0 too, whatever its weight
    return jnp.where(positive, lam / jnp.where(positive, a**2 + lam * a * cfg.cutoff**2, 1.0), 0.0)


def routed_error(
    denoise: Denoise, x: Array, y: Array, sigma: Array, eps: Array, cutoff: float, key: Key
) -> tuple[Array, Array]:
    """Squared residual per example, and the a it was mixed with; one network call serves both branches.

    Args:
      denoise: the x0 estimator.
      x: [B,H,W,C] clean images, used where sigma < cutoff only.
      y: [B,H,W,C] their fixed noisy copies, used where sigma >= cutoff only.
      sigma: [B] noise levels.
      eps: [B,H,W,C] fresh unit noise.
      cutoff: noise level of the copies.
      key: for dropout.

    Returns:
      [B] mean over pixels of ||a D + (1 - a) xt - target||^2, and a [B], 1 below the cutoff.
    """
    above = sigma >= cutoff
    a = jnp.where(above, mixing(sigma, cutoff), 1.0)
    target = jnp.where(bcast(above, x), y, x)
    added = jnp.where(above, missing_noise(sigma, cutoff), sigma)
    xt = target + bcast(added, x) * eps
    return mean_square(bcast(a, x) * denoise(xt, sigma, key) + bcast(1.0 - a, x) * xt - target), a


def weigh(
    error: Array, a: Array, lam: Array, sigma: Array, cfg: config.Loss, u: Array | None = None
) -> Array:
    """The ambient loss [B] of the errors and a of `routed_error`.

    Args:
      error: [B] squared residuals.
      a: [B] mixing coefficients.
      lam: [B] the levels' weights.
      sigma: [B] noise levels.
      cfg: cutoff, weight and buffer.
      u: [B] learned ln of the loss, or None.
    """
    weight = jnp.where(sigma >= cfg.cutoff, ambient_weight(lam, a, cfg), lam)
    # A draw of weight 0 must not pull u down: nothing would ever push it up again.
    return weight * error if u is None else jnp.where(weight > 0, discount(weight * error, u), 0.0)


def make(model: Model, cfg: config.Config) -> DrawnObjective:
    """The ambient objective; with cutoff 0 it *is* the plain one, chosen before tracing.

    `batch["y"]` must hold the fixed noisy copies (see `mdiff.data.degrade`), made before any
    augmentation. `batch["augment"]` describes x alone, and is taken as "none" for examples that show y.
    `aux` holds each example's sigma [B], whether it was above the cutoff [B] and, when it is weighed in
    another way, its loss under EDM's weight, loss_edm [B].

    Raises:
      UserError: a field of the noise levels or of condition dropout is out of range.
    """
    if cfg.loss.cutoff == 0:
        return plain.make(model, cfg)
    check_model(model, cfg)
    times = make_times(cfg.loss, model.process, cfg.process)

    def loss(params: Params, draws: Draws, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x, (sigma, eps, drop, key) = batch["x"], draws
        above = sigma >= cfg.loss.cutoff
        if "augment" in batch:
            batch = {**batch, "augment": jnp.where(above[:, None], 0.0, batch["augment"])}
        denoise = denoise_with(model, params, batch, drop)
        error, a = routed_error(denoise, x, batch["y"], sigma, eps, cfg.loss.cutoff, key)
        lam, u = level_weight(sigma, cfg.loss, model.sigma_data), model.log_variance(params, sigma)
        aux = {"sigma": sigma, "above": above}
        if cfg.loss.level_weight != "edm":
            aux["loss_edm"] = weigh(error, a, edm_weight(sigma, model.sigma_data), sigma, cfg.loss)
        return weigh(error, a, lam, sigma, cfg.loss, u), aux

    return DrawnObjective(lambda key, x: draw(key, x, times, cfg.net.condition_dropout), loss)


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
    if not cfg.min_snr > 0:
        raise UserError(f"loss.min_snr = {cfg.min_snr}: must be above 0; 5 is usual")
