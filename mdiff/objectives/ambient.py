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

The cutoff may differ from image to image (noise levels that are known, a mixture of clean and noisy images, whose
clean ones have cutoff 0) and from stage to stage of training. With `clean: never` levels below an image's cutoff are
not drawn for it: training on noisy images alone (Daras et al. 2024, arXiv 2411.02780), to be sampled down to the cutoff.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model
from mdiff.objectives import denoise as plain
from mdiff.objectives.consistency import consistency_error, levels
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


def mixing(sigma: Array, cutoff: float | Array) -> Array:
    """a = (sigma - tn)(sigma + tn) / sigma^2 in float32, 0 at and below the cutoff; sigma's shape."""
    return jnp.maximum(sigma - cutoff, 0.0) * (sigma + cutoff) / sigma**2


def missing_noise(sigma: Array, cutoff: float | Array) -> Array:
    """sqrt(sigma^2 - tn^2), clamped before the root; 0 at and below the cutoff; sigma's shape."""
    variance = jnp.maximum(sigma - cutoff, 0.0) * (sigma + cutoff)
    # The inner `where` keeps the root's infinite slope at 0 out of gradients in sigma.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def ambient_weight(lam: Array, a: Array, cfg: config.Loss, cutoff: float | Array) -> Array:
    """Weight [B] of the squared residual a D + (1 - a) xt - y, from the level's weight lam [B]."""
    if cfg.weight == "edm":
        return lam
    if cfg.weight == "x0":
        # Where 1/a > max_gain lies the buffer, which must not fall back to clean data. If it is not drawn from, its
        # end is: rounding must not take that away.
        most = cfg.max_gain * (1.001 if cfg.buffer == "redraw" else 1.0)
        inside = a * most >= 1.0
        return jnp.where(inside, lam / jnp.where(inside, a, 1.0) ** 2, 0.0)
    positive = a > 0  # at sigma = tn the residual is exactly 0 too, whatever its weight
    return jnp.where(positive, lam / jnp.where(positive, a**2 + lam * a * cutoff**2, 1.0), 0.0)


def uses_copy(sigma: Array, cutoff: float | Array) -> Array:
    """Is the noisy copy trained on? bool, sigma's shape. An image of cutoff 0 has none."""
    return (sigma >= cutoff) & (jnp.asarray(cutoff) > 0)


def routed_error(
    denoise: Denoise, x: Array, y: Array, sigma: Array, eps: Array, cutoff: float | Array, key: Key
) -> tuple[Array, Array]:
    """Squared residual per example, and the a it was mixed with; one network call serves both branches.

    Args:
      denoise: the x0 estimator.
      x: [B,H,W,C] clean images, used where sigma < cutoff, or the cutoff is 0.
      y: [B,H,W,C] their fixed noisy copies, used elsewhere.
      sigma: [B] noise levels.
      eps: [B,H,W,C] fresh unit noise.
      cutoff: [] or [B] noise level of the copies.
      key: for dropout.

    Returns:
      [B] mean over pixels of ||a D + (1 - a) xt - target||^2, and a [B], 1 where the clean image is used.
    """
    above = uses_copy(sigma, cutoff)
    a = jnp.where(above, mixing(sigma, cutoff), 1.0)
    target = jnp.where(bcast(above, x), y, x)
    added = jnp.where(above, missing_noise(sigma, cutoff), sigma)
    xt = target + bcast(added, x) * eps
    return mean_square(bcast(a, x) * denoise(xt, sigma, key) + bcast(1.0 - a, x) * xt - target), a


def weigh(
    error: Array,
    a: Array,
    lam: Array,
    sigma: Array,
    cfg: config.Loss,
    u: Array | None = None,
    cutoff: Array | None = None,
) -> Array:
    """The ambient loss [B] of the errors and a of `routed_error`.

    Args:
      error: [B] squared residuals.
      a: [B] mixing coefficients.
      lam: [B] the levels' weights.
      sigma: [B] noise levels.
      cfg: weight and buffer.
      u: [B] learned ln of the loss, or None.
      cutoff: [B] noise level of the copies; None is cfg.cutoff.
    """
    tn = jnp.float32(cfg.cutoff) if cutoff is None else cutoff
    weight = jnp.where(uses_copy(sigma, tn), ambient_weight(lam, a, cfg, tn), lam)
    # A draw of weight 0 must not pull u down: nothing would ever push it up again.
    return weight * error if u is None else jnp.where(weight > 0, discount(weight * error, u), 0.0)


def make(model: Model, cfg: config.Config) -> DrawnObjective:
    """The ambient objective; where no image has a cutoff it *is* the plain one, chosen before tracing.

    `batch["y"]` must hold the fixed noisy copies (see `mdiff.data.degrade`), made before any augmentation, and
    `batch["cutoff"]` [B] their noise levels, unless all are `loss.cutoff`. `batch["augment"]` describes x alone, and is
    taken as "none" for examples that show y. `aux` holds each example's sigma [B], whether its copy was used [B], when it
    is weighed in another way its loss under EDM's weight, loss_edm [B], and with the consistency loss its weighted
    two-sample error, consistency [B], without its coefficient.

    Raises:
      UserError: a field of the noise levels or of condition dropout is out of range.
    """
    if not cfg.loss.copies:
        return plain.make(model, cfg)
    check_model(model, cfg)
    times = make_times(cfg.loss, model.process, cfg.process)
    whole_law = replace(times, share=0.0, gain=1.0, below=True)

    def consistency(params: Params, key: Key, batch: Batch, drop: Array | None) -> Array:
        fixed = denoise_with(model, jax.lax.stop_gradient(params), batch, drop)
        # The states at sigma' come in twos, and so do their conditions.
        twice = {name: jnp.concatenate([column, column]) for name, column in batch.items()}
        drops = None if drop is None else jnp.concatenate([drop, drop])
        pairs = denoise_with(model, params, twice, drops)
        fixed_pairs = denoise_with(model, jax.lax.stop_gradient(params), twice, drops)
        own, n = denoise_with(model, params, batch, drop), len(batch["x"])
        key_levels, key_noise = jax.random.split(key)
        sigma, target = levels(key_levels, whole_law, n)
        error = consistency_error(
            lambda x, s, k: (own if len(x) == n else pairs)(x, s, k),
            lambda x, s, k: (fixed if len(x) == n else fixed_pairs)(x, s, k),
            batch["y"],
            cutoffs(batch),
            sigma,
            target,
            cfg.loss.consistency_steps,
            key_noise,
        )
        return level_weight(sigma, cfg.loss, model.sigma_data) * error

    def cutoffs(batch: Batch) -> Array:
        return batch["cutoff"] if "cutoff" in batch else jnp.full(len(batch["x"]), cfg.loss.cutoff)

    def loss(params: Params, draws: Draws, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x, cutoff, (sigma, eps, drop, key) = batch["x"], cutoffs(batch), draws
        above = uses_copy(sigma, cutoff)
        if "augment" in batch:
            batch = {**batch, "augment": jnp.where(above[:, None], 0.0, batch["augment"])}
        denoise = denoise_with(model, params, batch, drop)
        error, a = routed_error(denoise, x, batch["y"], sigma, eps, cutoff, key)
        lam, u = level_weight(sigma, cfg.loss, model.sigma_data), model.log_variance(params, sigma)
        aux = {"sigma": sigma, "above": above}
        if cfg.loss.level_weight != "edm":
            plainly = edm_weight(sigma, model.sigma_data)
            aux["loss_edm"] = weigh(error, a, plainly, sigma, cfg.loss, cutoff=cutoff)
        weighed = weigh(error, a, lam, sigma, cfg.loss, u, cutoff)
        if cfg.loss.consistency:
            noisy = {name: column for name, column in batch.items() if name != "augment"}
            aux["consistency"] = consistency(params, jax.random.fold_in(key, 1), noisy, drop)
            weighed += cfg.loss.consistency * aux["consistency"]
        return weighed, aux

    return DrawnObjective(
        lambda key, batch: draw(key, batch["x"], times, cfg.net.condition_dropout, cutoffs(batch)), loss
    )


def check(cfg: config.Loss, process: config.Process) -> None:
    """Is the loss well defined under this noise range?

    Raises:
      UserError: a field is out of range.
    """
    named = [("loss.cutoff", cfg.cutoff)]
    named += [(f"loss.cutoff_of: image {image}: {level}", level) for image, level in cfg.cutoff_of.items()]
    named += [
        (f"loss.cutoff_stages: step {step}: {level}", level) for step, level in cfg.cutoff_stages.items()
    ]
    for name, level in named:
        if level != 0 and not process.sigma_min < level < process.sigma_max:
            raise UserError(
                f"{name if ':' in name else f'{name} = {level}'}: must be 0 (plain training) or inside the noise range "
                f"({process.sigma_min}, {process.sigma_max}); useful values are 0.4 to 4"
            )
    if cfg.cutoff_stages and (cfg.cutoff or cfg.cutoff_of or cfg.clean_share):
        other = "cutoff" if cfg.cutoff else "cutoff_of" if cfg.cutoff_of else "clean_share"
        raise UserError(
            f"loss.{other} = {getattr(cfg, other)}: the stages of loss.cutoff_stages take its place; leave one of them out"
        )
    if cfg.cutoff_stages and min(cfg.cutoff_stages) != 0:
        raise UserError(
            f"loss.cutoff_stages: the first stage begins at step {min(cfg.cutoff_stages)}; give a cutoff from step 0 on"
        )
    if not 0 <= cfg.clean_share < 1:
        raise UserError(f"loss.clean_share = {cfg.clean_share}: must be in [0, 1); 1 would be loss.cutoff 0")
    if cfg.consistency < 0:
        raise UserError(
            f"loss.consistency = {cfg.consistency}: must be 0 (off) or above; 0.1 to 10 are usual"
        )
    if cfg.consistency and (cfg.clean != "never" or not cfg.ambient):
        raise UserError(
            f"loss.consistency = {cfg.consistency}: clean images teach the levels below the cutoff; set loss.clean to "
            "never and a loss.cutoff, or loss.consistency to 0"
        )
    if cfg.consistency_steps < 1:
        raise UserError(f"loss.consistency_steps = {cfg.consistency_steps}: must be 1 or more")
    for name, default in (("clean_share", 0.0), ("clean", "below"), ("buffer", "drop")):
        if getattr(cfg, name) != default and not cfg.ambient:
            raise UserError(
                f"loss.{name} = {getattr(cfg, name)}: needs a loss.cutoff above 0, or leave it at {default}"
            )
    if cfg.p_std <= 0:
        raise UserError(f"loss.p_std = {cfg.p_std}: must be above 0")
    if cfg.max_gain <= 1:
        raise UserError(f"loss.max_gain = {cfg.max_gain}: must be above 1 (4 keeps 1/a^2 below 16)")
    if not cfg.min_snr > 0:
        raise UserError(f"loss.min_snr = {cfg.min_snr}: must be above 0; 5 is usual")
