"""Images of prompts, with neurons on or off."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.keys import keys
from mdiff.nets.denoiser import Model
from mdiff.probes.units import Units
from mdiff.sample import guidance, sampler
from mdiff.types import Array, Params, to_uint8

Recite = Callable[[Params, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`(params, tokens int32 [P,L], factor [P,N], seeds int [G]) -> uint8 [P,G,H,W,C]`."""


def make(
    model: Model, units: Units, cfg: config.Sample, advance: Callable[[int], None] = lambda n: None
) -> Recite:
    """A function that draws images of prompts from the same starting noises for all of them.

    Args:
      model: a text-conditional one.
      units: the neurons whose activations are multiplied by `factor`; of the unconditional half of guidance too, as of a
        network in which they are pruned.
      cfg: the sampler, with guidance, and `seed`: noise of seed j depends on (seed, j) alone.
      advance: told how many prompts are done.
    """

    @jax.jit
    def draw(params: Params, tokens: Array, factor: Array, seeds: Array) -> Array:
        gates, n = units.gates(factor), len(seeds)
        text = model.condition(params, {"tokens": tokens[None]}, gates=gates["text"])
        assert text is not None
        cond = jnp.broadcast_to(text, (n, *text.shape[1:]))
        denoiser = model.denoiser(params, gates=gates["net"])
        if cfg.guidance != 1:
            null = model.condition(params, {}, n=1, gates=gates["text"])
            span = cfg.guidance_min, cfg.guidance_max
            denoiser = guidance.classifier_free(denoiser, null, cfg.guidance, model.process, *span)
        return sampler.sample(
            model.process, cfg, denoiser, keys(cfg.seed, "recite", seeds), model.shape, cond
        )

    def recite(params: Params, tokens: np.ndarray, factor: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        out = []
        for row, each in zip(tokens, factor, strict=True):
            out.append(to_uint8(draw(params, row, np.asarray(each, np.float32), np.asarray(seeds, np.int32))))
            advance(1)
        return np.stack(out)

    return recite
