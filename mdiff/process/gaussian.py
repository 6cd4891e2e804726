"""The Gaussian process xt = alpha(t) x0 + sigma(t) eps, and what follows from it.

Two facts carry everything. The marginal above links a prediction of x0 to one of eps:

    eps = (xt - alpha x0) / sigma,    x0 = (xt - sigma eps) / alpha.

Tweedie's formula links both to the score: grad log p_t(xt) = (alpha E[x0 | xt] - xt) / sigma^2 = -eps / sigma.
So a `Prediction` of (x0, eps) determines every other parameterization, and each of them determines it:

    v        = alpha eps - sigma x0          (arXiv 2202.00512, section 4)
    velocity = dxt/dt = alpha' x0 + sigma' eps   (arXiv 2209.03003, eq. 1: eps - x0 for the rectified flow)

Together with xt each is two linear equations in x0 and eps, solved by Cramer's rule; the determinants are
alpha^2 + sigma^2 and alpha sigma' - sigma alpha'.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

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


def _divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, 0 where the denominator is 0; finite there in gradients too."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


@dataclass(frozen=True)
class GaussianProcess(ABC):
    """A noise law; subclasses say what alpha, sigma and the inverse of sigma/alpha are.

    Attributes:
      sigma_min: lowest noise level (sigma/alpha) worked at.
      sigma_max: highest noise level: where sampling starts. Its time is below 1 for laws that reach more.
      rho: exponent of the Karras grid between the two.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @abstractmethod
    def alpha(self, t: Array) -> Array:
        """Signal rate at time t in [0, 1], t's shape."""

    @abstractmethod
    def sigma(self, t: Array) -> Array:
        """Noise rate at time t in [0, 1], t's shape."""

    @abstractmethod
    def time(self, noise_level: Array) -> Array:
        """The t at which sigma(t) / alpha(t), EDM's sigma, equals `noise_level`."""

    def alpha_dot(self, t: Array) -> Array:
        """d alpha / dt at t, t's shape."""
        return _derivative(self.alpha, t)

    def sigma_dot(self, t: Array) -> Array:
        """d sigma / dt at t, t's shape; infinite at t = 0 where sigma starts as a square root."""
        return _derivative(self.sigma, t)

    def noise_level(self, t: Array) -> Array:
        """EDM's sigma: the noise's standard deviation once the signal has unit scale."""
        return self.sigma(t) / self.alpha(t)

    def logsnr(self, t: Array) -> Array:
        """Log signal-to-noise ratio, 2 ln(alpha / sigma); +inf at t = 0."""
        return -2.0 * jnp.log(self.noise_level(t))

    def time_of_logsnr(self, logsnr: Array) -> Array:
        """The t whose log signal-to-noise ratio is `logsnr`."""
        return self.time(jnp.exp(-0.5 * jnp.asarray(logsnr, jnp.float32)))

    def corrupt(self, x0: Array, eps: Array, t: Array) -> Array:
        """xt of shape [B,...] from x0 and unit noise eps of that shape, at times t [B]."""
        return bcast(self.alpha(t), x0) * x0 + bcast(self.sigma(t), x0) * eps

    def from_x0(self, xt: Array, x0: Array, t: Array) -> Prediction:
        """Complete a prediction of x0 [B,...] at xt [B,...], t [B].

        At sigma = 0 the noise is undetermined and eps is 0.
        """
        return Prediction(x0, _divide(xt - bcast(self.alpha(t), xt) * x0, bcast(self.sigma(t), xt)))

    def from_eps(self, xt: Array, eps: Array, t: Array) -> Prediction:
        """Complete a prediction of eps; at alpha = 0 the image is undetermined and x0 is 0."""
        return Prediction(_divide(xt - bcast(self.sigma(t), xt) * eps, bcast(self.alpha(t), xt)), eps)

    def from_score(self, xt: Array, score: Array, t: Array) -> Prediction:
        """Complete a prediction of the score grad log p_t(xt)."""
        return self.from_eps(xt, -bcast(self.sigma(t), xt) * score, t)

    def from_v(self, xt: Array, v: Array, t: Array) -> Prediction:
        """Complete a prediction of v = alpha eps - sigma x0; well defined at both ends."""
        alpha, sigma = bcast(self.alpha(t), xt), bcast(self.sigma(t), xt)
        square = alpha**2 + sigma**2  # 1 for variance-preserving laws
        return Prediction((alpha * xt - sigma * v) / square, (sigma * xt + alpha * v) / square)

    def from_velocity(self, xt: Array, velocity: Array, t: Array) -> Prediction:
        """Complete a prediction of dxt/dt. At sigma = 0, x0 = xt / alpha and eps is 0."""
        alpha, sigma = bcast(self.alpha(t), xt), bcast(self.sigma(t), xt)
        noisy = sigma > 0
        # At t = 0 sigma' may be infinite or 0; the inner `where` keeps it out of gradients.
        inside = jnp.where(jnp.asarray(self.sigma(t)) > 0, t, 0.5)
        alpha_dot, sigma_dot = bcast(self.alpha_dot(inside), xt), bcast(self.sigma_dot(inside), xt)
        determinant = jnp.where(noisy, alpha * sigma_dot - sigma * alpha_dot, 1.0)
        x0 = jnp.where(noisy, (sigma_dot * xt - sigma * velocity) / determinant, _divide(xt, alpha))
        return Prediction(x0, jnp.where(noisy, (alpha * velocity - alpha_dot * xt) / determinant, 0.0))

    def score(self, prediction: Prediction, t: Array) -> Array:
        """grad log p_t(xt) = -eps / sigma; needs sigma > 0."""
        return -prediction.eps / bcast(self.sigma(t), prediction.eps)

    def v(self, prediction: Prediction, t: Array) -> Array:
        """alpha eps - sigma x0."""
        x0, eps = prediction
        return bcast(self.alpha(t), x0) * eps - bcast(self.sigma(t), x0) * x0

    def velocity(self, prediction: Prediction, t: Array) -> Array:
        """dxt/dt = alpha' x0 + sigma' eps along the probability flow; needs sigma > 0."""
        x0, eps = prediction
        return bcast(self.alpha_dot(t), x0) * x0 + bcast(self.sigma_dot(t), x0) * eps

    def posterior(self, xt: Array, x0: Array, t: Array, s: Array) -> tuple[Array, Array]:
        """The normal law of x_s given x_t and x0, s < t (arXiv 2107.00630, eq. 20 and appendix A.2).

        Args:
          xt: [B,...] state at time t.
          x0: [B,...] clean image.
          t: [B] or scalar time of xt.
          s: [B] or scalar earlier time.

        Returns:
          Its mean [B,...] and its standard deviation, of the times' shape made broadcastable.
        """
        alpha, sigma = bcast(self.alpha(s), xt), bcast(self.sigma(s), xt)
        shrink = sigma / bcast(self.sigma(t), xt)
        ratio = shrink * bcast(self.alpha(t), xt) / alpha  # of the noise levels, s to t
        fresh = jnp.maximum(1.0 - ratio, 0.0) * (1.0 + ratio)  # share of the variance that x0 decides
        return shrink * ratio * xt + alpha * fresh * x0, sigma * jnp.sqrt(fresh)

    def prior(self, key: Key, shape: tuple[int, ...]) -> Array:
        """Noise `shape` to start sampling from: xt at the time of sigma_max, image neglected."""
        return self.sigma(self.time(jnp.float32(self.sigma_max))) * jax.random.normal(key, shape)


def _derivative(rate: Callable[[Array], Array], t: Array) -> Array:
    t = jnp.asarray(t, jnp.float32)
    derivative: Array = jax.jvp(rate, (t,), (jnp.ones_like(t),))[1]
    return derivative
