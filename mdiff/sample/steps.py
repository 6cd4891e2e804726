"""What a sampler does between two times of the grid.

The state is kept at unit signal scale, u = xt / alpha, where every Gaussian process follows the same
probability-flow ODE in EDM's sigma, the noise level (arXiv 2206.00364, eq. 1 with s = 1):

    du/dsigma = (u - D(u; sigma)) / sigma = eps,

and the same reverse SDE, whose noise has the variance by which sigma^2 falls:

    du = 2 eps dsigma + sqrt(-d(sigma^2)) noise        (arXiv 2011.13456, eq. 6; dsigma < 0).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.types import Array, Denoiser, Key


class Interval(NamedTuple):
    """One step of the grid: from time t (index `step`) down to time s.

    `before` is where the previous step began (t itself in the first step). `last` is known before
    tracing; then s = 0, where there is no noise left and eps is undefined.
    """

    step: Array
    before: Array
    t: Array
    s: Array
    last: bool


class State(NamedTuple):
    """What one step hands to the next.

    Attributes:
      u: [B,H,W,C] the sample at unit signal scale.
      x0: [B,H,W,C] the clean image as the last step estimated it, which multistep methods remember.
    """

    u: Array
    x0: Array


Step = Callable[[Denoiser, State, Interval, Key, "Array | None"], State]
"""`(denoiser, state, interval, keys [B], cond) -> state at the interval's end`."""


def _noise(keys: Key, step: Array, shape: tuple[int, ...]) -> Array:
    """Unit noise [B,...] of sampling step `step`; row i depends on key i and the step alone."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step + 1), shape[1:]))(keys)


def _x0(process: GaussianProcess, denoiser: Denoiser, u: Array, sigma: Array, cond: Array | None) -> Array:
    """D(u; sigma); sigma is a scalar above 0."""
    t = jnp.broadcast_to(process.time(sigma), u.shape[:1])
    return denoiser(u * bcast(process.alpha(t), u), t, cond).x0


def _removed(sigma: Array, target: Array) -> Array:
    """sigma^2 - target^2 without cancellation, 0 where target is above sigma."""
    return jnp.maximum(sigma - target, 0.0) * (sigma + target)


def euler(process: GaussianProcess, cfg: config.Sample) -> Step:
    """Euler's step in the noise level (arXiv 2206.00364, algorithm 1 without its correction).

    The same as DDIM with eta = 0 for every process, and as Euler's step in t for the rectified flow.
    """

    def step(denoiser: Denoiser, state: State, at: Interval, keys: Key, cond: Array | None) -> State:
        sigma, target = process.noise_level(at.t), process.noise_level(at.s)
        x0 = _x0(process, denoiser, state.u, sigma, cond)
        return State(state.u + (target - sigma) * (state.u - x0) / sigma, x0)

    return step


def heun(process: GaussianProcess, cfg: config.Sample, unroll: bool = False) -> Step:
    """Heun's second-order step with churn (arXiv 2206.00364, algorithm 2).

    Predictor and corrector are a scan of two, so that the network is compiled once; with `unroll` they are written out, for
    denoisers that hold a convolution's gradient, which is slow in a loop on CPU.
    """
    gamma_max = min(cfg.churn / cfg.steps, 2.0**0.5 - 1.0)

    def step(denoiser: Denoiser, state: State, at: Interval, keys: Key, cond: Array | None) -> State:
        u, sigma, target = state.u, process.noise_level(at.t), process.noise_level(at.s)
        if cfg.churn > 0:
            churned = (sigma >= cfg.churn_min) & (sigma <= cfg.churn_max)
            raised = jnp.where(churned, sigma * (1 + gamma_max), sigma)
            added = jnp.sqrt(_removed(raised, sigma))
            u = u + added * cfg.churn_noise * _noise(keys, at.step, u.shape)
            sigma = raised
        if at.last:
            x0 = _x0(process, denoiser, u, sigma, cond)
            return State(u - sigma * ((u - x0) / sigma), x0)  # Euler; it lands on D

        def slope(carry: tuple[Array, Array], level: Array) -> tuple[tuple[Array, Array], Array]:
            x, total = carry
            x0 = _x0(process, denoiser, x, level, cond)
            d = (x - x0) / level
            return (u + (target - sigma) * d, total + d), x0

        begin = (u, jnp.zeros_like(u))
        if unroll:
            (_, total), x0 = slope(slope(begin, sigma)[0], target)
            return State(u + (target - sigma) * 0.5 * total, x0)
        (_, total), x0s = jax.lax.scan(slope, begin, jnp.stack([sigma, target]))
        return State(u + (target - sigma) * 0.5 * total, x0s[1])

    return step


def ddim(process: GaussianProcess, cfg: config.Sample) -> Step:
    """DDIM (arXiv 2010.02502, eq. 12 and 16), eta = 0 deterministic, eta = 1 ancestral."""

    def step(denoiser: Denoiser, state: State, at: Interval, keys: Key, cond: Array | None) -> State:
        sigma, target = process.noise_level(at.t), process.noise_level(at.s)
        x0 = _x0(process, denoiser, state.u, sigma, cond)
        eps = (state.u - x0) / sigma
        # Variance of u_s given u_t and x0 is s^2 (t^2 - s^2) / t^2 in units of sigma.
        fresh = cfg.eta * target * jnp.sqrt(_removed(sigma, target)) / sigma
        kept = jnp.sqrt(jnp.maximum(target**2 - fresh**2, 0.0))
        u = x0 + kept * eps
        return State(u + fresh * _noise(keys, at.step, u.shape) if cfg.eta > 0 else u, x0)

    return step


def dpmpp2m(process: GaussianProcess, cfg: config.Sample) -> Step:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), one network call per step.

    Exact for a constant x0; its slope in ln sigma, to second order, comes from the previous step. The first step
    has none. The last two, to sigma_min and to 0, are first order too: there ln sigma falls so far that the
    slope would be carried too far (the lower final order of that paper's few-step runs).
    """

    def step(denoiser: Denoiser, state: State, at: Interval, keys: Key, cond: Array | None) -> State:
        sigma, target = process.noise_level(at.t), process.noise_level(at.s)
        x0 = _x0(process, denoiser, state.u, sigma, cond)
        if at.last:
            return State(x0, x0)
        width, previous = jnp.log(sigma / target), jnp.log(process.noise_level(at.before) / sigma)
        second = (at.step > 0) & (at.step < cfg.steps - 2)
        extrapolate = jnp.where(second, 0.5 * width / jnp.where(second, previous, 1.0), 0.0)
        ahead = x0 + extrapolate * (x0 - state.x0)
        ratio = target / sigma
        return State(ratio * state.u + (1.0 - ratio) * ahead, x0)

    return step


def ddpm(process: GaussianProcess, cfg: config.Sample) -> Step:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2): a draw from the posterior of x_s given x_t and x0.

    Its variance is the posterior's (the smaller of the two choices there), so it equals DDIM with eta = 1.
    """

    def step(denoiser: Denoiser, state: State, at: Interval, keys: Key, cond: Array | None) -> State:
        x0 = _x0(process, denoiser, state.u, process.noise_level(at.t), cond)
        mean, std = process.posterior(process.alpha(at.t) * state.u, x0, at.t, at.s)
        xs = mean if at.last else mean + std * _noise(keys, at.step, mean.shape)
        return State(xs / process.alpha(at.s), x0)

    return step


def sde(process: GaussianProcess, cfg: config.Sample) -> Step:
    """Euler-Maruyama's step of the reverse SDE in the variance sigma^2 (arXiv 2011.13456, eq. 6 and 46).

    The mean moves as in `ddpm`; the noise is larger, sigma_t / sigma_s times. The last step adds none.
    """

    def step(denoiser: Denoiser, state: State, at: Interval, keys: Key, cond: Array | None) -> State:
        sigma, target = process.noise_level(at.t), process.noise_level(at.s)
        x0 = _x0(process, denoiser, state.u, sigma, cond)
        removed = _removed(sigma, target)
        u = state.u - removed * ((state.u - x0) / sigma**2)
        return State(u if at.last else u + jnp.sqrt(removed) * _noise(keys, at.step, u.shape), x0)

    return step


METHODS: dict[str, Callable[[GaussianProcess, config.Sample], Step]] = {
    "heun": heun,
    "euler": euler,
    "ddim": ddim,
    "dpmpp2m": dpmpp2m,
    "ddpm": ddpm,
    "sde": sde,
}

UNROLLED: dict[str, Callable[[GaussianProcess, config.Sample], Step]] = {
    **METHODS,
    "heun": functools.partial(heun, unroll=True),
}
"""The same without loops inside."""

ALIKE = ("euler", "ddim")
"""Methods whose last step is a step like any other: they do not look at `Interval.last`."""
