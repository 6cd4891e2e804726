"""Detectors of memorized prompts that look at cross-attention: which tokens the pixels look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mdiff.nemo import Detect
from mdiff.probes.prompted_asked import Asked, Detector, Maps
from mdiff.types import Array


@dataclass(frozen=True)
class AttentionEntropy(Detector):
    """Entropy of attention over tokens at the first step, -sum_i a_i ln a_i, a_i the mean over heads and pixels (arXiv 2403.11052).

    Memorized prompts do not gather attention in the start token: larger is memorized.

    Attributes:
      layer: which of the cross-attention layers in the network's order, or -1: the mean over all. The best published one is 3.
    """

    layer: int = -1
    taps: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2403.11052"

    def calls(self, cfg: Detect) -> int:
        return 1

    def refuses(self, cfg: Detect, shape: tuple[int, int, int], layers: tuple[str, ...]) -> str:
        few = self.layer >= len(layers)
        return (
            f"{self.name}: the network has {len(layers)} cross-attention layers, none is number {self.layer}"
            * few
        )

    def __call__(self, asked: Asked) -> Array:
        xt, t = asked.at(asked.level * asked.noise, asked.level)
        maps = asked.look(xt, t, asked.cond, maps=True)[1]
        names = asked.layers if self.layer < 0 else (asked.layers[self.layer],)
        return _terms(maps, names).sum(-1)


@dataclass(frozen=True)
class AttentionEntropyEnd(Detector):
    """Entropy E of attention over the last fifth of the steps, and how much the summary tokens' part S of it moved:
    mean(E) + |mean(S) - S_1| with S_1 that of the first step, layers averaged (arXiv 2403.11052).

    Summary tokens are the end token and the padding; their a_i are not normalized.

    Attributes:
      signed: without the absolute value, as the released code has it.
    """

    signed: bool = False
    taps: ClassVar[bool] = True
    guided: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2403.11052"

    def calls(self, cfg: Detect) -> int:
        return 2 * cfg.steps

    def __call__(self, asked: Asked) -> Array:
        def entropies(given: Array, free: Array, s: Array, maps: Maps) -> tuple[Array, Array]:
            terms = _terms(maps, asked.layers)
            summary = jnp.arange(terms.shape[-1]) >= asked.length[:, None] - 1
            return terms.sum(-1), jnp.sum(terms * summary, -1)

        (every, summary), _ = asked.walk(asked.cfg.steps, entropies, maps=True)
        last = max(1, asked.cfg.steps // 5)
        moved = summary[-last:].mean(0) - summary[0]
        return every[-last:].mean(0) + (moved if self.signed else jnp.abs(moved))


@dataclass(frozen=True)
class BrightEnding(Detector):
    """Mean over steps of ||(eps_c - eps) m||_2 / mean(m), m the attention to the end token at the last step (arXiv 2410.21665).

    m is the mean over heads and over the encoder's layers of the highest resolution that attend to text; each of its pixels
    stands for a patch of the image. The released code samples twice; here gaps are kept by patch until m is known.
    """

    taps: ClassVar[bool] = True
    guided: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2410.21665"

    def calls(self, cfg: Detect) -> int:
        return 2 * cfg.steps

    def refuses(self, cfg: Detect, shape: tuple[int, int, int], layers: tuple[str, ...]) -> str:
        none = not any(name.startswith("enc") for name in layers)
        return (
            f"{self.name}: no layer of the encoder attends to text; set net.cross to one of its resolutions"
            * none
        )

    def __call__(self, asked: Asked) -> Array:
        height, width, _ = asked.shape

        def seen(given: Array, free: Array, s: Array, maps: Maps) -> tuple[Array, Array]:
            down = [each for name, each in maps.items() if name.startswith("enc")]
            most = max(each.shape[2] for each in down)
            rows = jnp.stack([each.mean(1) for each in down if each.shape[2] == most]).mean(0)
            mask = jnp.take_along_axis(rows, asked.length[:, None, None] - 1, axis=2)[..., 0]
            side = math.isqrt(most)
            square = jnp.sum(((given - free) / s) ** 2, axis=-1)
            patches = square.reshape(-1, side, height // side, side, width // side).sum((2, 4))
            return patches.reshape(-1, most), mask

        (squares, masks), _ = asked.walk(asked.cfg.steps, seen, maps=True)
        mask = masks[-1]
        return jnp.sqrt(jnp.sum(squares * mask**2, axis=-1)).mean(0) / mask.mean(-1)


def _terms(maps: Maps, layers: tuple[str, ...]) -> Array:
    """-a_i ln a_i of each token [B,L], a_i attention's mean over heads and pixels; the mean over layers."""
    share = jnp.stack([maps[name].mean((1, 2)) for name in layers])
    return jax.scipy.special.entr(share).mean(0)
