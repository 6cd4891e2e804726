"""Which noise levels to train at, and which times to step through when sampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.process.laws import VarianceExploding
from mdiff.types import Array, Key


def lognormal_sigma(key: Key, n: int, p_mean: float, p_std: float) -> Array:
    """`[n]` noise levels with ln sigma ~ N(p_mean, p_std^2) (arXiv 2206.00364, table 1)."""
    return jnp.exp(p_mean + p_std * jax.random.normal(key, (n,)))


def karras_grid(process: VarianceExploding, steps: int) -> np.ndarray:
    """Times `[steps + 1]`, falling from 1 to 0, float32 (arXiv 2206.00364, eq. 5).

    The first `steps` run from sigma_max to sigma_min, equally spaced in sigma^(1/rho); the last is 0.
    """
    t_min = (process.sigma_min / process.sigma_max) ** (1.0 / process.rho)
    return np.append(np.linspace(1.0, t_min, steps), 0.0).astype(np.float32)
