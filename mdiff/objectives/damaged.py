"""Training on damaged images with further corruption (Ambient Diffusion, arXiv 2305.19256, section 3).

Of each image only A x0 is there. The network gets A~ xt = A~ x0 + sigma A~ eps, with A~ = B A and a new B at every
step, and A~ itself; its estimate D of the whole image is compared with what there is, A D with A x0 (see
`mdiff.data.damage` for why). A~ x0 = B (A x0), so the image is never needed.

Its error at a pixel that A~ hides is one of guessing, not of denoising, and does not shrink with the noise level. The
weight of a level grows as 1/sigma^2 at low ones, so that guessing at low noise would drown all else. Such a pixel
weighs at most 1/sd^2 instead: EDM's weight where the image is nothing but noise. A positive weight that depends on
(A, A~, sigma) does not move the minimum, since A, given A~, says nothing about x0.
"""

from __future__ import annotations

import jax.numpy as jnp

from mdiff import config
from mdiff.nets.denoiser import Model
from mdiff.objectives import ambient
from mdiff.objectives.denoise import (
    DrawnObjective,
    Draws,
    check_model,
    discount,
    draw,
    edm_weight,
    level_weight,
)
from mdiff.process.gaussian import bcast
from mdiff.process.times import make_times
from mdiff.types import Array, Batch, Params


def squared_error(model: Model, params: Params, draws: Draws, batch: Batch) -> tuple[Array, Array]:
    """Squared error of A D against A x0, in pixels that A~ shows and in those that it hides.

    Args:
      model: with `damage`.
      params: its parameters.
      draws: noise levels, noise, dropped conditions, dropout.
      batch: `x` [B,H,W,C] the damaged images A x0, `seen` [B,H,W,1] their A, `told` [B,H,W,1] their A~, and
        conditions.

    Returns:
      Two [B]; their sum is the mean over channels and the pixels that A shows.
    """
    damage = model.damage
    assert damage is not None
    (sigma, eps, drop, key), seen, told = draws, batch["seen"], batch["told"]
    x = batch["x"] if damage.kind == "blur" else damage.apply(batch["x"], seen)
    t = model.process.time(sigma)
    xt = damage.go_on(x, seen, told) + bcast(sigma, x) * damage.apply(eps, told)
    cond = model.condition(params, batch, drop=drop)
    scaled = bcast(model.process.alpha(t), x) * xt
    guess = model.apply(params, scaled, t, cond, dropout_key=key, seen=told)[0].x0
    square = jnp.square(damage.apply(guess, seen) - x).mean(-1, keepdims=True)
    there = jnp.ones_like(seen) if damage.kind == "blur" else seen
    share = square / jnp.maximum(there.sum((1, 2, 3), keepdims=True), 1.0)
    hidden = damage.hidden(told)
    return jnp.where(hidden, 0.0, share).sum((1, 2, 3)), jnp.where(hidden, share, 0.0).sum((1, 2, 3))


def make(model: Model, cfg: config.Config) -> DrawnObjective:
    """The objective of a config: this one with data.degrade, else `ambient.make`, chosen before tracing.

    Needs `batch["seen"]` and `batch["told"]` from `mdiff.data.stream.finish`. `aux` is that of `denoise.make`.

    Raises:
      UserError: a field of the noise levels or of condition dropout is out of range.
    """
    if cfg.data.degrade == "none":
        return ambient.make(model, cfg)
    check_model(model, cfg)
    times = make_times(cfg.loss, model.process, cfg.process)
    most = 1 / model.sigma_data**2

    def loss(params: Params, draws: Draws, batch: Batch) -> tuple[Array, dict[str, Array]]:
        sigma = draws.sigma
        shown, hidden = squared_error(model, params, draws, batch)

        def weigh(lam: Array) -> Array:
            return lam * shown + jnp.minimum(lam, most) * hidden

        aux = {"sigma": sigma}
        if cfg.loss.level_weight != "edm":
            aux["loss_edm"] = weigh(edm_weight(sigma, model.sigma_data))
        weighted = weigh(level_weight(sigma, cfg.loss, model.sigma_data))
        return discount(weighted, model.log_variance(params, sigma)), aux

    return DrawnObjective(lambda key, batch: draw(key, batch["x"], times, cfg.net.condition_dropout), loss)
