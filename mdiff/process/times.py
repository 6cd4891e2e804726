"""Which noise levels to train at, and which times to step through when sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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

    With a share, a buffer or without the levels below the cutoff, two branches, below the cutoff and at or above the
    buffer's end, keep the law they have, and only their probabilities change: u is mapped to the law's own u
    piecewise linearly, from [0, 1 - s] to [0, P(sigma < cutoff)] and from [1 - s, 1] to [P(sigma < end), 1], s the
    probability of the upper branch. The cutoff may differ between draws; one of 0 has no lower branch.

    Attributes:
      law: of the coordinate.
      coordinate: noise level to coordinate, increasing.
      level: its inverse.
      stratified: spread the levels of one draw evenly over their law.
      share: probability of noise levels at or above the cutoff; 0 leaves it to the law.
      cutoff: where the branches part, for draws that bring no cutoff of their own.
      gain: levels in [cutoff, gain * cutoff) are not drawn; 1 draws all.
      below: are levels below the cutoff drawn?
    """

    law: Normal | Uniform
    coordinate: Map
    level: Map
    stratified: bool = False
    share: float = 0.0
    cutoff: float = 0.0
    gain: float = 1.0
    below: bool = True

    @property
    def natural(self) -> float:
        """The law's own probability of noise levels at or above the cutoff."""
        with jax.ensure_compile_time_eval():
            return float(self.law.tails(self.coordinate(jnp.float32(self.cutoff)))[1])

    @property
    def parted(self) -> bool:
        """Do the branches have other probabilities than the law gives them?"""
        return self.share != 0 or self.gain != 1 or not self.below

    def _branches(self, cutoff: Array) -> tuple[Array, Array, Array]:
        """Where the upper branch begins, and the law's own probabilities below the cutoff and above that."""
        end = cutoff * np.float32(self.gain)
        positive = jnp.where(cutoff > 0, cutoff, 1.0)
        under, _ = self.law.tails(self.coordinate(positive))
        _, over = self.law.tails(self.coordinate(positive * np.float32(self.gain)))
        return end, jnp.where(cutoff > 0, under, 0.0), jnp.where(cutoff > 0, over, 1.0)

    def _share(self, under: Array, over: Array) -> Array:
        """Probability of the upper branch."""
        if not self.below:
            return jnp.ones_like(over)
        share = jnp.full_like(over, self.share) if self.share else over / jnp.maximum(under + over, 1e-30)
        return jnp.where(under <= 0, 1.0, jnp.where(over <= 0, 0.0, share))

    def sigma(self, u: Array, cutoff: Array | None = None) -> Array:
        """The noise level below which a draw falls with probability u; u in (0, 1), its shape.

        Args:
          u: probabilities.
          cutoff: where the branches part for each u; None takes the law's own `cutoff` for all.
        """
        u = jnp.asarray(u, jnp.float32)
        if not self.parted:
            return self.level(self.law.quantile(u, 1.0 - u))
        each = jnp.broadcast_to(jnp.float32(self.cutoff) if cutoff is None else cutoff, u.shape)
        upper, under, over = self._branches(each)
        share = self._share(under, over)
        is_above = u >= 1.0 - share
        below = u * (under / jnp.where(share < 1, 1.0 - share, 1.0))
        above = (1.0 - u) * (over / jnp.where(share > 0, share, 1.0))
        y = self.law.quantile(
            jnp.where(is_above, 1.0 - above, below), jnp.where(is_above, above, 1.0 - below)
        )
        # Rounding must not carry a level across the cutoff: the branch decides which images are used.
        sigma = self.level(y)
        return jnp.where(is_above, jnp.maximum(sigma, upper), jnp.minimum(sigma, _next_below(each)))

    def cdf(self, sigma: Array, cutoff: Array | None = None) -> Array:
        """Probability of a draw below `sigma`, its shape; the inverse of `sigma(u, cutoff)`."""
        sigma = jnp.asarray(sigma, jnp.float32)
        below, above = self.law.tails(self.coordinate(sigma))
        if not self.parted:
            return below
        each = jnp.broadcast_to(jnp.float32(self.cutoff) if cutoff is None else cutoff, sigma.shape)
        _, under, over = self._branches(each)
        share = self._share(under, over)
        low = jnp.minimum(below, under) * ((1.0 - share) / jnp.where(under > 0, under, 1.0))
        high = 1.0 - jnp.minimum(above, over) * (share / jnp.where(over > 0, over, 1.0))
        return jnp.where(sigma < each, low, high)

    def draw(self, key: Key, n: int, cutoff: Array | None = None) -> Array:
        """`[n]` noise levels. Each is drawn from the law; stratified ones are not independent.

        Stratified draws take one u from each of n equal parts of (0, 1), all shifted by one common random
        amount (arXiv 2107.00630, appendix I.1), in random order: a place in the batch says nothing about
        the level, nor does the device that place is on.

        Args:
          key: of the draw.
          n: how many.
          cutoff: [n] where each draw's branches part; None takes the law's own `cutoff`.
        """
        if not self.stratified:
            return self.sigma(jax.random.uniform(key, (n,)) + HALF_STEP, cutoff)
        key_shift, key_order = jax.random.split(key)
        u = (jnp.arange(n) + jax.random.uniform(key_shift)) / n
        u = jnp.clip(u, HALF_STEP, 1.0 - HALF_STEP)
        return self.sigma(jax.random.permutation(key_order, u), cutoff)


def _next_below(x: Array) -> Array:
    """The largest float32 below positive x."""
    return jnp.nextafter(x, jnp.float32(0.0))


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
    """`times` with the configured branches."""
    gain = buffer_gain(loss) if loss.ambient and loss.buffer == "redraw" else 1.0
    times = replace(
        times,
        share=loss.share,
        cutoff=loss.cutoff,
        gain=gain,
        below=not (loss.ambient and loss.clean == "never"),
    )
    if loss.share and not 0 < loss.share < 1:
        raise UserError(f"loss.share = {loss.share}: must be 0 (as the law has it) or between 0 and 1")
    if loss.share and not loss.ambient:
        raise UserError(f"loss.share = {loss.share}: needs a loss.cutoff above 0 (it is {loss.cutoff})")
    if not times.parted:
        return times
    for cutoff in loss.levels:
        below, above = (
            float(times.law.tails(times.coordinate(jnp.float32(at)))[side])
            for side, at in ((0, cutoff), (1, cutoff * gain))
        )
        field = "loss.share" if loss.share else "loss.buffer" if gain != 1 else "loss.clean"
        if above <= 0 or (below <= 0 and loss.share):
            side = "at or above" if above <= 0 else "below"
            raise UserError(
                f"{field} = {getattr(loss, field[5:])}: law {loss.times} has no noise levels {side} cutoff {cutoff}; "
                f"move loss.cutoff or leave {field} at its default"
            )
    return times


def buffer_gain(loss: config.Loss) -> float:
    """sigma / cutoff at which 1/a has fallen to loss.max_gain: a = 1 - cutoff^2 / sigma^2."""
    return math.sqrt(1.0 / (1.0 - 1.0 / loss.max_gain))


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
