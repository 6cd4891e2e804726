"""What a model's denoiser answers to images with noise: errors and sharpness by noise level, and pictures.

All models get the same noisy images x0 + sigma n, whatever their noise law, with the noise of `probes.gap.fixed_noise`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.data.source import Images
from mdiff.keys import keys
from mdiff.nets.denoiser import Model
from mdiff.probes import gap, sharpness
from mdiff.process.gaussian import bcast
from mdiff.types import Array, Denoiser, Params, to_float

Rows = dict[str, np.ndarray]
"""Columns of images: error, variation, high, all (energies); [L,N] of answers, [N] of clean images, without error."""
BATCH = 64
"""Images per call of a network."""


def answer_rows(
    model: Model, params: Params, images: Images, levels: tuple[float, ...], draws: int, seed: int
) -> Rows:
    """Errors and sharpness of a denoiser's answers, means over draws.

    Args:
      model: the network.
      params: its parameters.
      images: N of them, in memory.
      levels: L noise levels (EDM's sigma).
      draws: of noise per image and level.
      seed: of the noise.
    """
    program = _program(model, levels, draws, seed)
    found = []
    for start in range(0, len(images), BATCH):
        # One size for all batches; what the last one is filled up with is not read.
        part = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        answer = program(params, {name: column[part] for name, column in _columns(images).items()})
        found.append(jax.tree.map(np.asarray, answer))
    return {
        name: np.concatenate([part[name] for part in found], axis=1)[:, : len(images)] for name in found[0]
    }


def pictures(
    model: Model, params: Params, images: Images, levels: tuple[float, ...], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A denoiser's answers, and what it saw at unit signal scale; the first draw, both float32 [L,K,H,W,C]."""
    program, columns = _picture_program(model, seed), _columns(images)
    found = [program(params, columns, np.float32(level)) for level in levels]
    answers, noisy = (np.stack([np.asarray(each[k]) for each in found]) for k in (0, 1))
    return answers, noisy


def clean_rows(images: Images) -> Rows:
    """Sharpness of clean images."""
    parts = [images.x[i : i + BATCH] for i in range(0, len(images), BATCH)]
    found = [jax.tree.map(np.asarray, _sharpness(jnp.asarray(to_float(part)))) for part in parts]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


@functools.lru_cache(maxsize=8)
def _program(
    model: Model, levels: tuple[float, ...], draws: int, seed: int
) -> Callable[..., dict[str, Array]]:
    """Jitted `(params, {x, id, conditions}) -> {error, variation, high, all}`, each [L,N], means over draws."""

    @jax.jit
    def program(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
        x0, ids = jnp.asarray(to_float(batch["x"])), batch["id"]
        denoiser, cond = _asked(model, params, batch)

        def one(at: tuple[Array, Array]) -> dict[str, Array]:
            xt, t = _noisy(model, x0, ids, *at, seed)
            found = denoiser(xt, t, cond).x0
            return {"error": jnp.mean((found - x0) ** 2, axis=(1, 2, 3)), **_sharpness(found)}

        sigma = jnp.repeat(jnp.asarray(levels, jnp.float32), draws)
        every = jax.lax.map(one, (sigma, jnp.tile(jnp.arange(draws), len(levels))))
        return jax.tree.map(lambda leaf: leaf.reshape(len(levels), draws, -1).mean(1), every)

    return program


@functools.lru_cache(maxsize=8)
def _picture_program(model: Model, seed: int) -> Callable[..., tuple[Array, Array]]:
    """Jitted `(params, {x, id, conditions}, sigma) -> (answers, noisy images)`, both [K,H,W,C]."""

    @jax.jit
    def program(params: Params, batch: dict[str, Array], sigma: Array) -> tuple[Array, Array]:
        x0, ids = jnp.asarray(to_float(batch["x"])), batch["id"]
        denoiser, cond = _asked(model, params, batch)
        xt, t = _noisy(model, x0, ids, sigma, jnp.int32(0), seed)
        return denoiser(xt, t, cond).x0, xt / bcast(model.process.alpha(t), xt)

    return program


def _asked(model: Model, params: Params, batch: dict[str, Array]) -> tuple[Denoiser, Array | None]:
    """The denoiser and the condition of a batch.

    A model of damaged images is asked as it was trained, each image through damage that is fixed for its id.
    """
    entries = {name: column for name, column in batch.items() if name not in ("x", "id")}
    seen = None
    if model.damage is not None:
        seen = model.damage.fresh(keys(0, "gap damage", batch["id"]), *model.shape[:2])
    return model.denoiser(params, seen=seen), model.condition(params, entries, n=len(batch["id"]))


def _noisy(model: Model, x0: Array, ids: Array, sigma: Array, draw: Array, seed: int) -> tuple[Array, Array]:
    """xt [N,H,W,C] at noise level sigma, and the times t [N]."""
    t = jnp.full(len(x0), model.process.time(sigma))
    return bcast(model.process.alpha(t), x0) * (
        x0 + sigma * gap.fixed_noise(seed, draw, ids, x0.shape[1:])
    ), t


def _sharpness(x: Array) -> dict[str, Array]:
    high, every = sharpness.energies(x)
    return {"variation": sharpness.total_variation(x), "high": high, "all": every}


def _columns(images: Images) -> dict[str, np.ndarray]:
    columns = {
        "x": images.x,
        "id": images.id,
        "label": images.label,
        "vector": images.vector,
        "tokens": images.tokens,
    }
    return {name: column for name, column in columns.items() if column is not None}
