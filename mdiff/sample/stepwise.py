"""A sampler guided by a classifier, one step at a time.

On CPU a convolution's gradient inside `scan` is some 25 times slower than outside, and a guided step holds one. So here a
step is a function of its own, to be compiled and called in a Python loop (`mdiff.recipes.guided`), and holds no loop.
On accelerators it may as well be the body of a scan (`scan`): both do the same.

Time, labels and strength are arguments of the step, so one compiled program serves all steps, classes and strengths. Only
the last step is another one, where the method treats it apart (all but `steps.ALIKE`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.process.gaussian import GaussianProcess
from mdiff.sample import guidance, sampler
from mdiff.sample.steps import ALIKE, UNROLLED, Interval, State
from mdiff.types import Array, Denoiser, Key


class Walk(NamedTuple):
    """Where a guided sampler is.

    Attributes:
      state: what the sampler's steps hand on.
      pushed: [B] sum over the calls so far of ||sigma grad log p(label | xt)||.
      calls: [] how many calls of the classifier those were.
    """

    state: State
    pushed: Array
    calls: Array

    @property
    def gap(self) -> Array:
        """[B] the mean push at strength 1: how far the classifier had to go against the model (the surrogate gap)."""
        return self.pushed / self.calls


class When(NamedTuple):
    """The `steps.Interval` of one step but for `last`, which is known before tracing; scalars."""

    step: Any
    before: Any
    t: Any
    s: Any


def whens(process: GaussianProcess, cfg: config.Sample) -> list[tuple[When, bool]]:
    """The steps of a sampler, on the host, and which of them needs another program (`last`)."""
    grid = sampler.grid_of(process, cfg)
    rows = zip(
        np.arange(cfg.steps, dtype=np.int32), np.append(grid[:1], grid[:-2]), grid, grid[1:], strict=False
    )
    apart = cfg.method not in ALIKE
    return [(When(*row), apart and i == cfg.steps - 1) for i, row in enumerate(rows)]


def begin(process: GaussianProcess, cfg: config.Sample, keys: Key, shape: tuple[int, ...]) -> Walk:
    """Before the first step: one sample [*shape] per key [B], from the noise that `sampler.integrate` starts from."""
    level = process.noise_level(jnp.float32(sampler.grid_of(process, cfg)[0]))
    u = sampler.start(level, keys, shape)
    return Walk(State(u, jnp.zeros_like(u)), jnp.zeros(len(u)), jnp.float32(0))


def advance(
    process: GaussianProcess,
    cfg: config.Sample,
    denoiser: Denoiser,
    log_prob: guidance.LogProb,
    walk: Walk,
    when: When,
    keys: Key,
    label: Array,
    scale: Array,
    cond: Array | None = None,
    last: bool = False,
) -> Walk:
    """One guided step, without a loop inside.

    Args:
      process: the noise law the denoiser was made for.
      cfg: method and its fields.
      denoiser: what is guided.
      log_prob: the classifier.
      walk: from `begin` or the step before.
      when: which step.
      keys: [B] as in `begin`.
      label: int [B], the class wanted for each.
      scale: [] or [B], the strength.
      cond: [B,E] conditions of the denoiser, or None.
      last: from `whens`.

    Returns:
      The walk at the step's end; after the last one `walk.state.u` are the samples, not clipped.
    """
    pushes: list[Array] = []
    guided = guidance.by_classifier(denoiser, log_prob, label, scale, process, watch=pushes.append)
    state = UNROLLED[cfg.method](process, cfg)(guided, walk.state, Interval(*when, last=last), keys, cond)
    return Walk(state, walk.pushed + sum(pushes), walk.calls + len(pushes))


def scan(step: Callable[[Walk, When, bool], Walk], walk: Walk, steps: list[tuple[When, bool]]) -> Walk:
    """All `steps` of `whens` as one program: a scan, and the last step after it; for accelerators."""
    times = [when for when, _ in steps[:-1]]
    stacked = When(*(jnp.asarray(np.stack(column)) for column in zip(*times, strict=True)))
    walk, _ = jax.lax.scan(lambda carry, when: (step(carry, when, False), None), walk, stacked)
    return step(walk, *steps[-1])
