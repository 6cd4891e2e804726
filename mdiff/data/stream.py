"""Batches as a pure function of (seed, step).

An epoch is a permutation of the slots (the training images, planted duplicates repeated); the epochs
laid end to end are one endless sequence, and step k reads positions k * batch to (k + 1) * batch - 1 of
it. Nothing is carried from step to step, so a resumed run reads what an uninterrupted one would have.
"""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.data import augment, damage
from mdiff.data.degrade import noisy_copy
from mdiff.types import Array, Batch, Key, to_float


def permutation(seed: int, stream: str, count: int, n: int) -> np.ndarray:
    """A uniform permutation of 0..n-1, int32 [n], as a pure function of its arguments.

    It sorts n raw words of the Philox counter generator (Salmon et al., SC 2011). numpy promises those
    words for all versions, and does not promise `Generator.permutation`.

    Args:
      seed: any integer; taken modulo 2**64.
      stream: the name of the use, which keeps uses apart.
      count: which permutation of the stream, such as the epoch; below 2**32.
      n: how many.
    """
    key = np.array([seed % 2**64, zlib.crc32(stream.encode()) << 32 | count], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").astype(np.int32)


def uniforms(seed: int, stream: str, where: tuple[int, int], n: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [n], as a pure function of its arguments, as `permutation` is.

    Args:
      seed: any integer; taken modulo 2**64.
      stream: the name of the use, which keeps uses apart.
      where: two numbers, each below 2**64, such as an image's id and a copy's number.
      n: how many.
    """
    key = np.array([seed % 2**64, zlib.crc32(stream.encode())], np.uint64)
    raw = np.random.Philox(key=key, counter=np.array([0, 0, *where], np.uint64)).random_raw(n)
    return (raw >> np.uint64(11)) * 2.0**-53


@functools.lru_cache(maxsize=8)
def _epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    order = permutation(seed, "epoch", epoch, n)
    order.setflags(write=False)
    return order


def indices(seed: int, step: int, batch: int, slots: np.ndarray) -> np.ndarray:
    """Which training images make the batch of `step`.

    Every epoch visits every slot exactly once. Batches may span epochs, and may be larger than one.

    Args:
      seed: the run's seed.
      step: training step, from 0.
      batch: images per step.
      slots: int32 [S] indices into the training images; an image with k copies occurs k times.

    Returns:
      int32 [batch], entries of `slots`.
    """
    n = len(slots)
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    orders = np.concatenate([_epoch(seed, epoch, n) for epoch in epochs])
    start = first - epochs[0] * n
    return slots[orders[start : start + batch]]


def gather(resident: dict[str, Array], rows: dict[str, Array]) -> dict[str, Array]:
    """The raw batch, on the device. Pure; trace it in a jit.

    Args:
      resident: from `Reader.resident`: the whole training set, or nothing.
      rows: from `Reader.batch`: where the batch is in the resident set, or the batch itself.

    Returns:
      `x` uint8 [B,H,W,C], `id` [B]; `label` [B] and `vector` [B,V] if the network is conditioned on them; with
      ambient training `noise` uint32 [B,3] and `cutoff` float32 [B]; with data.degrade `noise`.
    """
    found = {name: column for name, column in rows.items() if name != "index"}
    if "index" in rows:
        found |= {name: column[rows["index"]] for name, column in resident.items()}
    return found


def finish(raw: dict[str, Array], key: Key, cfg: config.Config) -> Batch:
    """Floats, fixed noisy copies or fixed damage, then augmentations. Pure; trace it in a jit.

    Args:
      raw: from `gather`.
      key: randomness of the augmentation, new at every step.
      cfg: uses data.flip, data.shift, data.augment, data.degrade, data.labels, the loss's cutoffs and seed, which is that of the
        noisy copies and of the damage.

    Returns:
      `raw` with `x` float32 [B,H,W,C] in [-1, 1]; with ambient training also `y` [B,H,W,C], the noisy copies; with
      data.augment also `augment` [B,9], what was done to `x` and not to `y` (see `mdiff.data.augment`):
      where a loss uses `y`, the network is to be told zeros. With data.degrade `x` is damaged, and `seen` [B,H,W,1]
      and `told` [B,H,W,1] are what is seen of it and what is left of that to the network (`mdiff.data.damage`).
    """
    images = {"x": jnp.asarray(to_float(raw["x"]))}
    raw = dict(raw)
    if cfg.data.labels == "redrawn":
        raw["label"] = jax.random.randint(
            augment.stream(key, "labels"), raw["label"].shape, 0, cfg.net.classes
        )
    if cfg.loss.copies:
        # Before the augmentations: noise on a flipped image would be a second draw, which leaks (degrade.py).
        images["y"] = noisy_copy(images["x"], raw.pop("noise"), raw["cutoff"], cfg.seed, cfg.loss.ladder)
    harm = damage.make(cfg)
    if harm is not None:
        # Before the augmentations, A~ too: all three move together, so that the blocks of both are of one grid.
        # A part of a block of B that is not part of a block of A would tell which pixels A hides.
        seen = harm.fixed(raw.pop("noise"), cfg.seed, *images["x"].shape[1:3])
        told = harm.more(augment.stream(key, "further"), seen)
        images = {"x": harm.apply(images["x"], seen), "seen": seen, "told": told}
    if cfg.data.flip:
        images = augment.flip(key, images)
    if cfg.data.shift:
        cyclic = cfg.loss.copies or harm is not None
        images = augment.shift(augment.stream(key, "shift"), images, cfg.data.shift, cyclic)
    if cfg.data.augment:
        warped, told = augment.non_leaky(augment.stream(key, "augment"), images["x"], cfg.data.augment)
        images |= {"x": warped, "augment": told}
    return {**raw, **images}
