"""The plain denoising loss of EDM (arXiv 2206.00364, eq. 2 and table 1)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.nets.denoiser import Model
from mdiff.process.gaussian import bcast
from mdiff.process.times import lognormal_sigma
from mdiff.types import Array, Batch, Key, Objective, Params

Denoise = Callable[[Array, Array, Key], Array]
"""`(x [B,H,W,C], sigma [B], dropout key) -> x0 estimate [B,H,W,C]`, at unit signal scale."""


def edm_weight(sigma: Array, sigma_data: float) -> Array:
    """lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2, so that lambda c_out^2 = 1; sigma's shape."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def mean_square(x: Array) -> Array:
    """[B,H,W,C] -> [B], mean over pixels and channels."""
    return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


def draw(key: Key, x: Array, cfg: config.Loss) -> tuple[Array, Array, Key]:
    """What one training step draws: noise levels [B], unit noise of x's shape, a key for dropout."""
    key_sigma, key_noise, key_dropout = jax.random.split(key, 3)
    sigma = lognormal_sigma(key_sigma, x.shape[0], cfg.p_mean, cfg.p_std)
    return sigma, jax.random.normal(key_noise, x.shape), key_dropout


def denoise_with(model: Model, params: Params, batch: Batch) -> Denoise:
    """The model's x0 estimate as a function of noise level, with the batch's labels as condition."""
    cond = model.embed(params, batch.get("label"))

    def denoise(x: Array, sigma: Array, dropout_key: Key) -> Array:
        t = model.process.time(sigma)
        return model.apply(params, x * bcast(model.process.alpha(t), x), t, cond, dropout_key=dropout_key)[
            0
        ].x0

    return denoise


def denoising_loss(
    denoise: Denoise, x: Array, sigma: Array, eps: Array, sigma_data: float, key: Key
) -> Array:
    """lambda(sigma) * mean ||D(x + sigma eps, sigma) - x||^2, per example.

    Args:
      denoise: the x0 estimator.
      x: [B,H,W,C] clean images.
      sigma: [B] noise levels.
      eps: [B,H,W,C] unit noise.
      sigma_data: standard deviation of the data.
      key: for dropout.

    Returns:
      [B] losses, averaged over pixels.
    """
    d = denoise(x + bcast(sigma, x) * eps, sigma, key)
    return edm_weight(sigma, sigma_data) * mean_square(d - x)


def make(model: Model, cfg: config.Loss) -> Objective:
    """The EDM objective; `aux` holds each example's sigma [B]."""

    def objective(params: Params, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x = batch["x"]
        sigma, eps, key = draw(key, x, cfg)
        loss = denoising_loss(denoise_with(model, params, batch), x, sigma, eps, model.sigma_data, key)
        return loss, {"sigma": sigma}

    return objective
