"""Which noise levels to train at, and which times to step through when sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit, ndtr, ndtri

from mdiff import config
from mdiff.errors import UserError
from mdiff.process.gaussian import GaussianProcess
from mdiff.types import Array, Key

Grid = Literal["karras", "uniform", "logsnr"]

HALF_STEP = 2.0**-24
"""Half the spacing of float32 uniforms: added to them, they are symmetric in (0, 1) and never 0 or 1."""

Map = Callable[[Array], Array]


@dataclass(frozen=True)
class Normal:
    """A normal law, by its two tails so that neither loses digits."""

    mean: float
    std: float

    def tails(self, y: Array) -> tuple[Array, Array]:
        """P(Y < y) and P(Y >= y)."""
        z = (y - self.mean) / self.std
        return ndtr(z), ndtr(-z)

    def quantile(self, below: Array, above: Array) -> Array:
        """The y with P(Y < y) = below; above is 1 - below, given apart since it may be tiny."""
        z = jnp.where(below < 0.5, ndtri(jnp.minimum(below, 0.5)), -ndtri(jnp.minimum(above, 0.5)))
        return self.mean + self.std * z


@dataclass(frozen=True)
class Uniform:
    """The uniform law on [low, high], by its two tails."""

    low: float
    high: float

    def tails(self, y: Array) -> tuple[Array, Array]:
        """P(Y < y) and P(Y >= y)."""
        width = self.high - self.low
        return jnp.clip((y - self.low) / width, 0.0, 1.0), jnp.clip((self.high - y) / width, 0.0, 1.0)

    def quantile(self, below: Array, above: Array) -> Array:
        """The y with P(Y < y) = below = 1 - above."""
        width = self.high - self.low
        return jnp.where(below < 0.5, self.low + width * below, self.high - width * above)


@dataclass(frozen=True)
class Times:
    """The law of the noise levels trained at: some increasing coordinate of sigma is normal or uniform.

    With a share, the two branches below and at or above the cutoff keep the law they have, and only the
    probabilities of the branches change: u is mapped to the law's own u piecewise linearly, from
    [0, 1 - share] to [0, 1 - natural] and from [1 - share, 1] to [1 - natural, 1].

    Attributes:
      law: of the coordinate.
      coordinate: noise level to coordinate, increasing.
      level: its inverse.
      stratified: spread the levels of one draw evenly over their law.
      share: probability of noise levels at or above the cutoff; 0 leaves it to the law.
      cutoff: where the branches part.
      natural: the law's own probability of noise levels at or above the cutoff.
    """

    law: Normal | Uniform
    coordinate: Map
    level: Map
    stratified: bool = False
    share: float = 0.0
    cutoff: float = 0.0
    natural: float = 1.0

    def sigma(self, u: Array) -> Array:
        """The noise level below which a draw falls with probability u; u in (0, 1), its shape."""
        u = jnp.asarray(u, jnp.float32)
        if self.share == 0:
            return self.level(self.law.quantile(u, 1.0 - u))
        is_above = u >= 1.0 - self.share
        below = u * ((1.0 - self.natural) / (1.0 - self.share))
        above = (1.0 - u) * (self.natural / self.share)
        y = self.law.quantile(
            jnp.where(is_above, 1.0 - above, below), jnp.where(is_above, above, 1.0 - below)
        )
        # Rounding must not carry a level across the cutoff: the branch decides which images are used.
        cutoff = np.float32(self.cutoff)
        under = np.nextafter(cutoff, np.float32(0.0))
        sigma = self.level(y)
        return jnp.where(is_above, jnp.maximum(sigma, cutoff), jnp.minimum(sigma, under))

    def cdf(self, sigma: Array) -> Array:
        """Probability of a draw below `sigma`, its shape; the inverse of `sigma(u)`."""
        sigma = jnp.asarray(sigma, jnp.float32)
        below, above = self.law.tails(self.coordinate(sigma))
        if self.share == 0:
            return below
        low = below * ((1.0 - self.share) / (1.0 - self.natural))
        return jnp.where(sigma < self.cutoff, low, 1.0 - above * (self.share / self.natural))

    def draw(self, key: Key, n: int) -> Array:
        """`[n]` noise levels. Each is drawn from the law; stratified ones are not independent.

        Stratified draws take one u from each of n equal parts of (0, 1), all shifted by one common random
        amount (arXiv 2107.00630, appendix I.1), in random order: a place in the batch says nothing about
        the level, nor does the device that place is on.
        """
        if not self.stratified:
            return self.sigma(jax.random.uniform(key, (n,)) + HALF_STEP)
        key_shift, key_order = jax.random.split(key)
        u = (jnp.arange(n) + jax.random.uniform(key_shift)) / n
        u = jnp.clip(u, HALF_STEP, 1.0 - HALF_STEP)
        return self.sigma(jax.random.permutation(key_order, u))


def make_times(loss: config.Loss, process: GaussianProcess, span: config.Process) -> Times:
    """The law of training noise levels that a config describes.

    lognormal: ln sigma is normal (arXiv 2206.00364, table 1). logit_normal: logit t is normal
    (arXiv 2403.03206, eq. 19). uniform and logsnr: t, or ln sigma, is uniform between sigma_min and
    sigma_max.

    Args:
      loss: law, its parameters, share and cutoff.
      process: gives times their meaning.
      span: sigma_min and sigma_max.

    Raises:
      UserError: the share has no cutoff or lies beyond the law's reach, or the law leaves float32's range.
    """
    with jax.ensure_compile_time_eval():  # callable from inside a jit too
        law: Normal | Uniform
        coordinate: Map
        level: Map
        ends = jnp.float32([span.sigma_min, span.sigma_max])
        if loss.times in ("lognormal", "logsnr"):
            coordinate, level = jnp.log, jnp.exp
        elif loss.times == "uniform":
            coordinate, level = process.time, process.noise_level
        else:
            coordinate = lambda sigma: logit(process.time(sigma))  # noqa: E731
            level = lambda y: process.noise_level(jax.nn.sigmoid(y))  # noqa: E731
        if loss.times in ("lognormal", "logit_normal"):
            if not 0 < loss.p_std < math.inf or not math.isfinite(loss.p_mean):
                raise UserError(
                    f"loss.p_mean = {loss.p_mean}, p_std = {loss.p_std}: need finite numbers, p_std > 0"
                )
            law = Normal(loss.p_mean, loss.p_std)
        else:
            law = Uniform(*(float(y) for y in coordinate(ends)))
        times = Times(law, coordinate, level, loss.stratified)
        lowest, highest = np.asarray(times.sigma(jnp.float32([HALF_STEP, 1.0 - HALF_STEP])))
        if not 1e-18 < lowest < highest < 1e18:
            raise UserError(
                f"loss.p_mean = {loss.p_mean}, p_std = {loss.p_std}: law {loss.times} of process {span.kind} "
                f"draws noise levels from {lowest:.1g} to {highest:.1g}, too wide for float32; move p_mean or lower p_std"
            )
        return _shared(times, loss)


def _shared(times: Times, loss: config.Loss) -> Times:
    """`times` with the configured share at or above the cutoff."""
    if loss.share == 0:
        return times
    if not 0 < loss.share < 1:
        raise UserError(f"loss.share = {loss.share}: must be 0 (as the law has it) or between 0 and 1")
    if not 0 < loss.cutoff < math.inf:
        raise UserError(f"loss.share = {loss.share}: needs a loss.cutoff above 0 (it is {loss.cutoff})")
    below, above = (float(tail) for tail in times.law.tails(times.coordinate(jnp.float32(loss.cutoff))))
    if not (below > 0 and above > 0):
        side = "at or above" if above <= 0 else "below"
        raise UserError(
            f"loss.share = {loss.share}: law {loss.times} has no noise levels {side} cutoff {loss.cutoff}; "
            "move loss.cutoff or leave loss.share at 0"
        )
    natural = above if above < 0.5 else 1.0 - below
    return Times(times.law, times.coordinate, times.level, times.stratified, loss.share, loss.cutoff, natural)


def make_grid(
    process: GaussianProcess, kind: Grid, steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> np.ndarray:
    """Sampling times `[steps + 1]`, float32, falling from the time of sigma_max; the last is 0.

    The first `steps` run from sigma_max to sigma_min: karras equally spaced in sigma^(1/rho)
    (arXiv 2206.00364, eq. 5), uniform in t, logsnr in ln sigma (arXiv 2206.00927, section 4.1).

    Args:
      process: gives noise levels their times.
      kind: the spacing.
      steps: 2 or more.
      sigma_min: lowest noise level before 0.
      sigma_max: noise level to start at.
      rho: exponent of karras.

    Raises:
      UserError: float32 cannot tell neighbouring times apart.
    """
    with jax.ensure_compile_time_eval():  # grids are constants, also inside a jit
        if kind == "uniform":
            first, last = (float(process.time(jnp.float32(sigma))) for sigma in (sigma_max, sigma_min))
            times = np.linspace(first, last, steps)
        else:
            if kind == "karras":
                levels = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
            else:
                levels = np.geomspace(sigma_max, sigma_min, steps)
            times = np.asarray(process.time(jnp.asarray(levels, jnp.float32)))
    grid = np.append(times, 0.0).astype(np.float32)
    if not np.all(np.diff(grid) < 0):
        raise UserError(
            f"sample.steps = {steps}: float32 cannot tell the times of a {kind} grid apart; lower it"
        )
    return grid
