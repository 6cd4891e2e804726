"""The Gaussian process xt = alpha(t) x0 + sigma(t) eps, and what follows from it.

Two facts carry everything. The marginal above links a prediction of x0 to one of eps:

    eps = (xt - alpha x0) / sigma,    x0 = (xt - sigma eps) / alpha.

Tweedie's formula links both to the score: grad log p_t(xt) = (alpha E[x0 | xt] - xt) / sigma^2 = -eps / sigma.
So a `Prediction` of (x0, eps) determines every other parameterization.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import jax
import jax.numpy as jnp

from mdiff.types import Array, Key, Prediction


def bcast(coefficient: Array, x: Array) -> Array:
    """`[B]` coefficients shaped to multiply `x` `[B, ...]`; scalars pass through."""
    coefficient = jnp.asarray(coefficient, jnp.float32)
    return (
        coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
        if coefficient.ndim
        else coefficient
    )


class GaussianProcess(ABC):
    """A noise law; subclasses say what alpha, sigma and the inverse of sigma/alpha are."""

    @abstractmethod
    def alpha(self, t: Array) -> Array:
        """Signal rate at time t in [0, 1], t's shape."""

    @abstractmethod
    def sigma(self, t: Array) -> Array:
        """Noise rate at time t in [0, 1], t's shape."""

    @abstractmethod
    def time(self, noise_level: Array) -> Array:
        """The t at which sigma(t) / alpha(t), EDM's sigma, equals `noise_level`."""

    def noise_level(self, t: Array) -> Array:
        """EDM's sigma: the noise's standard deviation once the signal has unit scale."""
        return self.sigma(t) / self.alpha(t)

    def logsnr(self, t: Array) -> Array:
        """Log signal-to-noise ratio, 2 ln(alpha / sigma); +inf at t = 0."""
        return -2.0 * jnp.log(self.noise_level(t))

    def corrupt(self, x0: Array, eps: Array, t: Array) -> Array:
        """xt of shape [B,...] from x0 and unit noise eps of that shape, at times t [B]."""
        return bcast(self.alpha(t), x0) * x0 + bcast(self.sigma(t), x0) * eps

    def from_x0(self, xt: Array, x0: Array, t: Array) -> Prediction:
        """Complete a prediction of x0. At sigma = 0 the noise is undetermined and eps is 0."""
        sigma = bcast(self.sigma(t), xt)
        safe = jnp.where(sigma > 0, sigma, 1.0)
        return Prediction(x0, jnp.where(sigma > 0, (xt - bcast(self.alpha(t), xt) * x0) / safe, 0.0))

    def from_eps(self, xt: Array, eps: Array, t: Array) -> Prediction:
        """Complete a prediction of eps."""
        return Prediction((xt - bcast(self.sigma(t), xt) * eps) / bcast(self.alpha(t), xt), eps)

    def from_score(self, xt: Array, score: Array, t: Array) -> Prediction:
        """Complete a prediction of the score grad log p_t(xt)."""
        return self.from_eps(xt, -bcast(self.sigma(t), xt) * score, t)

    def score(self, prediction: Prediction, t: Array) -> Array:
        """grad log p_t(xt) = -eps / sigma; needs sigma > 0."""
        return -prediction.eps / bcast(self.sigma(t), prediction.eps)

    def prior(self, key: Key, shape: tuple[int, ...]) -> Array:
        """Starting noise at t = 1, standard deviation sigma(1)."""
        return self.sigma(jnp.float32(1.0)) * jax.random.normal(key, shape)
