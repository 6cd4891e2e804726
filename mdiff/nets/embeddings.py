"""Vectors that tell a network what it looks at: noise levels, conditions, positions."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdiff.errors import UserError
from mdiff.nets.layers import edm_init
from mdiff.types import Array

AUGMENT = 9  # numbers that describe one draw of EDM's augmentation (arXiv 2206.00364, table 6)


def noise_embedding(c_noise: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sinusoidal features [B, dim] of the scalar c_noise [B]: sines, then cosines (arXiv 2011.13456).

    The frequencies end at 1 / max_period, in every network here; those published with ADM and DiT end one step
    above it and put the cosines first.
    """
    half = dim // 2
    frequency = max_period ** -(jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angle = c_noise[:, None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def position_embedding(height: int, width: int, dim: int, max_period: float = 10_000.0) -> Array:
    """Fixed 2-D positions [height * width, dim]: of the row, then of the column (arXiv 2111.06377, app. A.1).

    Each half holds sines, then cosines, of the coordinate at dim / 4 frequencies from 1 down to
    max_period^(4 / dim - 1).
    """
    quarter = dim // 4
    frequency = max_period ** -(jnp.arange(quarter, dtype=jnp.float32) / quarter)
    rows, columns = (jnp.arange(n, dtype=jnp.float32)[:, None] * frequency for n in (height, width))
    along = [jnp.concatenate([jnp.sin(a), jnp.cos(a)], axis=-1) for a in (rows, columns)]
    shape = (height, width, 2 * quarter)
    grid = [jnp.broadcast_to(along[0][:, None], shape), jnp.broadcast_to(along[1][None], shape)]
    return jnp.concatenate(grid, axis=-1).reshape(height * width, dim)


class FourierFeatures(nn.Module):
    """Sines and cosines [B, features] of c_noise [B] at random frequencies that are not trained.

    The frequencies, normal with standard deviation `scale` (arXiv 2006.10739), are kept with the parameters,
    so that a checkpoint has them; no gradient reaches them.
    """

    features: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, c_noise: Array) -> Array:
        frequency = self.param("frequency", nn.initializers.normal(self.scale), (self.features // 2,))
        angle = 2 * np.pi * c_noise[:, None].astype(jnp.float32) * jax.lax.stop_gradient(frequency)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Conditions(nn.Module):
    """What is known about an image -> one condition vector [B, features], the sum of up to three parts.

    Attributes:
      classes: number of labels; 0 for none. Row `classes` of the table stands for "no label".
      vector: width of the vector condition; 0 for none. The parameter `vector_null` stands for "no vector".
      augment: is there a description of the augmentation? Zeros, no augmentation, add nothing.
      features: width of the result.
    """

    classes: int
    vector: int
    augment: bool
    features: int

    @property
    def takes(self) -> tuple[str, ...]:
        """Entries that are conditions of an image, as opposed to of its augmentation."""
        return ("label",) * bool(self.classes) + ("vector",) * bool(self.vector)

    @nn.compact
    def __call__(self, entries: Mapping[str, Array], n: int, drop: Array | None = None) -> Array:
        """Args:
          entries: any of label int [B], vector [B,V], augment [B,9]; a missing one is null.
          n: the batch size B.
          drop: [B] bool, examples whose label and vector are replaced by null; None drops none.

        Returns:
          [B, features] float32.
        """
        keep = jnp.ones((n,), bool) if drop is None else ~drop
        total = jnp.zeros((n, self.features), jnp.float32)
        if self.classes:
            table = self.param("table", edm_init(), (self.classes + 1, self.features))
            label = entries.get("label", jnp.full((n,), self.classes, jnp.int32))
            total += (
                jnp.take(jnp.asarray(table), jnp.where(keep, label, self.classes), axis=0) * self.classes**0.5
            )
        if self.vector:
            null = self.param("vector_null", nn.initializers.normal(1.0), (self.features,))
            given = entries.get("vector", jnp.zeros((n, self.vector)))
            _check_width("vector", given, self.vector, f"set net.vector to {given.shape[-1]}")
            to_features = nn.Dense(self.features, kernel_init=edm_init(), name="vector")
            vector = to_features(given.astype(jnp.float32))
            keep_vector = keep if "vector" in entries else jnp.zeros((n,), bool)
            total += jnp.where(keep_vector[:, None], vector, null)
        if self.augment:
            given = entries.get("augment", jnp.zeros((n, AUGMENT)))
            _check_width("augment", given, AUGMENT, "give one column per transform parameter")
            to_features = nn.Dense(self.features, use_bias=False, kernel_init=edm_init(), name="augment")
            total += to_features(given.astype(jnp.float32))
        return total


def _check_width(name: str, entry: Array, width: int, fix: str) -> None:
    if entry.ndim != 2 or entry.shape[-1] != width:
        raise UserError(f"{name}: has shape {tuple(entry.shape)}, not [B, {width}]; {fix}")


class LevelUncertainty(nn.Module):
    """Log variance u [B] of the loss at c_noise [B]: Fourier features and a linear map that starts at zero.

    u of EDM2's learned loss weight, loss / exp(u) + u (arXiv 2312.02696, section 2 and appendix B).
    """

    features: int = 128

    @nn.compact
    def __call__(self, c_noise: Array) -> Array:
        features = FourierFeatures(self.features, scale=1.0, name="features")(c_noise) * 2**0.5
        return nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros, name="map")(features)[:, 0]
