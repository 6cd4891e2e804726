"""The plain denoising loss, weight(sigma) ||D(x0 + sigma eps) - x0||^2 at unit signal scale.

EDM (arXiv 2206.00364, eq. 2 and table 1) weighs noise level sigma by lambda; the other weights are errors
of other quantities, rewritten as errors of x0. With d = D - x0 and SNR = 1/sigma^2:

    edm       (sigma^2 + sd^2) / (sigma sd)^2: the error of EDM's network output
    x0        1
    eps       1/sigma^2, since eps^ - eps = -d / sigma
    v         1 + 1/sigma^2, since v^ - v = -d / s for the variance-preserving v, s^2 = sigma^2 / (1 + sigma^2)
    velocity  (1 + 1/sigma)^2, since (eps - x0)^ - (eps - x0) = -(1 + 1/sigma) d
    min_snr   min(SNR, gamma) (arXiv 2303.09556, section 3.4)
    learned   lambda / exp(u), plus u: the network's own ln of the loss at sigma (arXiv 2312.02696, app. B)

They hold in every process, since x0 and sigma mean the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model
from mdiff.process.gaussian import bcast
from mdiff.process.times import Times, make_times
from mdiff.types import Array, Batch, Key, Params

Denoise = Callable[[Array, Array, Key], Array]
"""`(x [B,H,W,C], sigma [B], dropout key) -> x0 estimate [B,H,W,C]`, at unit signal scale."""


def edm_weight(sigma: Array, sigma_data: float) -> Array:
    """lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2, so that lambda c_out^2 = 1; sigma's shape."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def level_weight(sigma: Array, cfg: config.Loss, sigma_data: float) -> Array:
    """The configured weight of ||D - x0||^2 at noise level sigma; sigma's shape.

    For `learned` it is EDM's, which `discount` then divides by exp(u).
    """
    if cfg.level_weight in ("edm", "learned"):
        return edm_weight(sigma, sigma_data)
    if cfg.level_weight == "x0":
        return jnp.ones_like(sigma)
    if cfg.level_weight == "eps":
        return 1 / sigma**2
    if cfg.level_weight == "v":
        return 1 + 1 / sigma**2
    if cfg.level_weight == "velocity":
        return (1 + 1 / sigma) ** 2
    return jnp.minimum(1 / sigma**2, cfg.min_snr)


def discount(loss: Array, u: Array | None) -> Array:
    """loss / exp(u) + u [B], least at u = ln E[loss]; `loss` itself where nothing is learned (None)."""
    return loss if u is None else loss * jnp.exp(-u) + u


def mean_square(x: Array) -> Array:
    """[B,H,W,C] -> [B], mean over pixels and channels."""
    return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


class Draws(NamedTuple):
    """What one training step draws.

    Attributes:
      sigma: [B] noise levels.
      eps: [B,H,W,C] unit noise.
      drop: [B] bool, whose condition is dropped; None if none is.
      key: for dropout inside the network.
    """

    sigma: Array
    eps: Array
    drop: Array | None
    key: Key


@dataclass(frozen=True)
class DrawnObjective:
    """An objective in two halves, so that a batch can be drawn for as a whole and worked through in parts.

    Attributes:
      draw: `(key, batch) -> Draws`.
      loss: `(params, draws, batch) -> (loss [B], aux)`.
    """

    draw: Callable[[Key, Batch], Draws]
    loss: Callable[[Params, Draws, Batch], tuple[Array, dict[str, Array]]]

    def __call__(self, params: Params, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """See `mdiff.types.Objective`."""
        return self.loss(params, self.draw(key, batch), batch)


def draw(
    key: Key, x: Array, times: Times, condition_dropout: float = 0.0, cutoff: Array | None = None
) -> Draws:
    """The draws for a batch x [B,H,W,C], whose cutoffs [B], if any, decide what levels are drawn."""
    key_sigma, key_noise, key_dropout, key_drop = jax.random.split(key, 4)
    n = x.shape[0]
    drop = jax.random.bernoulli(key_drop, condition_dropout, (n,)) if condition_dropout else None
    return Draws(times.draw(key_sigma, n, cutoff), jax.random.normal(key_noise, x.shape), drop, key_dropout)


def denoise_with(model: Model, params: Params, batch: Batch, drop: Array | None = None) -> Denoise:
    """The model's x0 estimate as a function of noise level, under the batch's conditions."""
    cond = model.condition(params, batch, drop=drop)

    def denoise(x: Array, sigma: Array, dropout_key: Key) -> Array:
        t = model.process.time(sigma)
        xt = x * bcast(model.process.alpha(t), x)
        return model.apply(params, xt, t, cond, dropout_key=dropout_key)[0].x0

    return denoise


def squared_error(denoise: Denoise, x: Array, sigma: Array, eps: Array, key: Key) -> Array:
    """mean ||D(x + sigma eps, sigma) - x||^2 per example.

    Args:
      denoise: the x0 estimator.
      x: [B,H,W,C] clean images.
      sigma: [B] noise levels.
      eps: [B,H,W,C] unit noise.
      key: for dropout.

    Returns:
      [B], averaged over pixels.
    """
    return mean_square(denoise(x + bcast(sigma, x) * eps, sigma, key) - x)


def check_model(model: Model, cfg: config.Config) -> None:
    """Raises UserError when the model cannot be trained as the config says."""
    net = cfg.net
    if not 0 <= net.condition_dropout < 1:
        raise UserError(f"net.condition_dropout = {net.condition_dropout}: must be in [0, 1); 0.1 is usual")
    if net.condition_dropout and not (net.classes or net.vector or net.text):
        raise UserError(
            f"net.condition_dropout = {net.condition_dropout}: the network has no condition; set net.classes, "
            "net.vector or net.text, or set it to 0"
        )
    if (cfg.loss.level_weight == "learned") != (model.uncertainty is not None):
        has = "no" if model.uncertainty is None else "a"
        raise UserError(
            f"loss.level_weight = {cfg.loss.level_weight!r}: the model has {has} learned weight; make both from "
            "one config"
        )


def make(model: Model, cfg: config.Config) -> DrawnObjective:
    """The denoising objective of a config.

    `aux` holds each example's sigma [B] and, when it is weighed in another way, its loss under EDM's weight,
    loss_edm [B], which compares runs.

    Raises:
      UserError: a field of the noise levels or of condition dropout is out of range.
    """
    check_model(model, cfg)
    times = make_times(cfg.loss, model.process, cfg.process)

    def loss(params: Params, draws: Draws, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x, (sigma, eps, drop, key) = batch["x"], draws
        error = squared_error(denoise_with(model, params, batch, drop), x, sigma, eps, key)
        weighted = level_weight(sigma, cfg.loss, model.sigma_data) * error
        aux = {"sigma": sigma}
        if cfg.loss.level_weight != "edm":
            aux["loss_edm"] = edm_weight(sigma, model.sigma_data) * error
        return discount(weighted, model.log_variance(params, sigma)), aux

    return DrawnObjective(
        lambda key, batch: draw(key, batch["x"], times, cfg.net.condition_dropout, batch.get("cutoff")), loss
    )
