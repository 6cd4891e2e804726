"""Power-function averages of the weights, and averages made after training (arXiv 2312.02696, section 3).

The average of relative width sigma_rel after t steps weighs step tau by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)
on [0, t]. Its length grows with training: the standard deviation of p is sigma_rel t. The recurrence

    avg_t = beta(t) avg_(t-1) + (1 - beta(t)) theta_t,    beta(t) = (1 - 1/t)^(gamma + 1)

gives step i exactly the integral of p over [i - 1, i], and forgets the initialization at t = 1.

Any other average is a weighted sum of stored ones, as far as its p is one of theirs: `solve` finds the
weights by least squares over [0, inf), in closed form. The misfit it reports, ||p - sum w p_i|| / ||p||, is the
standard deviation of the reconstruction's error in units of the average's own noise, if the weights of
successive steps scatter independently about their mean; the mean itself is kept, since the weights sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdiff import config
from mdiff.errors import UserError
from mdiff.types import Array, Params

WIDEST = 12**-0.5
"""sigma_rel of the plain mean over all steps (gamma = 0)."""


def name(sigma_rel: float) -> str:
    """The key of a length in `TrainState.profiles`."""
    return f"{sigma_rel:g}"


def gamma(sigma_rel: float, field: str = "sigma_rel") -> float:
    """Exponent of the profile of relative width `sigma_rel`, in float64.

    The positive root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (arXiv 2312.02696, app. C.1).

    Raises:
      UserError: no such profile gives later steps more weight; the message names `field`.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"{field} = {sigma_rel:g}: must be above 0 and at most {WIDEST:.4f}, the plain mean")
    roots = np.roots([1.0, 7.0, 16.0 - sigma_rel**-2, 12.0 - sigma_rel**-2])
    return max(float(np.max(roots.real)), 0.0)


def share(step: Array, exponent: float) -> Array:
    """1 - beta(step), what the newest weights enter with; step [] counts from 1."""
    # beta is within 1e-5 of 1 late in training: 1 - beta taken from a float32 beta would have one digit.
    return -jnp.expm1((exponent + 1) * jnp.log1p(-1 / step.astype(jnp.float32)))


def update(
    profiles: dict[str, Params], params: Params, step: Array, lengths: Sequence[float]
) -> dict[str, Params]:
    """All averages after `step` (counted from 1), whose new weights are `params`."""

    def mix(length: float) -> Params:
        new = share(step, gamma(length))
        return jax.tree.map(lambda old, now: old + new * (now - old), profiles[name(length)], params)

    return {name(length): mix(length) for length in lengths}


# ---------------------------------------------------------------------------------- after training


@dataclass(frozen=True)
class Fit:
    """How an average is made of stored ones.

    Attributes:
      weights: float64 [n], one per stored average; they sum to 1.
      misfit: ||p - sum w p_i|| / ||p||, 0 when the average is exactly expressed.
    """

    weights: np.ndarray
    misfit: float


def inner(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> np.ndarray:
    """Inner products of profiles, the integral of p_a p_b over [0, min(t_a, t_b)], float64 (app. C.2)."""
    t_a, gamma_a, t_b, gamma_b = (np.asarray(each, np.float64) for each in (t_a, gamma_a, t_b, gamma_b))
    first = np.minimum(t_a, t_b)
    ratio = (gamma_a + 1) * np.log(first / t_a) + (gamma_b + 1) * np.log(first / t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * np.exp(ratio) / first


def solve(times: ArrayLike, gammas: ArrayLike, time: float, target: float) -> Fit:
    """The stored averages' weights nearest to the profile (time, target), summing to 1.

    Args:
      times: [n] steps at which averages were stored.
      gammas: [n] their exponents; the n pairs (time, gamma) must differ.
      time: the step at which the wanted average ends.
      target: its exponent.

    Returns:
      Weights and misfit.
    """
    t, g = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    gram = inner(t[:, None], g[:, None], t[None, :], g[None, :])
    wanted, own = inner(t, g, time, target), float(inner(time, target, time, target))
    # Profiles at unit length, since steps differ by orders of magnitude; one row says that the weights sum to 1.
    scale = np.sqrt(np.diag(gram))
    sums = (scale.min() / scale)[None, :]
    system = np.block([[gram / np.outer(scale, scale), sums.T], [sums, np.zeros((1, 1))]])
    weights = np.linalg.lstsq(system, np.append(wanted / scale, scale.min()), rcond=None)[0][:-1] / scale
    square = own - 2 * weights @ wanted + weights @ gram @ weights
    return Fit(weights, math.sqrt(max(square, 0.0) / own))


def check(cfg: config.Train) -> None:
    """Raises UserError when a field of the averages is out of range."""
    for length in cfg.ema_lengths:
        gamma(length, "train.ema_lengths")
    if len({name(length) for length in cfg.ema_lengths}) < len(cfg.ema_lengths):
        raise UserError(f"train.ema_lengths = {cfg.ema_lengths}: a length occurs twice; name each once")
    if cfg.ema_every < 0:
        raise UserError(f"train.ema_every = {cfg.ema_every}: must be 0 or more")
    if cfg.ema_every and not cfg.ema_lengths:
        raise UserError(
            f"train.ema_every = {cfg.ema_every}: there is no average to store; set train.ema_lengths, such as 0.05 0.1"
        )
