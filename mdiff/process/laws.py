"""The noise laws: what alpha and sigma are."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from mdiff import config
from mdiff.process.gaussian import GaussianProcess
from mdiff.types import Array


@dataclass(frozen=True)
class VarianceExploding(GaussianProcess):
    """alpha = 1, sigma = sigma_max * t**rho (arXiv 2206.00364).

    The power makes a uniform grid in t the Karras grid in sigma (eq. 5 there), maps t = 0 to exactly no
    noise, and keeps small sigmas accurate in float32. Noise levels above sigma_max are times above 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(t, jnp.float32)

    def sigma(self, t: Array) -> Array:
        return self.sigma_max * jnp.asarray(t, jnp.float32) ** self.rho

    def time(self, noise_level: Array) -> Array:
        return (jnp.asarray(noise_level, jnp.float32) / self.sigma_max) ** (1.0 / self.rho)


def make_process(cfg: config.Process) -> VarianceExploding:
    """The process a config describes."""
    return VarianceExploding(cfg.sigma_min, cfg.sigma_max, cfg.rho)
