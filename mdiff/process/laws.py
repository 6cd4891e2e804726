"""The noise laws: what alpha and sigma are.

All computations are float32; each formula is written so that no digits cancel at either end of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.process.gaussian import GaussianProcess
from mdiff.types import Array

RESOLVED = 1e4
"""Highest noise level of laws that reach alpha = 0 at t = 1: float32 times there resolve it to 0.06 %."""


@dataclass(frozen=True)
class VarianceExploding(GaussianProcess):
    """alpha = 1, sigma = sigma_max * t**rho (arXiv 2206.00364).

    The power makes a uniform grid in t the Karras grid in sigma (eq. 5 there), maps t = 0 to exactly no
    noise, and keeps small sigmas accurate in float32. Noise levels above sigma_max are times above 1.
    """

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(t, jnp.float32)

    def sigma(self, t: Array) -> Array:
        return self.sigma_max * jnp.asarray(t, jnp.float32) ** self.rho

    def time(self, noise_level: Array) -> Array:
        return (jnp.asarray(noise_level, jnp.float32) / self.sigma_max) ** (1.0 / self.rho)


@dataclass(frozen=True)
class VariancePreserving(GaussianProcess):
    """alpha^2 + sigma^2 = 1 with noise added at a rate linear in t (arXiv 2011.13456, eq. 33).

    ln alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2. Highest noise level at t = 1; those above
    it are times above 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _exponent(self, t: Array) -> Array:
        """-2 ln alpha = ln(1 + noise level^2), the integral of the rate."""
        t = jnp.asarray(t, jnp.float32)
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def alpha(self, t: Array) -> Array:
        return jnp.exp(-0.5 * self._exponent(t))

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(-self._exponent(t)))

    def noise_level(self, t: Array) -> Array:
        return jnp.sqrt(jnp.expm1(self._exponent(t)))

    def time(self, noise_level: Array) -> Array:
        exponent = jnp.log1p(jnp.asarray(noise_level, jnp.float32) ** 2)
        root = jnp.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * exponent)
        return 2.0 * exponent / (self.beta_min + root)


@dataclass(frozen=True)
class CosineVariancePreserving(GaussianProcess):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (arXiv 2102.09672, eq. 17, without its offset and clip)."""

    def alpha(self, t: Array) -> Array:
        # 1 - t is exact near t = 1, where the cosine would round.
        return jnp.sin(0.5 * math.pi * (1.0 - jnp.asarray(t, jnp.float32)))

    def sigma(self, t: Array) -> Array:
        return jnp.sin(0.5 * math.pi * jnp.asarray(t, jnp.float32))

    def time(self, noise_level: Array) -> Array:
        return jnp.arctan(jnp.asarray(noise_level, jnp.float32)) / (0.5 * math.pi)


@dataclass(frozen=True)
class RectifiedFlow(GaussianProcess):
    """alpha = 1 - t, sigma = t: straight lines between image and noise (arXiv 2209.03003)."""

    def alpha(self, t: Array) -> Array:
        return 1.0 - jnp.asarray(t, jnp.float32)

    def sigma(self, t: Array) -> Array:
        return jnp.asarray(t, jnp.float32)

    def time(self, noise_level: Array) -> Array:
        level = jnp.asarray(noise_level, jnp.float32)
        return level / (1.0 + level)


def make_process(cfg: config.Process) -> GaussianProcess:
    """The process a config describes."""
    span = (cfg.sigma_min, cfg.sigma_max, cfg.rho)
    if cfg.kind == "vp_linear":
        return VariancePreserving(*span, cfg.beta_min, cfg.beta_max)
    if cfg.kind == "vp_cosine":
        return CosineVariancePreserving(*span)
    if cfg.kind == "flow":
        return RectifiedFlow(*span)
    return VarianceExploding(*span)


def check(cfg: config.Process) -> None:
    """Is the noise law well defined, and does it reach the noise levels asked for?

    Raises:
      UserError: a field is out of range; the message names the largest usable sigma_max.
    """
    if not 0 < cfg.sigma_min < cfg.sigma_max < math.inf or not 0 < cfg.rho < math.inf:
        raise UserError(
            f"process.sigma_min = {cfg.sigma_min}, sigma_max = {cfg.sigma_max}, rho = {cfg.rho}: "
            "need 0 < sigma_min < sigma_max and rho > 0, all finite"
        )
    largest = math.inf
    if cfg.kind == "vp_linear":
        if not 0 < cfg.beta_min <= cfg.beta_max <= 80:
            raise UserError(
                f"process.beta_min = {cfg.beta_min}, beta_max = {cfg.beta_max}: need "
                "0 < beta_min <= beta_max <= 80; usual values are 0.1 and 20"
            )
        largest = math.sqrt(math.expm1(0.5 * (cfg.beta_max + cfg.beta_min)))
    else:
        for name in ("beta_min", "beta_max"):
            if getattr(cfg, name) != getattr(config.Process, name):
                raise UserError(
                    f"process.{name} = {getattr(cfg, name)}: applies to kind vp_linear only; "
                    f"leave it out or set process.kind to vp_linear (it is {cfg.kind})"
                )
    if cfg.kind in ("vp_cosine", "flow"):
        largest = RESOLVED
    if cfg.sigma_max > largest:
        raise UserError(
            f"process.sigma_max = {cfg.sigma_max}: {cfg.kind} reaches noise level {largest:.6g} at most; "
            "lower sigma_max" + (" or raise beta_max" if cfg.kind == "vp_linear" else "")
        )
